"""One training of heads, with all that a checkpoint holds: what :func:`ncprior.fit` drives."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ncprior.batches import Stream, in_order, own_generators
from ncprior.contrasts import contrasts
from ncprior.loader import Loader
from ncprior.nce import nce_terms
from ncprior.prior import NCPrior
from ncprior.ranks import from_rank, gather, num_ranks, on_first, own_seed, rank, sum_over_ranks
from ncprior.runs import Training, weights_of
from ncprior.source import num_rows
from ncprior.trainer import NCETrainer

__all__ = ["History", "Row"]

_HELD_OUT_DRAWS = 2048  # at least so many draws of z make one held-out loss


class Row(NamedTuple):
    """One line of a history.

    Attributes:
        step: Steps taken so far.
        loss: NCE loss in nats per group, averaged over the steps since the row before.
        held_out: NCE loss in nats per group of the averaged weights on held-out data, or ``None``.
        learning_rate: The learning rate of the last step.
        seconds: Time spent training so far, held-out losses included, in seconds.

    Example:
        >>> Row(100, [1.2], [1.3], 1e-3, 2.0).step
        100
    """

    step: int
    loss: list[float]
    held_out: list[float] | None
    learning_rate: float
    seconds: float


class History(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
        rows: One row every ``eval_every`` steps, and one at the end.
        best_step: Per group, the step whose averaged weights were kept.
        best_loss: Per group, its held-out NCE loss in nats; ``None`` without held-out data.
        best_error: Per group, the standard error of that.
        stopped: Why training ended.
        gated: The groups that training has switched off.
        stages: The histories of further stages; the last may have been left out.
        kept: Of a further stage, per group, whether its head was multiplied in.
        slopes: Per group, what calibration has multiplied log r by.

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
    gated: tuple[int, ...] = ()
    stages: tuple[History, ...] = ()
    kept: tuple[bool, ...] = ()
    slopes: tuple[float, ...] = ()

    def has_learnt(self, least: float = 0.0) -> list[bool]:
        """Tells per group whether its held-out JSD, log 2 - L/2, is above 0 by two errors of L.

        Arguments:
            least: Nats of JSD in place of 0.
        """
        if self.best_loss is None or self.best_error is None:
            return [True] * len(self.best_step)
        pairs = zip(self.best_loss, self.best_error, strict=True)
        return [loss + 2 * error < 2 * (math.log(2) - least) for loss, error in pairs]

    def __str__(self) -> str:
        """Says in one line what was kept, and why training ended."""
        losses = self.rows[-1].loss if self.best_loss is None else self.best_loss
        kind = "training" if self.best_loss is None else "held-out"
        steps = ", ".join(map(str, self.best_step))
        values = ", ".join(f"{loss:.3f}" for loss in losses)
        text = f"{kind} NCE loss {values} nats, weights of step {steps}; {self.stopped}"
        if self.gated:
            text += f"; left at their base: {', '.join(map(str, self.gated))}"
        if self.slopes:
            text += f"; log r times {', '.join(f'{slope:.2f}' for slope in self.slopes)}"
        for number, stage in enumerate(self.stages, start=2):
            text += f"\nstage {number}: {stage}" + ("" if any(stage.kept) else "; left out")
        return text


class Run(Training):
    """The state of one training of heads."""

    def __init__(
        self, prior: NCPrior, trainer: NCETrainer, settings: dict[str, Any], split_seed: int
    ) -> None:
        super().__init__(prior, prior.heads, trainer, settings)
        self.prior, self.trainer, self.split_seed = prior, trainer, split_seed
        self.best: dict[str, Tensor] | None = None
        self.best_loss = [math.inf] * len(prior.heads)
        self.best_error = [math.inf] * len(prior.heads)
        self.best_step = [0] * len(prior.heads)
        self.loss_sum = torch.zeros(len(prior.heads), device=self.device)

    def step(self, batches: Loader) -> None:
        x = self.next_batch(batches)
        if self.stopped is None:
            self.loss_sum += self.trainer.step(x).loss
            self.stepped()

    def record(self, evaluation: HeldOut | None) -> Row:
        """Adds a row to the history; keeps each group's averaged weights where they are best."""
        held_out = None
        if evaluation is not None:
            with self._averaged():
                held_out, errors = evaluation(self.device)
            self._refuse_non_finite(held_out)
            if self.best is None:
                self.best = weights_of(self.prior.heads)
            for k, new in enumerate(held_out):
                if new < self.best_loss[k]:
                    self.best_loss[k], self.best_step[k] = new, self.trainer.steps
                    self.best_error[k] = errors[k]
                    for name in self._names(k):
                        self.best[name].copy_(self.average[name])
        loss = (self.loss_sum / max(1, self.steps_since_row)).tolist()
        self.loss_sum, self.steps_since_row = torch.zeros_like(self.loss_sum), 0
        rate: float = self.trainer.optimizer.param_groups[0]["lr"]
        self.rows.append(Row(self.trainer.steps, loss, held_out, rate, self.elapsed()))
        return self.rows[-1]  # type: ignore[no-any-return]

    def _refuse_non_finite(self, held_out: list[float]) -> None:
        for k, loss in enumerate(held_out):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The held-out NCE loss of group {k} is {loss} at step {self.trainer.steps}. "
                    f"Look for NaN or infinity in the held-out data."
                )

    def decide(
        self, row: Row, patience: int | None, callback: Callable[[Row], Any] | None
    ) -> None:
        last = max(self.best_step)
        limit = math.inf if patience is None else patience * self.settings["eval_every"]
        if callback is not None and on_first(lambda: callback(row) is True):
            self.stopped = f"stopped by the callback at step {self.trainer.steps}"
        elif row.held_out is not None and row.step - last >= limit and self.stopped is None:
            self.stopped = f"no progress on held-out data since step {last}"

    def kept(self) -> Mapping[str, Tensor]:
        """The best weights, or else the averaged."""
        return self.average if self.best is None else self.best

    def collect(self) -> None:
        """Makes every rank's heads what they are on the rank that trains them."""
        kept = (dict(self.prior.heads.state_dict()), self.average, self.best or {})
        owners = [(k, self.trainer.owner(k)) for k in range(len(self.prior.heads))]
        for k, owner in ((k, owner) for k, owner in owners if owner is not None):
            for tensors in kept:
                for name in (name for name in self._names(k) if name in tensors):
                    from_rank(owner, tensors[name])

    def history(self) -> History:
        stopped = str(self.stopped)
        if self.best is None:
            steps = [self.trainer.steps] * len(self.prior.heads)
            return History(self.rows, steps, None, None, stopped)
        return History(self.rows, self.best_step, self.best_loss, self.best_error, stopped)

    def state(self) -> dict[str, Any]:
        """Adds the best weights so far."""
        return {
            **super().state(),
            "split_seed": self.split_seed,
            "best": self.best,
            "best_loss": self.best_loss,
            "best_error": self.best_error,
            "best_step": self.best_step,
            "loss_sum": self.loss_sum,
        }

    def restore(self, saved: dict[str, Any], stream: Stream) -> None:
        """Takes the best weights up too."""
        super().restore(saved, stream)
        if saved["best"] is not None:
            self.best = {name: t.to(self.device) for name, t in saved["best"].items()}
        self.best_loss, self.best_step = saved["best_loss"], saved["best_step"]
        self.best_error = saved["best_error"]
        self.rows = [Row(*row) for row in saved["rows"]]
        self.loss_sum.copy_(saved["loss_sum"])

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, of each head from the rank that trains it."""
        state = super().optimizer_state()
        if not self.trainer.group_parallel:
            return state
        by_rank = gather(state["state"])
        heads = enumerate(self.prior.heads)
        owners = [self.trainer.owner(k) or 0 for k, head in heads for _ in head.parameters()]
        merged = {i: by_rank[owner][i] for i, owner in enumerate(owners) if i in by_rank[owner]}
        return {**state, "state": merged}

    def _names(self, k: int) -> list[str]:
        return [name for name in self.average if name.startswith(f"{k}.")]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Swaps the averaged weights in, and the heads into evaluation mode."""
        self._swap()
        self.prior.eval()
        try:
            yield
        finally:
            self._swap()
            self.prior.train()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self.prior.heads.state_dict().items():
            trained = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(trained)


