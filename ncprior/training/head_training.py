"""Training of the heads of one stage, with its part of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ncprior.data.stream import Stream
from ncprior.heads.product import factors
from ncprior.prior import NCPrior
from ncprior.trainer import NCETrainer
from ncprior.training.checkpoints import (
    Validators,
    are_numbers,
    is_finite,
    is_like,
    is_step,
    is_table,
)
from ncprior.training.held_out import HeldOut, mean_and_error
from ncprior.training.history import History, Row, to_rows
from ncprior.training.resumable import BY_CALLBACK, ResumableTraining, is_true, weights_of
from ncprior.training.schedule import Schedule, decay_steps
from ncprior.training.settings import FitSettings, TrainingTerms
from ncprior.utils.distributed import from_rank, gather, on_rank_zero
from ncprior.utils.states import tensors_of


class HeadTraining(ResumableTraining):
    """Training of heads; the head of each group keeps its own best weights.

    Arguments:
        prior: The prior whose heads are trained.
        trainer: The trainer of these heads.
        terms: The terms of the training.
        name: Name of the heads, for the progress bar.
        split_seed: Seed of the random split into training and held-out rows.
        begun: Weights of the heads under which posterior samples are weighted, or ``None``.
        held_out: The held-out losses, or ``None``.
        patience: Evaluations without improvement of any group before the decay, or ``None``.
        max_seconds: Seconds for this training, or ``None``.
        callback: Called with each new row; stops the training by returning True.
    """

    def __init__(
        self,
        prior: NCPrior,
        trainer: NCETrainer,
        terms: TrainingTerms[FitSettings],
        name: str,
        *,
        split_seed: int,
        begun: Mapping[str, Tensor] | None,
        held_out: HeldOut | None,
        patience: int | None,
        max_seconds: float | None,
        callback: Callable[[Row], Any] | None,
    ) -> None:
        super().__init__(prior, prior.heads, trainer, terms, name)
        self.prior, self.trainer, self.split_seed = prior, trainer, split_seed
        self.begun_with = begun
        self.held_out, self.max_seconds, self.callback = held_out, max_seconds, callback
        wait = None if patience is None else patience * terms.eval_every
        self.schedule = Schedule(
            terms.learning_rate, terms.steps, max_seconds=max_seconds, wait=wait
        )
        self.evaluation_seconds = 0.0  # of the last evaluation
        # With held-out data, the best weights begin with those before the first step.
        self.initial = weights_of(prior.heads) if held_out is None else self.average
        self.best: dict[str, Tensor] | None = None
        self.best_loss = [math.inf] * len(prior.heads)
        self.best_error = [math.inf] * len(prior.heads)
        self.best_step = [0] * len(prior.heads)
        self.loss_sum = torch.zeros(len(prior.heads), device=self.device)
        self.has_stepped = False

    def start(self) -> None:
        """Measures the weights before the first step: the first candidate for the best ones."""
        if self.held_out is not None:
            self.schedule.after_evaluation(0, self._measure(self.held_out))

    def step(self, x: Any) -> None:  # noqa: ANN401
        """Takes one step on the NCE loss; the first one must leave the VAE as it was.

        Raises:
            RuntimeError: If it changes the VAE.
        """
        self.loss_sum += self.trainer.step(x).loss
        if not self.has_stepped:
            self.has_stepped = True
            if self.prior.source.fingerprint() != self.terms.facts["VAE"]:
                raise RuntimeError(
                    "The VAE has changed during the first step, which itself does not change it. "
                    "Look for an encoder that writes to parameters or buffers, such as a counter."
                )

    @property
    def last(self) -> int | None:
        """Number of all steps, as far as it is decided."""
        return self.schedule.last

    def rate(self, taken: int) -> float:
        """Returns the learning rate of the next step: warm-up, stable phase or decay."""
        return self.schedule.rate(taken)

    def ending(self, taken: int) -> str | None:
        """Returns the reason why training ends after so many steps; ``None`` if it goes on."""
        if self.max_seconds is None:
            return self.schedule.after_step(taken)
        late, over = on_rank_zero(self._time)
        return self.schedule.after_step(taken, late=late, over=over)

    def _time(self) -> tuple[bool, bool]:
        """Whether the time is just enough for a decay, and whether it is over.

        Time for a last evaluation is set aside.
        """
        limit, now = self.max_seconds or math.inf, self.elapsed()
        seconds, steps = self.begun
        taken = self.trainer.steps
        decay = decay_steps(taken) * (now - seconds) / (taken - steps)
        now += self.evaluation_seconds
        return now + decay >= limit, now >= limit

    def evaluate(self) -> str:
        """Adds a row; keeps the averaged weights of every group that improves."""
        losses = None if self.held_out is None else self._measure(self.held_out)
        loss = (self.loss_sum / max(1, self.steps_since_row)).tolist()
        self.loss_sum, self.steps_since_row = torch.zeros_like(self.loss_sum), 0
        rate: float = self.trainer.optimizer.param_groups[0]["lr"]
        means = None if losses is None else mean_and_error(losses)[0]
        stage = self.terms.facts["stage"]
        row = Row(self.trainer.steps, loss, means, rate, self.elapsed(), stage)
        self.rows.append(row)
        if losses is not None:
            reason = self.schedule.after_evaluation(row.step, losses)
            self.stopped = self.stopped or reason
        self._call_back(row)
        return f"{self.schedule.phase}, {row.summary()}"

    def _measure(self, held_out: HeldOut) -> Tensor:
        """Returns the held-out losses of the averaged weights; keeps weights that improve."""
        begun = self.elapsed()
        with self._averaged():
            losses = held_out(self.device)
        self.evaluation_seconds = self.elapsed() - begun
        means, errors = mean_and_error(losses)[0], held_out.errors(losses)
        self._require_finite(means)
        if self.best is None:
            self.best = weights_of(self.prior.heads)
        for k, new in enumerate(means):
            if new < self.best_loss[k]:
                self.best_loss[k], self.best_step[k] = new, self.trainer.steps
                self.best_error[k] = errors[k]
                for name in self._names(k):
                    self.best[name].copy_(self.average[name])
        return losses

    def _call_back(self, row: Row) -> None:
        """Stops the training if the callback returns True."""
        callback = self.callback
        by_callback = callback is not None and on_rank_zero(lambda: is_true(callback(row)))
        if by_callback and self.stopped is None:
            self.stopped = f"{BY_CALLBACK} at step {self.trainer.steps}"

    def _require_finite(self, held_out: list[float]) -> None:
        for k, loss in enumerate(held_out):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The held-out NCE loss of group {k} is {loss} at step {self.trainer.steps}. "
                    f"Look for NaN or infinity in the held-out data."
                )

    def kept(self) -> Mapping[str, Tensor]:
        """Returns the best weights on held-out data; without such data, the averaged weights.

        Averaged weights that are not finite are replaced by those before the first step.
        """
        if self.best is not None:
            return self.best
        finite = all(bool(torch.isfinite(t).all()) for t in self.average.values())
        return self.average if finite else self.initial

    def collect(self) -> None:
        """Copies to every rank the heads of the rank that trains them."""
        kept = (dict(self.prior.heads.state_dict()), self.average, self.best or {})
        owners = [(k, self.trainer.owner(k)) for k in range(len(self.prior.heads))]
        for k, owner in ((k, owner) for k, owner in owners if owner is not None):
            for tensors in kept:
                for name in (name for name in self._names(k) if name in tensors):
                    from_rank(owner, tensors[name])

    def history(self) -> History:
        """Returns the history of the training so far."""
        stopped = str(self.stopped)
        if self.best is None:
            steps = [self.trainer.steps] * len(self.prior.heads)
            return History(self.rows, steps, None, None, stopped)
        return History(self.rows, self.best_step, self.best_loss, self.best_error, stopped)

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint, with the best weights so far; a stop by the callback is none."""
        return {
            **super().state(),
            "stopped": None if str(self.stopped).startswith(BY_CALLBACK) else self.stopped,
            "split_seed": self.split_seed,
            "factors": self._factors(),
            "begun": self.begun_with,
            "best": self.best,
            "best_loss": self.best_loss,
            "best_error": self.best_error,
            "best_step": self.best_step,
            "loss_sum": self.loss_sum,
            **self.schedule.state(),
        }

    def validators(self, saved: Mapping[str, Any], stream: Stream) -> Validators:
        """Returns a check of each entry of a checkpoint."""
        k, last = len(self.prior.heads), self.most_steps(saved)
        rows = None if self.held_out is None else (k, self.held_out.count())
        return {
            **super().validators(saved, stream),
            "rows": lambda value: is_table(value, self.row_width(), whole=(0, -1)),
            "begun": lambda v: is_like(v, self.begun_with) and (v is None or is_finite(v)),
            "best": lambda v: v is None or (is_like(v, self.average) and is_finite(v)),
            "factors": lambda v: are_numbers(v, k, (int,)) and v == self._factors(),
            "best_loss": lambda v: are_numbers(v, k) and all(loss > -math.inf for loss in v),
            "best_error": lambda v: are_numbers(v, k) and all(error >= 0 for error in v),
            "best_step": lambda v: are_numbers(v, k, (int,)) and all(is_step(s, last) for s in v),
            "loss_sum": lambda value: is_like(value, self.loss_sum),
            **self.schedule.validators(rows, last),
        }

    def row_width(self) -> int:
        """Returns how many numbers a row of the history has."""
        losses = 1 if self.held_out is None else 2
        return len(Row._fields) - 2 + losses * len(self.prior.heads)

    def most_steps(self, saved: Mapping[str, Any]) -> int:
        """Returns the largest number of steps that a checkpoint with so many rows has taken."""
        rows = saved.get("rows")
        count = len(rows) + 1 if isinstance(rows, Tensor) and rows.ndim else 0
        most = count * self.terms.eval_every
        return most if self.terms.steps is None else min(most, self.terms.steps)

    def restore(self, saved: dict[str, Any], stream: Stream) -> None:
        """Resumes from a checkpoint, with the best weights so far."""
        super().restore(saved, stream)
        if saved["best"] is not None:
            self.best = {name: t.to(self.device) for name, t in saved["best"].items()}
        self.best_loss, self.best_step = saved["best_loss"], saved["best_step"]
        self.best_error = saved["best_error"]
        self.rows = to_rows(saved["rows"], len(self.prior.heads))
        self.loss_sum.copy_(saved["loss_sum"])
        self.schedule.restore(saved)

    def optimizer_state(self) -> dict[str, Any]:
        """Returns the state of the optimizer, for each head from the rank that trains it."""
        state = super().optimizer_state()
        if not self.trainer.group_parallel:
            return state
        by_rank = gather(state["state"])
        heads = enumerate(self.prior.heads)
        owners = [self.trainer.owner(k) or 0 for k, head in heads for _ in head.parameters()]
        merged = {i: by_rank[owner][i] for i, owner in enumerate(owners) if i in by_rank[owner]}
        return {**state, "state": merged}

    def _factors(self) -> list[int]:
        return [len(factors(head)) for head in self.prior.heads]

    def _names(self, k: int) -> list[str]:
        return [name for name in self.average if name.startswith(f"{k}.")]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Context with averaged weights and evaluation mode; both are restored at the end."""
        self._swap()
        self.prior.eval()
        try:
            yield
        finally:
            self._swap()
            self.prior.train()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in tensors_of(self.prior.heads).items():
            trained = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(trained)
