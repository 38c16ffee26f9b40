r"""What S importance weights w_s ≥ 0 say of log E w, from below and from above, in nats.

* *Lower bound*: :math:`\log \frac{1}{S} \sum_s w_s`, on average too small (Jensen); its bias is of
  order 1/S.
* *Estimate*: the lower bound's jackknife, which takes that order away.
* *Upper estimate*: the draws are cut into blocks b of mean :math:`\hat w_b`. In blocks one draw of
  which comes from the law ∝ w, :math:`\log \hat w_b` is on average too large; and the law of such
  blocks is that of the others, reweighted by :math:`\hat w_b`. So
  :math:`\sum_b \hat w_b \log \hat w_b \,/\, \sum_b \hat w_b` is too large for many blocks, and with
  four of them by about twice what the lower bound is too small.

References:
    | Importance Weighted Autoencoders (Burda et al., ICLR 2016)
    | Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife
    | Variational Inference (Nowozin, ICLR 2018)
    | Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse et al., 2015)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCKS = 4  # with two the upper estimate would be too small as often as not


class Bounds(NamedTuple):
    """Estimates of log E w, each of shape ``(N,)``, in nats.

    Attributes:
        lower: On average at most log E w.
        estimate: The jackknife.
        upper: The upper estimate.

    Example:
        >>> Bounds(torch.zeros(3), torch.zeros(3), torch.zeros(3)).lower.shape
        torch.Size([3])
    """

    lower: Tensor
    estimate: Tensor
    upper: Tensor


def bounds(log_w: Tensor) -> Bounds:
    """Returns the three estimates of log E w.

    Arguments:
        log_w: Log-weights in nats, with shape ``(S, N)``. Draws of different quarters of the S must
            be independent.

    Returns:
        The estimates in nats, with shape ``(N,)``; with S below 8, NaN but for the lower bound.

    Example:
        >>> log_w = 2 * torch.randn(200, 1000, dtype=torch.float64)  # log E w = 2
        >>> [round(t.mean().item(), 1) for t in bounds(log_w)]
        [1.9, 2.0, 2.1]
    """
    count = len(log_w)
    lower = _log_mean(log_w)
    if count < 2 * BLOCKS:
        return Bounds(lower, *torch.full_like(lower.expand(2, -1), math.nan))
    # The mean without w_s is the mean, less w_s's share of the sum.
    share = (log_w - log_w.logsumexp(0)).exp().clamp(max=1 - 1e-12)
    without = torch.log1p(-share) + math.log(count / (count - 1))
    blocks = torch.stack([_log_mean(block) for block in log_w.tensor_split(BLOCKS)])
    upper = (blocks.softmax(0) * blocks).sum(0)
    return Bounds(lower, lower - (count - 1) * without.mean(0), upper)


def _log_mean(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(0) - math.log(len(log_w))
