"""One training of heads, with all that a checkpoint holds: what :func:`ncprior.fit` drives."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ncprior.batches import (
    Loader,
    Stream,
    in_order,
    own_generators,
    random_state,
    set_random_state,
)
from ncprior.files import load_tensors, pack, save_tensors, unpack
from ncprior.prior import NCPrior, group_losses
from ncprior.ranks import from_rank, gather, num_ranks, on_first, rank, sum_over_ranks
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
    slopes: tuple[float, ...] = ()

    @property
    def learnt(self) -> list[bool]:
        """Tells per group whether its loss is below 2 log 2, that of no head, by two errors."""
        if self.best_loss is None or self.best_error is None:
            return [True] * len(self.best_step)
        pairs = zip(self.best_loss, self.best_error, strict=True)
        return [loss + 2 * error < 2 * math.log(2) for loss, error in pairs]

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
            text += f"\nstage {number}: {stage}" + ("" if any(stage.learnt) else "; left out")
        return text


class Run:
    """The state of one training: all that a checkpoint holds."""

    def __init__(
        self, prior: NCPrior, trainer: NCETrainer, settings: dict[str, Any], split_seed: int
    ) -> None:
        self.prior, self.trainer = prior, trainer
        self.settings, self.split_seed = settings, split_seed
        self.device = next((p.device for p in prior.parameters()), torch.device("cpu"))
        self.average = _copy(prior.heads)
        self.best: dict[str, Tensor] | None = None
        self.best_loss = [math.inf] * len(prior.heads)
        self.best_error = [math.inf] * len(prior.heads)
        self.best_step = [0] * len(prior.heads)
        self.rows: list[Row] = []
        self.loss_sum = torch.zeros(len(prior.heads), device=self.device)
        self.loss_steps = 0
        self.stopped: str | None = None
        self.seconds, self.since = 0.0, time.perf_counter()
        self.own = set(trainer.groups)

    def step(self, batches: Loader) -> None:
        total = self.settings["steps"]
        progress = self.trainer.steps / total
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = 0.5 * self.settings["learning_rate"] * (1 + math.cos(math.pi * progress))
        try:
            x = next(batches)
        except StopIteration:
            self.stopped = f"data used up after {self.trainer.steps} of {total} steps"
            return
        self.loss_sum += self.trainer.step(x).loss
        self.loss_steps += 1
        t = self.trainer.steps
        self._update_average(min(self.settings["ema_decay"], (1 + t) / (10 + t)))
        if t == total:
            self.stopped = f"all {total} steps taken"

    def record(self, evaluation: HeldOut | None) -> Row:
        """Adds a row to the history; keeps each group's averaged weights where they are best."""
        held_out = None
        if evaluation is not None:
            with self._averaged():
                held_out, errors = evaluation(self.device, self.own)
            self._refuse_non_finite(held_out)
            if self.best is None:
                self.best = _copy(self.prior.heads)
            for k, new in enumerate(held_out):
                if new < self.best_loss[k]:
                    self.best_loss[k], self.best_step[k] = new, self.trainer.steps
                    self.best_error[k] = errors[k]
                    for name in self._names(k):
                        self.best[name].copy_(self.average[name])
        self.seconds, self.since = self._elapsed(), time.perf_counter()
        loss = (self.loss_sum / max(1, self.loss_steps)).tolist()
        self.loss_sum, self.loss_steps = torch.zeros_like(self.loss_sum), 0
        rate: float = self.trainer.optimizer.param_groups[0]["lr"]
        self.rows.append(Row(self.trainer.steps, loss, held_out, rate, self.seconds))
        return self.rows[-1]

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

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode; on leaving, however, the kept weights: the best, or else the averaged."""
        self.prior.train()
        try:
            yield
        finally:
            kept = self.average if self.best is None else self.best
            for name, tensor in self.prior.heads.state_dict().items():
                tensor.copy_(kept[name])
            self.trainer.optimizer.zero_grad()
            self.prior.eval()

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

    def save(self, path: str | os.PathLike[str], batches: Loader) -> None:
        self.collect()
        optimizer, generators = self._optimizer_state(), gather(random_state())
        if rank() > 0:
            return
        tree, tensors = pack(
            {
                "settings": self.settings,
                "split_seed": self.split_seed,
                "steps": self.trainer.steps,
                "heads": dict(self.prior.heads.state_dict()),
                "average": self.average,
                "best": self.best,
                "best_loss": self.best_loss,
                "best_error": self.best_error,
                "best_step": self.best_step,
                "optimizer": optimizer,
                "rows": [tuple(row) for row in self.rows],
                "loss_sum": self.loss_sum,
                "loss_steps": self.loss_steps,
                "stopped": self.stopped,
                "seconds": self._elapsed(),
                "stream": batches.state(),
                "generators": generators,
            }
        )
        save_tensors(path, tensors, {"kind": "checkpoint", "state": tree})

    def restore(self, saved: dict[str, Any], stream: Stream) -> None:
        for name, now in self.settings.items():
            if saved["settings"].get(name) != now:
                raise ValueError(
                    f"The checkpoint belongs to a training with {name}="
                    f"{saved['settings'].get(name)}; got {name}={now}. Pass the same data and "
                    f"settings, or another checkpoint file."
                )
        if _shapes(self.prior.heads.state_dict()) != _shapes(saved["heads"]):
            raise ValueError(
                "The checkpoint holds heads of other shapes. Build the prior as it was, or pass "
                "another checkpoint file."
            )
        self.prior.heads.load_state_dict(saved["heads"])
        for name, tensor in self.average.items():
            tensor.copy_(saved["average"][name])
        if saved["best"] is not None:
            self.best = {name: t.to(self.device) for name, t in saved["best"].items()}
        self.best_loss, self.best_step = saved["best_loss"], saved["best_step"]
        self.best_error = saved["best_error"]
        self.trainer.optimizer.load_state_dict(saved["optimizer"])
        self.trainer.steps = saved["steps"]
        self.rows = [Row(*row) for row in saved["rows"]]
        self.loss_sum.copy_(saved["loss_sum"])
        self.loss_steps = saved["loss_steps"]
        self.stopped = saved["stopped"]
        self.seconds = saved["seconds"]
        if self.stopped is None:
            stream.restore(saved["stream"])
        set_random_state(saved["generators"][rank()])

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, of each head from the rank that trains it."""
        state: dict[str, Any] = self.trainer.optimizer.state_dict()
        if not self.trainer.group_parallel:
            return state
        by_rank = gather(state["state"])
        heads = enumerate(self.prior.heads)
        owners = [self.trainer.owner(k) or 0 for k, head in heads for _ in head.parameters()]
        merged = {i: by_rank[owner][i] for i, owner in enumerate(owners) if i in by_rank[owner]}
        return {**state, "state": merged}

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.since

    def _names(self, k: int) -> list[str]:
        return [name for name in self.average if name.startswith(f"{k}.")]

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        for name, tensor in self.prior.heads.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)

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
    """The held-out NCE loss, with the same draws of z every time, and its standard error."""

    def __init__(
        self,
        data: Any,  # noqa: ANN401
        prior: NCPrior,
        batch_size: int,
        seed: int,
    ) -> None:
        self.batches, self.prior = in_order(data, batch_size), prior
        self.seed = seed
        self.own = [(g, g.get_state()) for g in own_generators(self.batches)]

    @torch.no_grad()
    def __call__(self, device: torch.device, own: set[int]) -> tuple[list[float], list[float]]:
        """The losses; where a rank's own are not all, it goes through all rows for them."""
        losses: list[Tensor] = []
        rows: list[int] = []
        ranks = num_ranks() if len(own) == len(self.prior.heads) else 1
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed + rank())
            for generator, state in self.own:
                generator.set_state(state)
            while sum(rows) < _HELD_OUT_DRAWS:
                before = len(rows)
                for batch in self.batches:
                    losses.append(self._sum(batch, device, own, ranks))
                    rows.append(num_rows(batch))
                if len(rows) == before:
                    raise ValueError("The held-out data has no batches.")
        weight = torch.tensor(rows, dtype=torch.float64) / sum(rows)
        loss = sum_over_ranks(torch.stack(losses)) / torch.tensor(rows)[:, None]
        mean = weight @ loss
        # Batches of n rows scatter around the mean by a variance in proportion to 1/n.
        spread = weight @ (loss - mean).square() / max(1, len(rows) - 1)
        return mean.tolist(), spread.sqrt().tolist()

    def _sum(self, batch: Any, device: torch.device, own: set[int], ranks: int) -> Tensor:  # noqa: ANN401
        """The losses of this rank's share of a batch, times its rows, (K,)."""
        share = slice(rank() % ranks, None, ranks)
        x = tree_map_only(Tensor, lambda t: t[share].to(device, non_blocking=True), batch)
        count = num_rows(x)
        if count == 0:
            return torch.zeros(len(self.prior.heads), dtype=torch.float64)
        losses = group_losses(self.prior, x, 1.0, 1, groups=own)
        return count * torch.stack(list(losses)).to("cpu", torch.float64)


def load(path: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    if path is None or not Path(path).exists():
        return None
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "checkpoint":
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of fit. Pass another file.")
    state: dict[str, Any] = unpack(metadata["state"], tensors)
    return state


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _copy(heads: nn.ModuleList) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in heads.state_dict().items()}
