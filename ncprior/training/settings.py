"""Settings of a training, and the terms under which a checkpoint can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Generic, Literal, TypeVar

import torch

from ncprior.utils.precision import check_precision
from ncprior.utils.require import require_counts, require_flags, require_numbers


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Settings of every training.

    Arguments:
        weight_decay: Weight decay of the optimizer.
        max_grad_norm: Largest norm of the gradient; ``None`` does not clip.
        ema_decay: Decay per step of the weights' moving average, reached after a warm-up.

    Raises:
        TypeError: If a value is of the wrong type. The message names the remedy.
        ValueError: If a number is out of range. The message names the range.
    """

    weight_decay: float = 1e-2
    max_grad_norm: float | None = 5.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        """Validates the numbers."""
        require_numbers("[0, inf)", weight_decay=self.weight_decay)
        require_numbers("(0, inf] or None", max_grad_norm=self.max_grad_norm)
        require_numbers("[0, 1]", ema_decay=self.ema_decay)


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
        score_weight: Weight of the score term, which also fits the gradient of log r, see
            :func:`ncprior.nce.score_loss`: for latents on R^n whose posterior and prior have
            densities. Ten is a good value. Further stages are trained without it.
        importance_samples: S, for one step of EM towards the prior of highest likelihood: heads are
            contrasted with importance resamples out of S draws of q(z | x) per row, weighted under
            the prior as it is when the training begins, see
            :class:`ncprior.training.ResampledPosterior`. The source needs ``likelihood``, and
            densities of its priors and posteriors. ``None`` trains on q(z | x) itself.
        num_cached_proposals: Number of prior samples drawn once and reused; for bases that are
            slow to sample. Only for a single group without a context. Another tenth, and at least
            2,048, are drawn for the held-out losses. Further stages of such a group keep about ten
            per row of data, from 5,000 to 50,000.
        cache_epochs: Number of epochs for which the VAE's groups of each row are cached, as
            parameters; z_k is drawn anew from them at every step, see :mod:`ncprior.data`. With
            one group, only the encoder's work is saved; with several, z_<k repeats. ``math.inf``
            caches once for all epochs, ``None`` never. ``"auto"`` caches once if this does not
            change the distribution of a step: with one group, rows of a tensor, and an encoder
            that draws nothing at random. Importance samples of rows of a tensor are cached for as
            many epochs as are effective, so that each is used about once.
        cache_memory: GiB of memory for the cache; a larger cache is stored on disk, in the
            system's folder for temporary files. The result does not depend on it.
        precision: Precision of the factors in the heads' matrix products: ``torch.float32`` or
            ``torch.bfloat16``, which is mixed precision; weights, log r and sums stay in float32.
        group_parallel: In several processes, whether each of them trains the heads of some groups
            alone, on whole batches, and no gradients are exchanged. Otherwise the rows of every
            batch are distributed over the processes, and gradients are averaged.

    Raises:
        TypeError: If a value is of the wrong type. The message names the remedy.
        ValueError: If a number is out of range, or settings exclude each other. The message names
            the range or the remedy.

    Example:
        >>> from ncprior import fit
        >>> settings = FitSettings(num_draws=4, weight_decay=0.1)
        >>> history = fit(prior, torch.randn(99, 3), steps=3, settings=settings, progress=False)
        >>> history.stopped
        'all 3 steps taken'
    """

    noise_weight: float = 1.0
    num_draws: int = 1
    score_weight: float = 0.0
    importance_samples: int | None = None
    num_cached_proposals: int | None = None
    cache_epochs: float | Literal["auto"] | None = "auto"
    cache_memory: float = field(default=4.0, compare=False)
    precision: torch.dtype = torch.float32
    group_parallel: bool = False

    def __post_init__(self) -> None:
        """Validates the numbers."""
        super().__post_init__()
        require_numbers("(0, inf)", noise_weight=self.noise_weight)
        require_counts(num_draws=self.num_draws)
        require_numbers("[0, inf)", score_weight=self.score_weight)
        require_counts("[2, inf) or None", importance_samples=self.importance_samples)
        if self.importance_samples is not None and self.score_weight:
            raise ValueError(
                f"Heads are trained with importance samples or with the score term, as the gradient "
                f"of log q(z | x) is not that of the resamples; got importance_samples="
                f"{self.importance_samples} and score_weight={self.score_weight}. Pass score_weight=0."
            )
        require_counts("[1, inf) or None", num_cached_proposals=self.num_cached_proposals)
        if not (isinstance(self.cache_epochs, str) and self.cache_epochs == "auto"):
            require_numbers("[1, inf] or None", cache_epochs=self.cache_epochs)
        require_numbers("[0, inf]", cache_memory=self.cache_memory)
        check_precision(self.precision)
        require_flags(group_parallel=self.group_parallel)

    @property
    def needs_restartable_data(self) -> bool:
        """Whether a cache or a pass before training needs data that can be read again."""
        first_looks = self.importance_samples is not None or self.num_cached_proposals is not None
        return first_looks or self.cache_epochs not in ("auto", None)


Settings = TypeVar("Settings", bound=OptimizerSettings)


@dataclass(frozen=True, kw_only=True)
class TrainingTerms(Generic[Settings]):
    """The terms of one training: a checkpoint is resumed only under equal terms.

    Arguments:
        steps: Number of optimizer steps, or ``None`` until held-out losses stop improving.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        eval_every: Steps between rows of the history.
        settings: All other settings.
        facts: Properties of model, data and processes by name, such as the VAE's fingerprint.

    Raises:
        TypeError: If a number is of the wrong type. The message names the remedy.
        ValueError: If a number is out of range. The message names the range.
    """

    steps: int | None
    batch_size: int
    learning_rate: float
    eval_every: int
    settings: Settings
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Validates the numbers."""
        require_counts("[1, inf) or None", steps=self.steps)
        require_counts(batch_size=self.batch_size, eval_every=self.eval_every)
        require_numbers("[0, inf)", learning_rate=self.learning_rate)

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


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A value as JSON stores it."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value
