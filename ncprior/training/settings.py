"""Settings of a training, and the terms under which a checkpoint can be resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, TypeVar

import torch


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Settings of every training.

    Arguments:
        weight_decay: Weight decay of the optimizer.
        max_grad_norm: Largest norm of the gradient; ``None`` does not clip.
        ema_decay: Decay per step of the weights' moving average, reached after a warm-up.

    Raises:
        ValueError: If a number is out of range. The message names it and its range.
    """

    weight_decay: float = 1e-2
    max_grad_norm: float | None = 5.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        """Validates the numbers."""
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0; got {self.weight_decay}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm must be positive, or None for no clipping; got "
                f"{self.max_grad_norm}."
            )
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay must be from 0 to 1; got {self.ema_decay}.")


@dataclass(frozen=True, kw_only=True)
class FitSettings(OptimizerSettings):
    """The rarely used settings of :func:`ncprior.fit`; immutable.

    Arguments:
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Largest norm of each head's gradient; ``None`` does not clip.
        ema_decay: Decay per step of the weights' moving average, reached after a warm-up.
        noise_weight: ν, see :func:`ncprior.nce_loss`.
        num_draws: Draws of z_k per row and step, from posterior and prior each. Several draws make
            better use of a VAE whose encoder and decoder cost more than the heads.
        num_cached_proposals: Number of prior samples drawn once and reused; for bases that are
            slow to sample. Only for a single group without a context. Another tenth, and at least
            2,048, are drawn for the held-out losses. Further stages of such a group keep about ten
            per row of data, from 5,000 to 50,000.
        cache_epochs: Number of epochs for which the VAE's groups of each row are cached, as
            parameters; z_k is drawn anew from them at every step, see :mod:`ncprior.data`. With
            one group, only the encoder's work is saved; with several, z_<k repeats. ``math.inf``
            caches once for all epochs, ``None`` never. ``"auto"`` caches once if this does not
            change the distribution of a step: with one group, rows of a tensor, and an encoder
            that draws nothing at random.
        cache_memory: GiB of memory for the cache; a larger cache is stored on disk, in the
            system's folder for temporary files. The result does not depend on it.
        precision: Precision of the factors in the heads' matrix products: ``torch.float32`` or
            ``torch.bfloat16``, which is mixed precision; weights, log r and sums stay in float32.
        group_parallel: In several processes, whether each of them trains the heads of some groups
            alone, on whole batches, and no gradients are exchanged. Otherwise the rows of every
            batch are distributed over the processes, and gradients are averaged.

    Raises:
        ValueError: If a number is out of range. The message names it and its range.

    Example:
        >>> from ncprior import fit
        >>> settings = FitSettings(num_draws=4, weight_decay=0.1)
        >>> history = fit(prior, torch.randn(99, 3), steps=3, settings=settings, progress=False)
        >>> history.stopped
        'all 3 steps taken'
    """

    noise_weight: float = 1.0
    num_draws: int = 1
    num_cached_proposals: int | None = None
    cache_epochs: float | Literal["auto"] | None = "auto"
    cache_memory: float = field(default=4.0, compare=False)
    precision: torch.dtype = torch.float32
    group_parallel: bool = False

    def __post_init__(self) -> None:
        """Validates the numbers."""
        super().__post_init__()
        if not 0 < self.noise_weight < math.inf:
            raise ValueError(f"noise_weight must be positive; got {self.noise_weight}.")
        counts = {"num_draws": self.num_draws, "num_cached_proposals": self.num_cached_proposals}
        if self.cache_epochs != "auto":
            counts["cache_epochs"] = self.cache_epochs  # type: ignore[assignment]
        require_positive(counts)
        if not self.cache_memory >= 0:
            raise ValueError(f"cache_memory must be at least 0 GiB; got {self.cache_memory}.")

    @property
    def caches(self) -> bool:
        """Whether a cache is asked for, which needs data that can be read again."""
        return self.num_cached_proposals is not None or self.cache_epochs not in ("auto", None)


Settings = TypeVar("Settings", bound=OptimizerSettings)


@dataclass(frozen=True, kw_only=True)
class TrainingTerms(Generic[Settings]):
    """The terms of one training: a checkpoint is resumed only under equal terms.

    Arguments:
        steps: Number of optimizer steps.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        eval_every: Steps between rows of the history.
        settings: All other settings.
        facts: Properties of model, data and processes by name, such as the VAE's fingerprint.

    Raises:
        ValueError: If a count is below 1. The message names it.
    """

    steps: int
    batch_size: int
    learning_rate: float
    eval_every: int
    settings: Settings
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Validates the counts."""
        names = ("steps", "batch_size", "eval_every")
        require_positive({name: getattr(self, name) for name in names})

    def stored(self) -> dict[str, Any]:
        """Returns every compared value by its name, as a checkpoint stores it."""
        main = ("steps", "batch_size", "learning_rate", "eval_every")
        compared = [part.name for part in fields(self.settings) if part.compare]
        values = {
            **{name: getattr(self, name) for name in main},
            **{name: getattr(self.settings, name) for name in compared},
            **self.facts,
        }
        return {name: _plain(value) for name, value in values.items()}

    def require_equal(self, stored: Mapping[str, Any]) -> None:
        """Compares these terms, field by field, with the terms of a checkpoint.

        Raises:
            ValueError: If a field differs. The message names it, both values and the remedy.
        """
        for name, now in self.stored().items():
            if stored.get(name) != now:
                raise ValueError(
                    f"The checkpoint belongs to a training with {name}={stored.get(name)}; got "
                    f"{name}={now}. Pass the same data and settings, or another checkpoint file."
                )


def require_positive(counts: Mapping[str, float | None]) -> None:
    """Validates counts by their names; ``None`` passes.

    Raises:
        ValueError: If a count is below 1.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}.")


def _plain(value: Any) -> Any:  # noqa: ANN401
    return str(value) if isinstance(value, torch.dtype) else value
