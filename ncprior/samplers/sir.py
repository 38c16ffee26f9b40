"""Sampling-importance-resampling (SIR) by one streamed pass of Gumbel-max over the proposals."""

from __future__ import annotations

import math

import torch
from torch import Size, Tensor

from ncprior.distributions import Sampleable
from ncprior.samplers.base import (
    _NOT_FINITE,
    Draw,
    LogRatio,
    check_rows,
    checked,
    like_event,
)
from ncprior.samplers.proposals import Proposals, require_same_rows

_SHARED_KEYS = 2**20  # log-weights with noise, of proposals × rows, at once


@torch.no_grad()
def sir(
    prior: Sampleable,
    log_ratio: LogRatio,
    *,
    num_proposals: int,
    chunk_size: int = 4096,
    share_proposals: bool = False,
) -> Draw:
    r"""Sampling-importance-resampling: of M proposals z ~ p(z), keeps one with probability ∝ r(z).

    One pass of Gumbel-max over chunks of proposals: with g ~ Gumbel(0, 1), the proposal of the
    largest log r(z) + g is a draw from the categorical distribution of weights r(z). Memory does
    not grow with M. The law of the draw tends to r·p / Z as M → ∞; M proposals correct about
    log M nats.

    Rows may share their M proposals, at a B-th of the cost. The law of each row stays what it is,
    and given the proposals rows are independent; but two rows draw the same proposal with
    probability E[1 / ESS], and the covariance of f(z) between rows is the variance of the mean of f
    over weighted proposals, about Var f / ESS. Of a mean over n draws in batches of B, the variance
    is thus about Var f · (1/n + 1/(ESS · n / B)): sharing costs nothing that can be seen while
    B is well below the ESS, and batches of B draws look alike when it is not.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``. Its
            argument may be overwritten once it has returned.
        num_proposals: M, the number of proposals per row.
        chunk_size: Most latents (proposals × rows) given to ``log_ratio`` at once, or one proposal
            per row if that is more. Bounds the memory; the law of the draw does not depend on it.
        share_proposals: Whether all rows choose among the same M proposals, where p and log r are
            the same for every row, as in the first group of a VAE without conditions.

    Returns:
        A draw with ``z``, ``ess`` and ``log_mean_weight``.

    Raises:
        ValueError: If there is no proposal to draw, the prior or log r has the wrong shape, or
            proposals cannot be shared.
        FloatingPointError: If log r is not finite.

    References:
        Aneja et al. (2021), section 4.3.

    Example:
        >>> prior = Normal(torch.zeros(1000), 1.0)
        >>> draw = sir(prior, lambda z: 0.5 * z, num_proposals=200)  # r·p ∝ N(0.5, 1)
        >>> round(draw.z.mean().item(), 1)
        0.5
    """
    if num_proposals < 1 or chunk_size < 1:
        raise ValueError(
            f"num_proposals and chunk_size must be at least 1; got {num_proposals}, {chunk_size}."
        )
    check_rows(prior)
    # The first chunk is one proposal per row: it tells B, whatever kind of sampler the prior is.
    proposals = Proposals(prior)
    z = proposals(1)
    rows = z.shape[1]
    at_once = max(1, chunk_size // max(1, rows))
    if share_proposals:
        require_same_rows(prior, log_ratio, z)
    pool = _Pool(num_proposals, rows, share=share_proposals)
    pool.add(z, log_ratio(z))
    while missing := pool.missing():
        z = proposals(min(at_once, missing))
        pool.add(z, log_ratio(z))
    return pool.draw()


class _Pool:
    """Proposals seen so far: the leader of each row and the running sums of r and r².

    Shared proposals stand before all rows: their log r is (n, 1), and so are the sums.
    """

    finite: Tensor  # (), whether all of log r was; looked at once, at the end
    z: Tensor  # (B, *event), the leaders
    key: Tensor  # (B,), log r + Gumbel of the leaders
    top: Tensor  # (B,), the largest log r; the sums are relative to it, so that nothing overflows
    sum_r: Tensor  # (B,), Σ exp(log r - top)
    sum_r2: Tensor  # (B,), Σ exp(2 (log r - top))

    def __init__(self, num_proposals: int, rows: int, *, share: bool) -> None:
        self.num_proposals, self.rows, self.share = num_proposals, rows, share
        self.seen = 0

    def missing(self) -> int:
        """Proposals per row that are still to be drawn."""
        left = self.num_proposals - self.seen
        return -(-left // max(1, self.rows)) if self.share else left

    def add(self, z: Tensor, log_r: Tensor) -> None:
        """Takes proposals (n, B, *event)."""
        log_r = checked(log_r, z.shape[:2])
        if not self.share:
            self._add(z, log_r)
            return
        left = self.num_proposals - self.seen
        at_once = max(1, _SHARED_KEYS // max(1, self.rows))
        z, log_r = z.flatten(0, 1)[:left], log_r.reshape(-1, 1)[:left]
        for part, log_r_part in zip(z.split(at_once), log_r.split(at_once), strict=True):
            self._add(part, log_r_part)

    def _add(self, z: Tensor, log_r: Tensor) -> None:
        # Gumbel = -log Exponential. Where float resolution makes an exponential zero, it stands
        # for one below the resolution.
        noise = log_r.new_empty(len(log_r), self.rows).exponential_()
        noise.clamp_(min=torch.finfo(log_r.dtype).eps / 4)
        key, winner = (log_r - noise.log_()).max(0)
        top = log_r.amax(0)
        r = (log_r - top).exp()
        sum_r, sum_r2 = r.sum(0), r.square().sum(0)
        z = z[winner] if self.share else z[winner, torch.arange(self.rows, device=z.device)]
        finite = torch.isfinite(log_r).all()
        if self.seen == 0:
            self.finite = finite
            self.z, self.key, self.top, self.sum_r, self.sum_r2 = z, key, top, sum_r, sum_r2
        else:
            self.finite = self.finite & finite
            ahead = key > self.key
            self.z = torch.where(like_event(ahead, z), z, self.z)
            self.key = torch.maximum(key, self.key)
            new_top = torch.maximum(top, self.top)
            old, new = (self.top - new_top).exp(), (top - new_top).exp()
            self.sum_r = self.sum_r * old + sum_r * new
            self.sum_r2 = self.sum_r2 * old.square() + sum_r2 * new.square()
            self.top = new_top
        self.seen += len(log_r)

    def draw(self) -> Draw:
        """What the leaders are, and how good the proposals were."""
        if not self.finite:
            raise FloatingPointError(_NOT_FINITE)
        log_mean_weight = self.top + self.sum_r.log() - math.log(self.num_proposals)
        ess = self.sum_r.square() / self.sum_r2
        rows = Size((self.rows,))
        return Draw(self.z, ess.expand(rows).clone(), log_mean_weight.expand(rows).clone())
