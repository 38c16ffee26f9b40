"""History of a training: one row per evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncprior.utils.require import require_numbers

_SURE = 3.0  # standard errors

_ROUNDING = 1e-6  # nats, of losses in float32


class Row(NamedTuple):
    """Row of a history: the losses at one evaluation.

    Attributes:
        step: Steps taken so far.
        loss: NCE loss at ν = 1 in nats per group, averaged over the steps since the previous row.
        held_out: NCE loss in nats per group of the averaged weights on held-out data, or ``None``.
        learning_rate: The learning rate of the last step.
        seconds: Time spent training so far, held-out losses included, in seconds.
        stage: Number of the stage, from 1; the steps of each stage begin again.

    Example:
        >>> Row(100, [1.2], [1.3], 1e-3, 2.0).step
        100
    """

    step: int
    loss: list[float]
    held_out: list[float] | None
    learning_rate: float
    seconds: float
    stage: int = 1

    def summary(self) -> str:
        """Returns the losses, averaged over the groups, as a short text."""
        text = f"NCE {sum(self.loss) / len(self.loss):.3f}"
        if self.held_out is not None:
            text += f", held out {sum(self.held_out) / len(self.held_out):.3f}"
        return text


def to_table(rows: Sequence[Any], width: int) -> Tensor:
    """Returns the numbers of rows as a table of float64, ``(N, width)``, as checkpoints hold them."""
    flat = [[n for field in row for n in _numbers(field)] for row in rows]
    return torch.tensor(flat, dtype=torch.float64, device="cpu").view(len(rows), width)


def _numbers(field: Any) -> list[float]:  # noqa: ANN401
    if field is None:
        return []
    return field if isinstance(field, list) else [field]


def to_rows(table: Tensor, num_groups: int) -> list[Row]:
    """Returns the rows of a table."""
    return [
        Row(int(step), rest[:num_groups], rest[num_groups:] or None, rate, seconds, int(stage))
        for step, *rest, rate, seconds, stage in table.tolist()
    ]


class History(NamedTuple):
    """History of a training, which :func:`ncprior.fit` returns.

    Attributes:
        rows: One row every ``eval_every`` steps, and one at the end.
        best_step: Per group, the step whose averaged weights were kept; 0 if no step has lowered
            its held-out loss.
        best_loss: Per group, its held-out NCE loss in nats; ``None`` without held-out data.
        best_error: Per group, the standard error of ``best_loss``; ``None`` without held-out data.
        stopped: Reason why training ended. If a limit of steps or seconds was too low, it says that
            the held-out loss was still falling.
        stages: The histories of further stages; the heads of the last stage may not be in use.
        kept: In the history of a further stage, per group, whether its head is multiplied in.
        ess: Effective sample size of the importance samples of a row, from 1 to S, before the
            training; ``None`` without importance samples.

    Example:
        >>> from ncprior import fit
        >>> history = fit(prior, torch.randn(500, 3), steps=20, progress=False)
        >>> history.stopped, history.best_step
        ('all 20 steps taken', [20])
    """

    rows: list[Row]
    best_step: list[int]
    best_loss: list[float] | None
    best_error: list[float] | None
    stopped: str
    stages: tuple[History, ...] = ()
    kept: tuple[bool, ...] = ()
    ess: float | None = None

    def has_learnt(self, least: float = 0.0) -> list[bool]:
        """Returns per group whether its head has learnt something that holds on held-out data.

        This holds if the head's held-out loss L is below 2 log 2 nats, the loss without a head, by
        three standard errors of L: then its Jensen-Shannon divergence, log 2 - L/2, is above 0. L
        is the lowest of many losses on the same rows, which two standard errors do not allow for.
        Without held-out losses, every value is True.

        Arguments:
            least: Largest divergence that counts as nothing, in nats.
        """
        require_numbers("[0, inf)", least=least)
        if self.best_loss is None or self.best_error is None:
            return [True] * len(self.best_step)
        pairs = zip(self.best_loss, self.best_error, strict=True)
        most = 2 * (math.log(2) - least) - _ROUNDING
        return [loss + _SURE * error < most for loss, error in pairs]

    def __str__(self) -> str:
        """Returns the kept losses and steps, and why training ended, in one line per stage."""
        losses = self.rows[-1].loss if self.best_loss is None else self.best_loss
        kind = "training" if self.best_loss is None else "held-out"
        steps = ", ".join(map(str, self.best_step))
        values = ", ".join(f"{loss:.3f}" for loss in losses)
        text = f"{kind} NCE loss {values} nats, weights of step {steps}; {self.stopped}"
        text += "" if self.ess is None else f"; {self.ess:.1f} effective importance samples"
        for number, stage in enumerate(self.stages, start=2):
            text += f"\nstage {number}: {stage}" + ("" if any(stage.kept) else "; left out")
        return text