class HeldOut:
    """The held-out NCE loss, with the same draws of z every time, and its standard error.

    Ranks share the rows; or, where ``groups`` are this rank's own, each goes through all rows for
    them.
    """

    def __init__(
        self,
        data: Any,  # noqa: ANN401
        prior: NCPrior,
        batch_size: int,
        seed: int,
        groups: Collection[int] | None = None,
    ) -> None:
        self.batches, self.prior = in_order(data, batch_size), prior
        self.seed = seed
        self.groups = groups
        self.own = [(g, g.get_state()) for g in own_generators(self.batches)]

    @torch.no_grad()
    def __call__(self, device: torch.device) -> tuple[list[float], list[float]]:
        passes: list[Tensor] = []
        rows = drawn = 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(own_seed(self.seed, rank()))
            while drawn < _HELD_OUT_DRAWS:
                for generator, state in self.own:  # the same rows again, in the same order
                    generator.set_state(state)
                parts = [(num_rows(b), self._losses(b, device)) for b in self.batches]
                if not parts:
                    raise ValueError("The held-out data has no batches.")
                rows = sum(count for count, _ in parts)
                passes.append(torch.cat([losses for _, losses in parts], dim=1))
                drawn += rows
        # Further draws of a row say less of other rows than further rows would.
        losses = torch.stack(passes).mean(0)
        mean = sum_over_ranks(losses.sum(1)) / rows
        spread = sum_over_ranks(self._own_groups(losses - mean[:, None]).square().sum(1))
        return mean.tolist(), (spread / (rows * max(1, rows - 1))).sqrt().tolist()

    def _losses(self, batch: Any, device: torch.device) -> Tensor:  # noqa: ANN401
        """The losses of this rank's share of the rows of a batch, (K, n)."""
        share = slice(rank(), None, num_ranks()) if self.groups is None else slice(None)
        x = tree_map_only(Tensor, lambda t: t[share].to(device, non_blocking=True), batch)
        count = num_rows(x)
        losses = torch.zeros(len(self.prior.heads), count, dtype=torch.float64)
        if count > 0:
            for k, (z, context) in enumerate(contrasts(self.prior.source, x)):
                if self.groups is None or k in self.groups:
                    log_r = self.prior.log_r(k, z, context)[:, 0]
                    losses[k] = sum(nce_terms(log_r[0], log_r[1]))
        return losses

    def _own_groups(self, losses: Tensor) -> Tensor:
        """Losses of groups that other ranks measure are 0 here."""
        if self.groups is not None:
            others = [k for k in range(len(losses)) if k not in self.groups]
            losses[others] = 0
        return losses
