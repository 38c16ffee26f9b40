r"""The part of the gap that a head misses: a fresh head still finds it.

A calibrated log r can be incomplete: E_q[log r] measures the knowledge of the head. A fresh head log s
is trained on one part of held-out data to improve log r + log s, and measured on another. The NCE
loss that it takes off, divided by 2, is the part of the Jensen-Shannon divergence of q and p that
log r misses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils._pytree import tree_map_only

from ncprior.data.stream import one_pass
from ncprior.diagnostics.calibration import Mean
from ncprior.diagnostics.walks import scaled_log_r, walk_posterior
from ncprior.heads.inputs import head_input, with_head_inputs
from ncprior.heads.make import make_head
from ncprior.nce import nce_loss
from ncprior.prior import NCPrior
from ncprior.source import Group, device_of, num_rows
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
    device = device_of(prior.source)
    batches = [b for b in one_pass(data, batch_size, device) if num_rows(b) >= _FEWEST_ROWS]
    heads: list[nn.Module | None] = [None] * prior.source.num_groups
    if batches and steps > 0:
        heads = _fresh_heads(prior, prior.source.encode(batches[0]))
    if not any(heads):
        return [Mean(math.nan, math.nan)] * prior.source.num_groups
    fresh = _Fresh(prior, heads, batches)
    fresh.train(steps)
    rows = sum(num_rows(batch) // 4 for batch in batches)
    gains = torch.cat([fresh.gains(_MEASURE) for _ in range(max(1, -(-num_draws // rows)))], 0)
    return [Mean.of(values) for values in gains.unbind(1)]


_TRAIN, _CHOOSE, _MEASURE = slice(0, None, 2), slice(1, None, 4), slice(3, None, 4)


class _Fresh:
    """Fresh heads log s, trained so that log r + log s has the least NCE loss."""

    def __init__(self, prior: NCPrior, heads: list[nn.Module | None], batches: list[Any]) -> None:
        self.prior, self.heads, self.batches = prior, heads, batches
        self.parameters = [p for head in heads if head is not None for p in head.parameters()]

    def train(self, steps: int) -> None:
        """Trains the heads, and keeps for each the weights that were best on the chosen rows."""
        optimizer = torch.optim.AdamW(self.parameters, _LEARNING_RATE)
        best = [(0.0, None if head is None else _weights(head)) for head in self.heads]
        every = -(-steps // _NUM_CHECKS)
        for t, batch in zip(range(1, steps + 1), itertools.cycle(self.batches), strict=False):
            self._walk(batch, _TRAIN, self._descend)
            optimizer.step()
            optimizer.zero_grad()
            if t % every == 0 or t == steps:
                now = self.gains(_CHOOSE).mean((0, 2)).tolist()
                for k, head in enumerate(self.heads):
                    if head is not None and now[k] > best[k][0]:
                        best[k] = (now[k], _weights(head))
        for head, (_, weights) in zip(self.heads, best, strict=True):
            if head is not None and weights is not None:
                head.load_state_dict(weights)

    def gains(self, rows: slice) -> Tensor:
        """JSD that log s adds to log r, in nats, with shape ``(1, K, rows)``."""
        return torch.cat([self._walk(batch, rows, self._gain) for batch in self.batches], -1)[None]

    def _walk(self, batch: Any, rows: slice, measure: Callable[..., Tensor]) -> Tensor:  # noqa: ANN401
        encoding = self.prior.source.encode(batch)
        part = tree_map_only(Tensor, lambda t: t[rows] if t.ndim else t, encoding)
        return walk_posterior(self.prior, part, measure)

    def _descend(self, prior: NCPrior, k: int, group: Group, z: Tensor) -> Tensor:
        with torch.enable_grad():
            log_r, log_s = self._pair(prior, k, group, z)
            log_q, log_p = log_r + log_s
            if log_s.requires_grad:  # not where no head fits
                nce_loss(log_q, log_p).backward()
        return torch.zeros(len(z))

    def _gain(self, prior: NCPrior, k: int, group: Group, z: Tensor) -> Tensor:
        log_r, log_s = self._pair(prior, k, group, z)
        return (_loss(log_r) - _loss(log_r + log_s)) / 2

    def _pair(self, prior: NCPrior, k: int, group: Group, z: Tensor) -> tuple[Tensor, Tensor]:
        """α log r and log s at z ~ q and at z ~ p, with shape (2, B) each."""
        with torch.no_grad():
            z = torch.stack([z, group.prior.sample().to(z.dtype)])
            log_r = scaled_log_r(prior, k, z, group)
            h = at_least_float32(head_input(prior.source, k, z))
            c = None if group.context is None else at_least_float32(group.context)
        head = self.heads[k]
        return log_r, torch.full_like(log_r, math.nan) if head is None else head(h, c)


def _fresh_heads(prior: NCPrior, encoding: Any) -> list[nn.Module | None]:  # noqa: ANN401
    """One new head per group that is on, ``None`` where no head of ours fits the latents."""
    heads: list[nn.Module | None] = [None] * prior.source.num_groups

    def make(prior: NCPrior, k: int, group: Group, z: Tensor) -> Tensor:
        try:
            heads[k] = make_head(with_head_inputs(prior.source, k, group, z)).eval()
        except (TypeError, ValueError):
            pass
        return torch.zeros(len(z))

    walk_posterior(prior, encoding, make)
    return heads


def _loss(log_r: Tensor) -> Tensor:
    return softplus(-log_r[0]) + softplus(log_r[1])


def _weights(head: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in head.state_dict().items()}
