"""`fit_vaebm`: the whole training of an energy, with exact resume and a stop at divergence.

Energies can diverge: the training of the published code "will eventually explode". Here, training
stops if the energy gap between data and chains is too large, or if a number is not finite. The
energy then has the weights of the last row before the divergence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncprior.data.batches import one_pass
from ncprior.data.checked import checked_batches
from ncprior.data.device_loader import Loader
from ncprior.data.digest import data_digest
from ncprior.data.stream import Stream, require_restartable
from ncprior.samplers.base import Sampler
from ncprior.samplers.identity import identity_of
from ncprior.saving.identity import facts_of_draws
from ncprior.training.arguments import validate_loop_arguments
from ncprior.training.checkpoints import Validators, is_finite, is_like, is_step, is_table
from ncprior.training.resumable import (
    BY_CALLBACK,
    ResumableTraining,
    is_true,
    length_of,
    load,
    unchanged,
    weights_of,
)
from ncprior.training.settings import TrainingTerms
from ncprior.utils.distributed import num_ranks
from ncprior.utils.random_state import random_state, seeded, set_random_state
from ncprior.utils.require import (
    require_counts,
    require_instance,
    require_numbers,
)
from ncprior.vaebm.model import VAEBM
from ncprior.vaebm.replay import ReplayBuffer
from ncprior.vaebm.saved import trained_on
from ncprior.vaebm.settings import EnergySettings
from ncprior.vaebm.trainer import EnergyMetrics, VAEBMTrainer, require_trainable

_DEFAULTS = EnergySettings()

_CHECKED = 1024  # rows at once, in the check for NaN


class EnergyRow(NamedTuple):
    """Row of a history: means over the steps since the previous row.

    Attributes:
        step: Steps taken so far.
        gap: Energy gap in nats: mean E of the data minus mean E of the chains.
        energy: Mean E of the data, in nats.
        spectral: Sum of the largest singular values of all weights.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: The learning rate of the last step.
        seconds: Time spent training so far, in seconds.
    """

    step: int
    gap: float
    energy: float
    spectral: float
    grad_norm: float
    learning_rate: float
    seconds: float


class EnergyHistory(NamedTuple):
    """History of an energy's training, which :func:`fit_vaebm` returns.

    Attributes:
        rows: One row every ``eval_every`` steps, and one at the end.
        kept_step: The step whose averaged weights were kept.
        stopped: Reason why training ended.
        diverged: Whether training ended because the energy diverged.
    """

    rows: list[EnergyRow]
    kept_step: int
    stopped: str
    diverged: bool

    def __str__(self) -> str:
        """Returns the last gap, the kept step, and why training ended, in one line."""
        gap = f"energy gap {self.rows[-1].gap:.2f} nats, " if self.rows else ""
        return f"{gap}weights of step {self.kept_step}; {self.stopped}"


@torch.inference_mode(False)
@torch.enable_grad()
def fit_vaebm(
    model: VAEBM,
    data: Any,  # noqa: ANN401
    *,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    sampler: Sampler | None = None,
    condition: Callable[[Any], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[EnergyRow], Any] | None = None,
    progress: bool = True,
    eval_every: int = 50,
    checkpoint_every: int = 100,
    settings: EnergySettings = _DEFAULTS,
) -> EnergyHistory:
    """Trains the energy of a model, and leaves VAE and heads as they were.

    The optimizer is Adam, with a cosine schedule to 0. An exponential moving average of the
    weights is kept. If ``checkpoint`` exists, training resumes from it, with the replay buffer, as
    if it had never stopped: the weights come out the same, bit for bit. Gradients are enabled, also
    under ``torch.no_grad`` or ``torch.inference_mode``.

    Arguments:
        model: The model; its energy ends up with the kept weights, in evaluation mode.
        data: A tensor or map-style dataset of x, a ``DataLoader``, or any iterable of batches.
        steps: Number of optimizer steps.
        batch_size: Rows per batch, where batches are made here, and number of chains.
        learning_rate: The first learning rate.
        sampler: Sampler of the NCP prior for the start of the chains; ``None`` takes the prior's
            own, and without one the base.
        condition: Returns the chains' condition for a batch, if the source needs one.
        checkpoint: A file to save to and to resume from.
        callback: Called with each new :class:`EnergyRow`; stops training by returning True.
        progress: Whether to show a progress bar.

    Other arguments:
        eval_every: Steps between rows of the history.
        checkpoint_every: Steps between checkpoints.
        settings: All rarely used settings, such as ``EnergySettings(buffer_size=10_000)``.

    Returns:
        The history of the training. A divergence raises no error: ``diverged`` and ``stopped``
        report it, and the weights are those of the last row before.

    Raises:
        ValueError: If the checkpoint belongs to another training, a number is out of range, or a
            tensor or array of data has NaN. The message names the remedy.
        TypeError: If data for a checkpoint can be read only once, or an argument has the wrong
            type. Pass a tensor, a dataset, a ``DataLoader`` or a list.
        OSError: If the checkpoint cannot be written. Pass a path that can.
        RuntimeError: If there are several processes. Call :meth:`VAEBMTrainer.step` in a loop.

    Example:
        >>> from ncprior.heads import MLPHead
        >>> model = VAEBM(source, MLPHead((3,)), num_steps=2)
        >>> history = fit_vaebm(model, torch.randn(100, 3), steps=3, progress=False)
        >>> print(history)  # doctest: +ELLIPSIS
        energy gap ... nats, weights of step 3; all 3 steps taken
    """
    require_trainable(model)
    sampler = model.start_sampler(sampler)
    require_counts(steps=steps, batch_size=batch_size, eval_every=eval_every)
    require_numbers("(0, inf)", learning_rate=learning_rate)
    require_instance("settings", settings, EnergySettings, "Pass EnergySettings(buffer_size=…).")
    validate_loop_arguments(
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        callback=callback,
        progress=progress,
    )
    if isinstance(data, Tensor | np.ndarray):
        for _ in checked_batches(one_pass(data, _CHECKED)):
            pass
    terms = TrainingTerms(
        steps=int(steps),
        batch_size=int(batch_size),
        learning_rate=float(learning_rate),
        eval_every=int(eval_every),
        settings=settings,
        facts=_facts(model, sampler, data, batch_size, resumable=checkpoint is not None),
    )
    if num_ranks() > 1:
        raise RuntimeError(
            "fit_vaebm runs in one process. In several, call VAEBMTrainer.step in a loop."
        )
    saved, outside = load(checkpoint), random_state()
    trainer = _trainer(model, terms, sampler, condition)
    stream = Stream(data, batch_size, resumable=checkpoint is not None)
    run = EnergyTraining(model, trainer, terms, callback)
    if saved is not None:
        try:
            run.restore(saved, stream)
        except ValueError:
            set_random_state(outside)
            raise
    with unchanged(model.source):
        run.run(
            Loader(stream, run.device),
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
    return EnergyHistory(run.rows, run.kept_step, str(run.stopped), run.diverged)


def _facts(
    model: VAEBM,
    sampler: Sampler | None,
    data: Any,  # noqa: ANN401
    batch_size: int,
    *,
    resumable: bool,
) -> dict[str, Any]:
    """Returns the properties of chains, model and data that a checkpoint compares.

    A digest of the data is read only for a checkpoint.
    """
    if resumable:
        require_restartable(data)
    return {
        "langevin": [model.num_steps, model.step_size, model.langevin_target],
        "data_noise": model.data_noise,
        "precision": str(model.precision),
        "sampler": None if sampler is None else identity_of(sampler),
        **trained_on(model.source, model.prior),
        "source": facts_of_draws(model.source, draw_x=True)["facts"],
        "rows": length_of(data),
        **({"data": data_digest(data, batch_size)} if resumable else {}),
    }


def _trainer(
    model: VAEBM,
    terms: TrainingTerms[EnergySettings],
    sampler: Sampler | None,
    condition: Callable[[Any], Any] | None,
) -> VAEBMTrainer:
    settings, size = terms.settings, terms.settings.buffer_size
    return VAEBMTrainer(
        model,
        torch.optim.Adam(
            model.parameters(), terms.learning_rate, weight_decay=settings.weight_decay
        ),
        sampler=sampler,
        contrast=settings.contrast,
        buffer=ReplayBuffer(size, settings.replay_fraction) if size else None,
        spectral_weight=settings.spectral_weight,
        max_grad_norm=settings.max_grad_norm,
        condition=condition,
    )


class EnergyTraining(ResumableTraining):
    """Training of an energy, which returns to the weights of the last row before a divergence.

    Arguments:
        model: The model whose energy is trained.
        trainer: The trainer of the energy.
        terms: The terms of the training.
        callback: Called with each new row; stops the training by returning True.
    """

    def __init__(
        self,
        model: VAEBM,
        trainer: VAEBMTrainer,
        terms: TrainingTerms[EnergySettings],
        callback: Callable[[EnergyRow], Any] | None,
    ) -> None:
        super().__init__(model, model.energy, trainer, terms, "energy")
        self.trainer, self.callback = trainer, callback
        self.good, self.good_step = weights_of(model.energy), 0
        self.diverged = False
        self.sums = torch.zeros(len(EnergyMetrics._fields), device=self.device)

    def step(self, x: Any) -> None:  # noqa: ANN401
        """Takes one step; a number that is not finite ends the training as diverged."""
        try:
            self.sums += torch.stack([m.to(self.sums) for m in self.trainer.step(x)])
        except FloatingPointError as error:
            self._diverge(str(error))

    def row_width(self) -> int:
        """Returns how many numbers a row of the history has."""
        return len(EnergyRow._fields)

    def evaluate(self) -> str:
        """Adds a row; keeps the averaged weights, unless the energy has diverged."""
        gap, energy, spectral, norm = (self.sums / self.steps_since_row).tolist()
        self.sums, self.steps_since_row = torch.zeros_like(self.sums), 0
        rate: float = self.trainer.optimizer.param_groups[0]["lr"]
        row = EnergyRow(self.trainer.steps, gap, energy, spectral, norm, rate, self.elapsed())
        self.rows.append(row)
        if not abs(row.gap) <= self.terms.settings.max_gap:
            self._diverge(f"the energy gap is {row.gap:.4g} nats")
        elif not self.diverged:
            self.good, self.good_step = self._copied_average(), row.step
        stops = self.callback is not None and is_true(self.callback(row))
        if stops and self.stopped is None:
            self.stopped = f"{BY_CALLBACK} at step {row.step}"
        return f"gap {row.gap:.2f}, E {row.energy:.1f}"

    def kept(self) -> Mapping[str, Tensor]:
        """Returns the averaged weights; after a divergence, those of the last row before."""
        return self.good if self.diverged else self.average

    @property
    def kept_step(self) -> int:
        """Step of the kept weights."""
        return self.good_step if self.diverged else self.trainer.steps

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint, with the weights of the last row and the replay buffer.

        A stop by the callback is none: the training goes on when it is called again.
        """
        buffer = self.trainer.buffer
        return {
            **super().state(),
            "stopped": None if str(self.stopped).startswith(BY_CALLBACK) else self.stopped,
            "good": self.good,
            "good_step": self.good_step,
            "diverged": self.diverged,
            "sums": self.sums,
            "penalty": dict(self.trainer.penalty.state_dict()),
            "buffer": None if buffer is None else (buffer.kept, buffer.pushed),
        }

    def validators(self, saved: Mapping[str, Any], stream: Stream) -> Validators:
        """Returns a check of each entry of a checkpoint."""
        return {
            **super().validators(saved, stream),
            "rows": lambda value: is_table(value, self.row_width(), whole=(0,)),
            "good": lambda value: is_like(value, self.good) and is_finite(value),
            "good_step": lambda value: is_step(value, self.most_steps(saved)),
            "diverged": lambda value: isinstance(value, bool),
            "sums": lambda value: is_like(value, self.sums),
            "penalty": lambda value: is_like(value, self.trainer.penalty.state_dict()),
            "buffer": self._fits_buffer,
        }

    def _fits_buffer(self, value: Any) -> bool:  # noqa: ANN401
        """Whether a value is the content of the replay buffer, of chains of this model."""
        buffer = self.trainer.buffer
        if buffer is None or not isinstance(value, tuple) or len(value) != 2:
            return buffer is None and value is None
        kept, pushed = value
        if not isinstance(kept, tuple) or not is_step(pushed, 2**62):
            return False
        if not kept:
            return True
        with seeded(0), torch.no_grad():
            noise = self.trainer.model.draw_noise(1)
        rows = len(kept[0]) if isinstance(kept[0], Tensor) and kept[0].ndim else 0
        like = tuple(part.new_zeros(1).expand(rows, *part.shape[1:]) for part in noise)
        full = 1 <= rows <= buffer.size
        return full and is_like(kept, like) and is_finite(dict(enumerate(kept)))

    def restore(self, saved: dict[str, Any], stream: Stream) -> None:
        """Resumes from a checkpoint, with the weights of the last row and the replay buffer."""
        super().restore(saved, stream)
        self.good = {name: t.to(self.device) for name, t in saved["good"].items()}
        self.good_step, self.diverged = saved["good_step"], saved["diverged"]
        self.sums.copy_(saved["sums"])
        self.rows = [EnergyRow(int(step), *rest) for step, *rest in saved["rows"].tolist()]
        self.trainer.penalty.load_state_dict(saved["penalty"])
        if self.trainer.buffer is not None:
            kept, self.trainer.buffer.pushed = saved["buffer"]
            self.trainer.buffer.kept = tuple(part.to(self.device) for part in kept)

    def _diverge(self, why: str) -> None:
        self.diverged = True
        self.stopped = f"diverged at step {self.trainer.steps}: {why}"

    def _copied_average(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.average.items()}
