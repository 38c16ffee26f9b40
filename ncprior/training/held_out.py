"""Held-out NCE losses of every group."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ncprior.data.stream import one_pass, own_generators
from ncprior.nce import nce_terms
from ncprior.prior import NCPrior
from ncprior.source import contrastive_pairs, num_rows
from ncprior.utils.batches import map_tensors, to_device
from ncprior.utils.distributed import (
    num_ranks,
    own_seed,
    rank,
    sum_over_ranks,
)

_HELD_OUT_DRAWS = 2048  # fewest draws of z per held-out loss


class HeldOut:
    """Held-out NCE loss of every group and its standard error, with the same z at every call.

    Arguments:
        data: The held-out data.
        prior: The prior whose heads are measured.
        batch_size: Rows per batch, where batches are made here.
        seed: Seed of the draws of z.
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
        self.seed = seed
        self.groups = groups
        self.own = [(g, g.get_state()) for g in own_generators(self.batches)]

    @torch.no_grad()
    def __call__(self, device: torch.device) -> tuple[list[float], list[float]]:
        """Returns the losses and their standard errors, in nats, one per group.

        Raises:
            ValueError: If the held-out data has no batches.
        """
        passes: list[Tensor] = []
        rows = drawn = 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(own_seed(self.seed, rank()))
            while drawn < _HELD_OUT_DRAWS:
                for generator, state in self.own:  # the same rows again, in the same order
                    generator.set_state(state)
                parts = [(num_rows(b), self._losses(b, device)) for b in self.batches]
                if not parts:
                    raise ValueError("The held-out data has no batches. Pass at least one row.")
                rows = sum(count for count, _ in parts)
                passes.append(torch.cat([losses for _, losses in parts], dim=1))
                drawn += rows
        # The standard error is over rows: further draws for the same rows do not lower it.
        losses = torch.stack(passes).mean(0)
        mean = sum_over_ranks(losses.sum(1)) / rows
        spread = sum_over_ranks(self._own_groups(losses - mean[:, None]).square().sum(1))
        return mean.tolist(), (spread / (rows * max(1, rows - 1))).sqrt().tolist()

    def _losses(self, batch: Any, device: torch.device) -> Tensor:  # noqa: ANN401
        """Losses of the rows of a batch that this rank measures, ``(K, n)``."""
        share = slice(rank(), None, num_ranks()) if self.groups is None else slice(None)
        x = to_device(map_tensors(lambda t: t[share], batch), device)
        count = num_rows(x)
        losses = torch.zeros(len(self.prior.heads), count, dtype=torch.float64)
        if count > 0:
            for k, (z, context) in enumerate(contrastive_pairs(self.prior.source, x)):
                if self.groups is None or k in self.groups:
                    log_r = self.prior.log_r(k, z, context)[:, 0]
                    losses[k] = sum(nce_terms(log_r[0], log_r[1]))
        return losses

    def _own_groups(self, losses: Tensor) -> Tensor:
        """Losses with those of groups that other ranks measure set to 0."""
        if self.groups is not None:
            others = [k for k in range(len(losses)) if k not in self.groups]
            losses[others] = 0
        return losses
