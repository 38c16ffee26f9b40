"""Sampling-importance-resampling (SIR), by one streamed pass of Gumbel-max over the proposals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Size, Tensor

from ncprior.distributions import Sampleable
from ncprior.samplers.base import (
    NOT_FINITE,
    Draw,
    LogRatio,
    check_target,
    checked,
    latents_at_once,
    like_event,
)
from ncprior.samplers.proposals import Proposals, require_same_rows
from ncprior.utils.draws import gumbel
from ncprior.utils.require import require_counts, require_flags

_SHARED_KEYS = 2**20  # log-weights with noise, of proposals × rows, at once


@torch.no_grad()
def sir(
    prior: Sampleable,
    log_ratio: LogRatio,
    *,
    num_proposals: int,
    chunk_size: int | None = None,
    share_proposals: bool = False,
) -> Draw:
    r"""Sampling-importance-resampling (SIR): picks one of M proposals of p, with probability ∝ r.

    Resampling is one pass of Gumbel-max over chunks of proposals: with g ~ Gumbel(0, 1), the
    proposal of the largest log r(z) + g is a draw from the categorical distribution of weights
    r(z). Memory does not grow with M. The distribution of the draw tends to r·p / Z as M → ∞; M
    proposals correct at most log M nats.

    With ``share_proposals``, all B rows of a batch choose among the same M proposals, at 1/B of
    the cost. The distribution of each row does not change, and rows are independent given the
    proposals. But two rows pick the same proposal with probability E[1 / ESS], and the covariance
    of f(z) between rows is the variance of the weighted mean of f over the proposals, about Var f
    / ESS. The variance of a mean over n draws in batches of B is thus about Var f / n ·
    (1 + B / ESS). Sharing is harmless while B is well below the ESS; otherwise the draws of a batch
    look alike.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``. It
            must not keep a reference to z, which may be overwritten after the call.
        num_proposals: M, the number of proposals per row.
        chunk_size: Largest number of latents (proposals × rows) per call of ``log_ratio``; at least
            one proposal per row is always given. Bounds the memory; the distribution of the draw does not
            depend on it. ``None``: 4,096 on a CPU, more on an accelerator.
        share_proposals: Whether all rows choose among the same M proposals. p and log r must be
            the same for every row, as in the first group of a VAE without conditions.

    Returns:
        A draw with ``z``, ``ess`` and ``log_mean_weight``.

    Raises:
        TypeError: If an argument has the wrong type, or draws or log r are not real numbers.
        ValueError: If ``num_proposals`` or ``chunk_size`` is below 1, the prior or log r has the
            wrong shape, or rows differ and cannot share proposals.
        FloatingPointError: If log r is not finite.

    References:
        Aneja et al. (2021), section 4.3.

    Example:
        >>> prior = Normal(torch.zeros(1000), 1.0)
        >>> draw = sir(prior, lambda z: 0.5 * z, num_proposals=200)  # r·p ∝ N(0.5, 1)
        >>> round(draw.z.mean().item(), 1)
        0.5
    """
    require_counts(num_proposals=num_proposals)
    require_counts("[1, inf) or None", chunk_size=chunk_size)
    require_flags(share_proposals=share_proposals)
    make = partial(Pool, share=share_proposals)
    return stream(prior, log_ratio, make, num_proposals, chunk_size, share=share_proposals)


def stream(
    prior: Sampleable,
    log_ratio: LogRatio,
    make: Callable[[int, int], Pool],
    num_proposals: int,
    chunk_size: int | None,
    *,
    share: bool,
) -> Draw:
    """Draws from a pool that has seen all proposals, chunk by chunk.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z to log r(z) in nats.
        make: Returns the empty pool of so many proposals and rows.
        num_proposals: M.
        chunk_size: Largest number of latents per call of ``log_ratio``, or ``None``.
        share: Whether rows share proposals, and must therefore be alike.
    """
    check_target(prior, log_ratio)
    proposals = Proposals(prior)
    rows = proposals.example.shape[1]
    at_once = max(1, latents_at_once(proposals.example, chunk_size) // max(1, rows))
    if share:
        require_same_rows(prior, log_ratio, proposals.peek())
    pool = make(num_proposals, rows)
    while missing := pool.missing():
        z = proposals(min(at_once, missing))
        pool.add(z, log_ratio(z))
    return pool.draw()


class Pool:
    """Running Gumbel-max over proposals: the leader of each row, and the sums of r and r².

    For shared proposals log r has shape (n, 1), and the sums have shape (1,). A subclass may choose
    its leaders by other keys.

    Arguments:
        num_proposals: M.
        rows: B.
        share: Whether all rows choose among the same proposals.
    """

    finite: Tensor  # (), whether all log r are finite; read once, at the end
    z: Tensor  # (B, *event), the leaders
    key: Tensor  # (B,), the keys of the leaders: here log r + Gumbel
    top: Tensor  # (B,), the largest log r; the sums are relative to it, so that nothing overflows
    sum_r: Tensor  # (B,), Σ exp(log r - top)
    sum_r2: Tensor  # (B,), Σ exp(2 (log r - top))

    def __init__(self, num_proposals: int, rows: int, *, share: bool) -> None:
        self.num_proposals, self.rows, self.share = num_proposals, rows, share
        self.seen = 0

    def missing(self) -> int:
        """Number of proposals per row that are still to be drawn."""
        left = self.num_proposals - self.seen
        return -(-left // max(1, self.rows)) if self.share else left

    def add(self, z: Tensor, log_r: Tensor) -> None:
        """Adds proposals (n, B, *event) with their log r, (n, B)."""
        log_r = checked(log_r, z.shape[:2])
        if not self.share:
            self._add(z, log_r)
            return
        left = self.num_proposals - self.seen
        at_once = max(1, _SHARED_KEYS // max(1, self.rows))
        z, log_r = z.flatten(0, 1)[:left], log_r.reshape(-1, 1)[:left]
        for some, log_r_some in zip(z.split(at_once), log_r.split(at_once), strict=True):
            self._add(some, log_r_some)

    def _add(self, z: Tensor, log_r: Tensor) -> None:
        key, winner = self.keys(log_r).max(0)
        z = z[winner] if self.share else z[winner, torch.arange(self.rows, device=z.device)]
        if self.seen:
            z = torch.where(like_event(key > self.key, z), z, self.z)
            key = torch.maximum(key, self.key)
        self.z, self.key = z, key
        self.weigh(log_r)

    def keys(self, log_r: Tensor) -> Tensor:
        """Keys of proposals, with shape (n, B): the proposal of the largest key leads its row."""
        return log_r + gumbel(log_r, (len(log_r), self.rows))

    def weigh(self, log_r: Tensor) -> None:
        """Adds the weights of n proposals to the sums, one for each column of log r."""
        top, finite = log_r.amax(0), torch.isfinite(log_r).all()
        r = (log_r - top).exp()
        sum_r, sum_r2 = r.sum(0), r.square().sum(0)
        if self.seen:
            new_top, finite = torch.maximum(top, self.top), self.finite & finite
            old, new = (self.top - new_top).exp(), (top - new_top).exp()
            sum_r = self.sum_r * old + sum_r * new
            sum_r2 = self.sum_r2 * old.square() + sum_r2 * new.square()
            top = new_top
        self.finite, self.top, self.sum_r, self.sum_r2 = finite, top, sum_r, sum_r2
        self.seen += len(log_r)

    def draw(self) -> Draw:
        """Returns the leaders, with effective sample size and log-mean-weight of the proposals."""
        if not self.finite:
            raise FloatingPointError(NOT_FINITE)
        log_mean_weight = self.top + self.sum_r.log() - math.log(self.num_proposals)
        ess = self.sum_r.square() / self.sum_r2
        rows = Size((self.rows,))
        return Draw(self.z, ess.expand(rows).clone(), log_mean_weight.expand(rows).clone())
