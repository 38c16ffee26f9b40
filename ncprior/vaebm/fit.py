"""The loop of energy training as a service: averaged weights, exact resume, and a way back.

Energies can run away: the published code's training "will eventually explode". Here it stops when
the gap between data and chains does, or when anything is no longer finite, and the energy is the one
of the last row before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncprior.data.device_loader import Loader
from ncprior.data.stream import Stream
from ncprior.samplers.base import Sampler
from ncprior.samplers.compose import describe
from ncprior.training.engine import (
    ResumableTraining,
    drive,
    length_of,
    load,
    unchanged,
    weights_of,
)
from ncprior.utils.distributed import num_ranks
from ncprior.vaebm.model import VAEBM
from ncprior.vaebm.replay import ReplayBuffer
from ncprior.vaebm.saved import trained_on
from ncprior.vaebm.trainer import Contrast, EnergyMetrics, VAEBMTrainer


class EnergyRow(NamedTuple):
    """One line of a history; means over the steps since the row before.

    Attributes:
        step: Steps taken so far.
        gap: Mean E of data less that of chains, in nats.
        energy: Mean E of data, in nats.
        spectral: Sum of the largest singular values.
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
    """What :func:`fit_vaebm` returns.

    Attributes:
        rows: One row every ``eval_every`` steps, and one at the end.
        kept_step: The step whose averaged weights were kept.
        stopped: Why training ended.
        diverged: Whether it did because the energy ran away.
    """

    rows: list[EnergyRow]
    kept_step: int
    stopped: str
    diverged: bool

    def __str__(self) -> str:
        """Says in one line what was kept, and why training ended."""
        gap = f"energy gap {self.rows[-1].gap:.2f} nats, " if self.rows else ""
        return f"{gap}weights of step {self.kept_step}; {self.stopped}"


