r"""Two-sided estimates of log E w, in nats, from S importance weights w_s ≥ 0.

* *Lower bound*: :math:`\log \frac{1}{S} \sum_s w_s`, which is too small on average (Jensen); its
  bias is of order 1/S.
* *Estimate*: the jackknife of the lower bound, which removes the bias of order 1/S.
* *Upper estimate*: the draws are split into blocks b with mean weights :math:`\hat w_b`. If one
  draw of a block came from the distribution ∝ w, :math:`\log \hat w_b` would be too large on
  average. The distribution of such blocks is that of the given blocks, reweighted by :math:`\hat
  w_b`. Therefore :math:`\sum_b \hat w_b \log \hat w_b \,/\, \sum_b \hat w_b` is too large on
  average for many blocks; for four blocks its bias is about twice as large as that of the lower
  bound. It is at least the lower bound, and at most log 4 above it. So it can be too large only where
  the effective sample size is large: where few of the weights are nearly all, log E w can be any
  number of nats above both.

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

from ncprior.utils.precision import in_float64
from ncprior.utils.require import real_tensor

BLOCKS = 4  # with two blocks, the upper estimate would be too small about half of the time


class Bounds(NamedTuple):
    """Estimates of log E w, each of shape ``(N,)``, in nats.

    Attributes:
        lower: The lower bound; on average at most log E w.
        estimate: The jackknife estimate. Where one weight is nearly all, it means nothing, and can be
            far above ``upper``.
        upper: The upper estimate.

    Example:
        >>> Bounds(torch.zeros(3), torch.zeros(3), torch.zeros(3)).lower.shape
        torch.Size([3])
    """

    lower: Tensor
    estimate: Tensor
    upper: Tensor


def bounds(log_w: Tensor) -> Bounds:
    """Lower bound, jackknife estimate and upper estimate of log E w.

    Arguments:
        log_w: Log-weights in nats, with shape ``(S, N)``; -∞ is the weight 0. Draws in different
            quarters of the first axis must be independent.

    Returns:
        The estimates in nats, with shape ``(N,)``. If S is below 8, all but the lower bound are
        NaN.

    Raises:
        ValueError: If a log-weight is NaN or +∞, or the shape is another.

    Example:
        >>> log_w = 2 * torch.randn(200, 1000, dtype=torch.float64)  # log E w = 2
        >>> [round(t.mean().item(), 1) for t in bounds(log_w)]
        [1.9, 2.0, 2.1]
    """
    log_w = real_tensor("log_w", log_w, ndim=2, infinite=True)
    if (log_w == math.inf).any():
        raise ValueError(
            "log_w must be below infinity; got an infinite weight. Look at the density."
        )
    log_w = in_float64(log_w)
    count = len(log_w)
    lower = _log_mean(log_w)
    if count < 2 * BLOCKS:
        return Bounds(lower, *torch.full_like(lower.expand(2, -1), math.nan))
    # log-mean without w_s = log-mean + log(1 - w_s / Σ w) + log(S / (S - 1))
    fraction = (log_w - log_w.logsumexp(0)).exp().nan_to_num(0.0).clamp(max=1 - 1e-12)
    without = torch.log1p(-fraction) + math.log(count / (count - 1))
    parts = log_w.tensor_split(BLOCKS)
    blocks = torch.stack([_log_mean(part) for part in parts])
    weights = torch.stack([part.logsumexp(0) for part in parts]).softmax(0)
    upper = torch.where(weights > 0, weights * blocks, 0.0).sum(0)  # 0 log 0 = 0
    upper = torch.where(lower.isneginf(), lower, upper)
    return Bounds(lower, lower - (count - 1) * without.mean(0), upper)


def _log_mean(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(0) - math.log(len(log_w))
