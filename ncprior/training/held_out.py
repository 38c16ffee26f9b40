"""Held-out NCE losses of every group."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ncprior.data.batches import one_pass
from ncprior.data.generators import own_generators, own_generators_restored
from ncprior.data.rows import RowData, is_map_style
from ncprior.nce import nce_terms
from ncprior.prior import NCPrior
from ncprior.source import LatentSource, WrappedSource, contrastive_pairs, num_rows
from ncprior.training.stages import Stored
from ncprior.utils.batches import take_rows, to_device
from ncprior.utils.distributed import (
    num_ranks,
    own_seed,
    rank,
    sum_over_ranks,
)
from ncprior.utils.random_state import seeded

_HELD_OUT_DRAWS = 2048  # fewest draws of z per held-out loss


class HeldOut:
    """Held-out NCE losses of every group and row, with the same z at every call.

    Every row is encoded once; the fewer rows, the more z_k are drawn for each of them.

    Arguments:
        data: The held-out data.
        prior: The prior whose heads are measured.
        batch_size: Rows per batch, where batches are made here.
        seed: Seed of the draws of z, and of data that draw at random.
        groups: The groups that this rank measures on all rows; ``None`` distributes the rows over
            the ranks, and each of them measures all groups.
    """

    def __init__(
        self,
        data: Any,  # noqa: ANN401
        prior: NCPrior,
        batch_size: int,
        seed: int,
        groups: Collection[int] | None = None,
    ) -> None:
        self.batches, self.prior = one_pass(data, batch_size), prior
        self.seed, self.groups = seed, groups
        self.own = [(g, g.get_state()) for g in own_generators(self.batches)]
        has_rows = isinstance(data, Tensor | RowData) or is_map_style(data)
        self.rows = len(data) if has_rows else 0  # 0: not counted yet
        self.stored = _stored(prior.source)  # draws of the base that all rows share
        self.of_base = torch.zeros(3, dtype=torch.float64)  # number, sum and squares of losses

    @torch.no_grad()
    def __call__(self, device: torch.device) -> Tensor:
        """Returns the losses in nats, with shape ``(K, N)``, on the CPU and alike on all ranks."""
        draws = math.ceil(_HELD_OUT_DRAWS / self.count())
        self.of_base.zero_()
        with self._seeded():
            parts = [self._losses(batch, device, draws) for batch in self.batches]
        own = torch.cat([part for part, _ in parts], dim=2).cpu().double().mean(1)  # one wait
        losses = torch.zeros(len(own), sum(count for _, count in parts), dtype=torch.float64)
        first = 0
        for part, count in parts:
            mine, own = own.split([part.shape[2], own.shape[1] - part.shape[2]], dim=1)
            losses[:, first : first + count][:, self._own_rows] = mine
            first += count
        return sum_over_ranks(losses)

    def errors(self, losses: Tensor) -> list[float]:
        """Returns the standard errors of the means of losses, the result of the last call.

        Where rows share stored draws of the base, these are few, too: their error is added.
        """
        errors = mean_and_error(losses)[1]
        if math.isinf(self.stored):
            return errors
        count, total, squares = sum_over_ranks(self.of_base).tolist()
        variance = max(0.0, squares / count - (total / count) ** 2)
        return [math.hypot(error, math.sqrt(variance / self.stored)) for error in errors]

    def count(self) -> int:
        """Returns the number N of rows, after a pass over data without a length."""
        if self.rows == 0:
            with self._seeded():
                self.rows = sum(num_rows(batch) for batch in self.batches)
        return self.rows

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Context in which the same rows come in the same order, with the same noise."""
        with own_generators_restored(self.batches), seeded(own_seed(self.seed, rank())):
            for generator, state in self.own:  # training data may have the same generators
                generator.set_state(state)
            yield

    @property
    def _own_rows(self) -> slice:
        """The rows of every batch that this rank measures."""
        return slice(rank(), None, num_ranks()) if self.groups is None else slice(None)

    def _losses(
        self,
        batch: Any,  # noqa: ANN401
        device: torch.device,
        draws: int,
    ) -> tuple[Tensor, int]:
        """Losses of this rank's rows of a batch, ``(K, draws, n)``, and the batch's rows.

        The losses stay on the device; those of groups that other ranks measure are 0.
        """
        x = to_device(take_rows(batch, self._own_rows), device)
        losses = torch.zeros(len(self.prior.heads), draws, num_rows(x), device=device)
        if num_rows(x) > 0:
            for k, (z, group) in enumerate(contrastive_pairs(self.prior.source, x, draws)):
                if self.groups is None or k in self.groups:
                    log_r = self.prior.log_r(k, z, group.context)
                    loss_q, loss_p = nce_terms(log_r[0], log_r[1])
                    if losses.dtype != loss_q.dtype:  # of heads in float64
                        losses = losses.to(loss_q.dtype)
                    losses[k] = loss_q + loss_p
                    if math.isfinite(self.stored):
                        p = loss_p.cpu().double()
                        self.of_base += torch.stack(
                            [p.new_tensor(p.numel()), p.sum(), p.square().sum()]
                        )
        return losses, num_rows(batch)


def _stored(source: LatentSource[Any, Any]) -> float:
    """Number of draws that stand for the base of a single group; infinity for the base itself."""
    bases = getattr(source, "bases", None) or ()
    for base in bases:
        if isinstance(base, Stored):
            return len(base.z)
    return _stored(source.source) if isinstance(source, WrappedSource) else math.inf


def mean_and_error(losses: Tensor) -> tuple[list[float], list[float]]:
    """Returns the means over rows and their standard errors, one per group; ∞ for a single row.

    Further draws for the same rows do not lower the standard error, as it is over rows.

    Arguments:
        losses: Losses or differences of losses, with shape ``(K, N)``.
    """
    rows = losses.shape[1]
    mean = losses.sum(1) / rows
    if rows == 1:
        return mean.tolist(), [math.inf] * len(losses)
    spread = (losses - mean[:, None]).square().sum(1)
    return mean.tolist(), (spread / (rows * (rows - 1))).sqrt().tolist()