def fit_vaebm(
    model: VAEBM,
    data: Any,  # noqa: ANN401
    *,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 3e-5,
    sampler: Sampler | None = None,
    contrast: Contrast = "x",
    buffer_size: int = 0,
    replay_share: float = 0.6,
    spectral_weight: float = 0.002,
    max_grad_norm: float | None = 5.0,
    ema_decay: float = 0.99,
    max_gap: float = 100.0,
    eval_every: int = 50,
    condition: Callable[[Any], Any] | None = None,
    callback: Callable[[EnergyRow], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> EnergyHistory:
    """Trains the energy of a model, and leaves VAE and heads as they were.

    Adam with a cosine schedule to 0; an exponential moving average of the weights is kept. If
    ``checkpoint`` exists, training goes on from it as if it had never stopped, the replay buffer
    included: the weights come out the same, bit for bit.

    Arguments:
        model: The model; its energy ends up with the kept weights, in evaluation mode.
        data: A tensor or map-style dataset of x, a ``DataLoader``, or any iterable of batches.
        steps: Number of optimizer steps.
        batch_size: Rows per batch, where batches are made here; as many chains are drawn.
        learning_rate: The first learning rate.
        weight_decay: Adam's L2 penalty.
        sampler: How chains' starts are drawn from NCP's heads; ``None`` starts from the base.
        contrast: ``"x"`` or ``"mean"``, see :class:`VAEBMTrainer`.
        buffer_size: Chains kept to go on from; 0 starts each step afresh.
        replay_share: Probability that a chain goes on from a kept one.
        spectral_weight: Weight of the spectral regularisation.
        max_grad_norm: Largest norm of the gradient; ``None`` does not clip.
        ema_decay: Decay per step of the weights' moving average, reached after a warm-up.
        max_gap: Training has diverged when a row's gap is farther from 0, in nats.
        eval_every: Steps between rows of the history.
        condition: Picks the chains' condition out of a batch, if the source needs one.
        callback: Called with each new :class:`EnergyRow`; stops training by returning True.
        checkpoint: A file to save to and resume from.
        checkpoint_every: Steps between checkpoints.
        progress: Whether to show a progress bar.

    Returns:
        The history of the training. Divergence is not raised: it is what ``diverged`` and
        ``stopped`` tell, and the weights are those of the last row before.

    Raises:
        ValueError: If the checkpoint belongs to another training, or a number makes no sense.
        TypeError: If data for a checkpoint can be read only once.

    Example:
        >>> from ncprior.heads import MLPHead
        >>> model = VAEBM(source, MLPHead((3,)), num_steps=2)
        >>> history = fit_vaebm(model, torch.randn(100, 3), steps=3, progress=False)
        >>> print(history)  # doctest: +ELLIPSIS
        energy gap ... nats, weights of step 3; all 3 steps taken
    """
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "contrast": contrast,
        "buffer_size": buffer_size,
        "replay_share": replay_share,
        "spectral_weight": spectral_weight,
        "max_grad_norm": max_grad_norm,
        "ema_decay": ema_decay,
        "max_gap": max_gap,
        "eval_every": eval_every,
        "langevin": [model.num_steps, model.step_size, model.langevin_target],
        "data_noise": model.data_noise,
        "precision": str(model.precision),
        "sampler": None if sampler is None else describe(sampler),
        **trained_on(model.source, model.prior),
        "rows": length_of(data),
    }
    _check(settings, checkpoint_every)
    if num_ranks() > 1:
        raise RuntimeError(
            "fit_vaebm runs in one process. In several, call VAEBMTrainer.step in a loop."
        )
    saved = load(checkpoint)
    trainer = VAEBMTrainer(
        model,
        torch.optim.Adam(model.parameters(), learning_rate, weight_decay=weight_decay),
        sampler=sampler,
        contrast=contrast,
        buffer=ReplayBuffer(buffer_size, replay_share) if buffer_size else None,
        spectral_weight=spectral_weight,
        max_grad_norm=max_grad_norm,
        condition=condition,
    )
    stream = Stream(data, batch_size, resumable=checkpoint is not None)
    run = _Run(model, trainer, settings, callback)
    if saved is not None:
        run.restore(saved, stream)
    with unchanged(model.source):
        drive(
            *(run, Loader(stream, run.device), run.step, run.look),
            name="energy",
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
    return EnergyHistory(run.rows, run.kept_step, str(run.stopped), run.diverged)


class _Run(ResumableTraining):
    """The state of one training of an energy."""

    def __init__(
        self,
        model: VAEBM,
        trainer: VAEBMTrainer,
        settings: dict[str, Any],
        callback: Callable[[EnergyRow], Any] | None,
    ) -> None:
        super().__init__(model, model.energy, trainer, settings)
        self.trainer, self.callback = trainer, callback
        self.good, self.good_step = weights_of(model.energy), 0
        self.diverged = False
        self.sums = torch.zeros(len(EnergyMetrics._fields), device=self.device)

    def step(self, batches: Loader) -> None:
        x = self.next_batch(batches)
        if self.stopped is not None:
            return
        try:
            self.sums += torch.stack([m.to(self.sums) for m in self.trainer.step(x)])
        except FloatingPointError as error:
            self._diverge(str(error))
        else:
            self.stepped()

    def look(self) -> str:
        """Adds a row; keeps the averaged weights to go back to, or goes back."""
        gap, energy, spectral, norm = (self.sums / self.steps_since_row).tolist()
        self.sums, self.steps_since_row = torch.zeros_like(self.sums), 0
        rate: float = self.trainer.optimizer.param_groups[0]["lr"]
        row = EnergyRow(self.trainer.steps, gap, energy, spectral, norm, rate, self.elapsed())
        self.rows.append(row)
        if not abs(row.gap) <= self.settings["max_gap"]:
            self._diverge(f"the energy gap is {row.gap:.4g} nats")
        elif not self.diverged:
            self.good, self.good_step = self._copied_average(), row.step
        if self.callback is not None and self.callback(row) is True and not self.diverged:
            self.stopped = f"stopped by the callback at step {row.step}"
        return f"gap {row.gap:.2f}, E {row.energy:.1f}"

    def kept(self) -> Mapping[str, Tensor]:
        """The averaged weights; if the energy ran away, those of the last row before."""
        return self.good if self.diverged else self.average

    @property
    def kept_step(self) -> int:
        return self.good_step if self.diverged else self.trainer.steps

    def state(self) -> dict[str, Any]:
        buffer = self.trainer.buffer
        return {
            **super().state(),
            "good": self.good,
            "good_step": self.good_step,
            "diverged": self.diverged,
            "sums": self.sums,
            "penalty": dict(self.trainer.penalty.state_dict()),
            "buffer": None if buffer is None else (buffer.kept, buffer.pushed),
        }

    def restore(self, saved: dict[str, Any], stream: Stream) -> None:
        super().restore(saved, stream)
        self.good = {name: t.to(self.device) for name, t in saved["good"].items()}
        self.good_step, self.diverged = saved["good_step"], saved["diverged"]
        self.sums.copy_(saved["sums"])
        self.rows = [EnergyRow(*row) for row in saved["rows"]]
        self.trainer.penalty.load_state_dict(saved["penalty"])
        if self.trainer.buffer is not None:
            kept, self.trainer.buffer.pushed = saved["buffer"]
            self.trainer.buffer.kept = tuple(part.to(self.device) for part in kept)

    def _diverge(self, why: str) -> None:
        self.diverged = True
        self.stopped = f"diverged at step {self.trainer.steps}: {why}"

    def _copied_average(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.average.items()}


def _check(settings: dict[str, Any], checkpoint_every: int) -> None:
    names = ("steps", "batch_size", "eval_every")
    counts = {**{name: settings[name] for name in names}, "checkpoint_every": checkpoint_every}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}.")
    if settings["buffer_size"] < 0 or not 0 <= settings["ema_decay"] <= 1:
        raise ValueError(
            f"buffer_size must be at least 0 and ema_decay from 0 to 1; got "
            f"{settings['buffer_size']} and {settings['ema_decay']}."
        )
    if not settings["max_gap"] > 0:
        raise ValueError(f"max_gap must be positive; got {settings['max_gap']}.")
