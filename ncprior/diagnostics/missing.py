r"""The part of the gap that a head misses: a fresh head still finds it.

A calibrated log r can be incomplete: E_q[log r] measures the knowledge of the head. A fresh head log s
is trained on one part of held-out data to improve log r + log s, and measured on another. The NCE
loss that it takes off, divided by 2, is the part of the Jensen-Shannon divergence of q and p that
log r misses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.data.batches import of_size, one_pass
from ncprior.diagnostics.calibration import Mean, losses
from ncprior.heads.inputs import head_input, with_head_inputs
from ncprior.heads.make import make_head
from ncprior.nce import nce_loss
from ncprior.prior import NCPrior
from ncprior.source import Group, contrastive_pairs, device_of, num_rows, posterior_of, visit
from ncprior.utils.batches import shuffle_rows, take_rows, to_device
from ncprior.utils.draws import drawn
from ncprior.utils.gradients import gradients_enabled
from ncprior.utils.precision import at_least_float32

_LEARNING_RATE = 2e-3

_NUM_CHECKS = 8  # at which the best weights are chosen

_FEWEST_ROWS = 8  # of a batch that is split


def missing_jsd(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    *,
    steps: int,
    num_draws: int,
    batch_size: int,
) -> list[Mean]:
    """Part of the Jensen-Shannon divergence that log r misses, in nats, for every group.

    Arguments:
        prior: The prior, with heads in evaluation mode.
        data: Held-out data. Half of the rows train the fresh heads, a quarter chooses the step at
            which they were best, and a quarter measures.
        steps: Optimizer steps.
        num_draws: Least number of draws for the measurement.
        batch_size: Rows per batch, where batches are made here.

    Returns:
        The mean with its standard error; NaN if a group is off or no head can be made for it.
    """
    unknown = [Mean(math.nan, math.nan)] * prior.source.num_groups
    if steps == 0:
        return unknown
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    batches = [
        shuffle_rows(batch, num_rows(batch), generator)
        for batch in of_size(one_pass(data, batch_size), _FEWEST_ROWS)
        if num_rows(batch) >= _FEWEST_ROWS
    ]
    if not batches:
        return unknown
    with gradients_enabled():
        fresh = _Fresh(prior, batches)
        if not fresh.heads:
            return unknown
        fresh.train(steps)
    rows = sum(num_rows(batch) // 4 for batch in batches)
    gains = fresh.gains(_MEASURE, -(-num_draws // rows))
    return [Mean.of(gains[k]) if k in gains else unknown[k] for k in range(len(unknown))]


_TRAIN, _CHOOSE, _MEASURE = slice(0, None, 2), slice(1, None, 4), slice(3, None, 4)


class _Fresh:
    """Fresh heads log s by group, trained so that log r + log s has the least NCE loss.

    Groups that are off, or whose latents no head of ours fits, have none.
    """

    def __init__(self, prior: NCPrior, batches: list[Any]) -> None:
        self.prior, self.batches = prior, batches
        self.heads = _fresh_heads(prior, to_device(batches[0], device_of(prior.source)))

    def train(self, steps: int) -> None:
        """Trains the heads, and keeps for each the weights that were best on the chosen rows."""
        parameters = [p for head in self.heads.values() for p in head.parameters()]
        optimizer = torch.optim.AdamW(parameters, _LEARNING_RATE)
        best = {k: (0.0, _weights(head)) for k, head in self.heads.items()}
        every = -(-steps // _NUM_CHECKS)
        for t, batch in zip(range(1, steps + 1), itertools.cycle(self.batches), strict=False):
            for _, log_r, log_s in self._pairs(batch, _TRAIN, 1):
                log_q, log_p = log_r + log_s
                nce_loss(log_q, log_p).backward()
            optimizer.step()
            optimizer.zero_grad()
            if t % every == 0 or t == steps:
                for k, gains in self.gains(_CHOOSE, 1).items():
                    best[k] = max(
                        best[k], (gains.mean().item(), _weights(self.heads[k])), key=_gain
                    )
        for k, (_, weights) in best.items():
            self.heads[k].load_state_dict(weights)

    @torch.no_grad()
    def gains(self, rows: slice, num_draws: int) -> dict[int, Tensor]:
        """JSD that log s adds to log r by group, in nats, with shape ``(num_draws, rows)``."""
        found: dict[int, list[Tensor]] = {k: [] for k in self.heads}
        for batch in self.batches:
            for k, log_r, log_s in self._pairs(batch, rows, num_draws):
                (log_q, log_p), (more_q, more_p) = log_r, log_r + log_s
                found[k].append((losses(log_q, log_p) - losses(more_q, more_p)) / 2)
        return {k: torch.cat(gains, -1) for k, gains in found.items()}

    def _pairs(
        self,
        batch: Any,  # noqa: ANN401
        rows: slice,
        num_draws: int,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Group, α log r and log s at z ~ q and z ~ p, with shape ``(2, num_draws, B)`` each."""
        x = to_device(take_rows(batch, rows), device_of(self.prior.source))
        pairs = contrastive_pairs(self.prior.source, x, num_draws)
        for k, (z, group) in enumerate(pairs):
            if k in self.heads:
                context = group.context
                with torch.no_grad():
                    log_r = self.prior.strength * self.prior.log_r(k, z, context)
                    h = at_least_float32(head_input(self.prior.source, k, z))
                    c = None if context is None else at_least_float32(context)
                yield k, log_r, self.heads[k](h, c)


@torch.no_grad()
def _fresh_heads(prior: NCPrior, x: Any) -> dict[int, nn.Module]:  # noqa: ANN401
    """One new head for each group that is on and whose latents a head of ours fits."""
    heads: dict[int, nn.Module] = {}

    def make(k: int, group: Group) -> Tensor:
        z = drawn(posterior_of(group))
        if prior.is_on(k):
            try:
                heads[k] = make_head(with_head_inputs(prior.source, k, group, z)).eval()
            except (TypeError, ValueError):  # such as codes without a number of categories
                pass
        return z

    encoding = prior.source.encode(x)
    visit(prior.source, prior.source.start(num_rows(encoding), encoding), make)
    return heads


def _gain(candidate: tuple[float, dict[str, Tensor]]) -> float:
    return candidate[0]


def _weights(head: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in head.state_dict().items()}
