r"""Calibration of log r: logistic recalibration, the reliability curve and Pareto tails.

With equally many z ~ q and z ~ p, the fraction of posterior samples at a given log r is
σ(log q/p) = σ(log r) = D if log r is exact. All functions take log r at z ~ q and at z ~ p, with
shape ``(draws, rows)``. Several draws for one row x are not independent, so that standard errors
are those of means over rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ncprior.nce import nce_terms
from ncprior.utils.require import real_tensor, require_counts

_PRIOR_DRAWS, _PRIOR_K = 10, 0.5  # the weak prior of k in PSIS

_RIDGE = 1e-12  # of the Hessian, whose entries are about 1 where the samples overlap

_FEWEST_EXCEEDANCES = 5  # the shape of a tail of fewer distinct values is undefined


class Mean(NamedTuple):
    """Mean with its standard error, both in the unit of the values.

    Attributes:
        value: The mean.
        error: Its standard error.
    """

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> "Mean":
        """Mean of values of shape ``(draws, rows)``, whose rows are independent."""
        rows = values.cpu().double().mean(0)
        return cls(rows.mean().item(), rows.std().item() / math.sqrt(len(rows)))


class Recalibration(NamedTuple):
    """Logistic recalibration a·log r + b that fits held-out data best.

    Attributes:
        slope: a; 1 if log r is calibrated, below 1 if it is over-confident, above 1 if it is too
            flat. NaN if log r is constant or separates the samples without error.
        slope_error: Standard error of the slope.
        offset: b in nats.
        offset_error: Standard error of the offset in nats.

    Example:
        >>> Recalibration(1.0, 0.01, 0.0, 0.01).slope
        1.0
    """

    slope: float
    slope_error: float
    offset: float
    offset_error: float


class Reliability(NamedTuple):
    """Reliability curve: predicted against observed frequency of posterior samples, bin by bin.

    Attributes:
        predicted: Mean of D = σ(log r) over the samples of a bin.
        observed: Fraction of posterior samples in the bin; equals ``predicted`` if D is exact.
        size: Number of samples in the bin.

    Example:
        >>> Reliability((0.5,), (0.5,), (100,)).size
        (100,)
    """

    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    size: tuple[int, ...]


def losses(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Plain NCE loss of every pair of draws, in nats, with the shape of log r."""
    loss_q, loss_p = nce_terms(log_q, log_p)
    return loss_q + loss_p


def recalibrate(log_q: Tensor, log_p: Tensor) -> Recalibration:
    r"""Logistic recalibration a·log r + b with the least NCE loss, by Newton's method.

    The standard errors are those of an M-estimator, H⁻¹ G H⁻¹ with H the Hessian (the Fisher
    information) and G the second moment of the gradients of the rows. They are valid for several
    draws per row, and also if no a, b make log r exact.

    Arguments:
        log_q: log r in nats at z ~ q, with shape ``(draws, rows)``.
        log_p: log r in nats at z ~ p, with shape ``(draws, rows)``.

    Returns:
        The recalibration; all values are NaN if it does not exist.

    References:
        | Two further applications of a model for binary regression (Cox, 1958)
        | https://doi.org/10.2307/2333203

    Example:
        >>> z = torch.randn(2, 1, 20000)  # q = N(1, 1), p = N(0, 1): log r = z - 1/2
        >>> fit = recalibrate(2 * (z[0] + 0.5), 2 * (z[1] - 0.5))  # twice that
        >>> round(fit.slope, 1)
        0.5
    """
    log_q, log_p = _pair(log_q, log_p)
    log_r = torch.stack([log_q, log_p])
    apart = log_q.min() >= log_p.max() or log_p.min() >= log_q.max()
    if apart:  # also where log r is constant
        return Recalibration(math.nan, math.nan, math.nan, math.nan)
    center, spread = log_r.mean().item(), log_r.std().item()
    features = torch.stack([(log_r - center) / spread, torch.ones_like(log_r)], -1)
    label = log_r.new_tensor([1.0, 0.0])[:, None, None]
    weights = _newton(features, label)
    gradient, hessian = _derivatives(features, label, weights)
    rows = gradient.mean(1).sum(0)
    inverse = hessian.inverse()
    covariance = inverse @ (rows.T @ rows) @ inverse / (len(rows) * (len(rows) - 1))
    # w₀ (log r - center) / spread + w₁ = a log r + b
    back = weights.new_tensor([[1 / spread, 0.0], [-center / spread, 1.0]])
    a, b = (back @ weights).tolist()
    a_error, b_error = (back @ covariance @ back.T).diagonal().sqrt().tolist()
    return Recalibration(a, a_error, b, b_error)


def reliability(log_q: Tensor, log_p: Tensor, num_bins: int = 10) -> Reliability:
    """Reliability curve of D = σ(log r), over bins of equal counts.

    Arguments:
        log_q: log r in nats at z ~ q, of any shape.
        log_p: log r in nats at z ~ p, of the same shape.
        num_bins: Largest number of bins; equal values of D are in one bin.

    Returns:
        The reliability curve.

    Example:
        >>> reliability(torch.zeros(1, 3), torch.zeros(1, 3))
        Reliability(predicted=(0.5,), observed=(0.5,), size=(6,))
    """
    log_q, log_p = _pair(log_q, log_p)
    require_counts(num_bins=num_bins)
    d = torch.cat([log_q.flatten(), log_p.flatten()]).sigmoid()
    from_q = torch.cat([torch.ones_like(log_q).flatten(), torch.zeros_like(log_p).flatten()])
    first = [len(d) * j // int(num_bins) for j in range(1, int(num_bins))]
    edges = d.sort().values[first].unique()
    bins = torch.bucketize(d, edges, right=True)
    count = bins.bincount()
    filled = count > 0
    predicted = (bins.bincount(d) / count)[filled].tolist()
    observed = (bins.bincount(from_q) / count)[filled].tolist()
    return Reliability(tuple(predicted), tuple(observed), tuple(count[filled].tolist()))


def pareto_k(log_weights: Tensor) -> float:
    r"""Pareto k̂: the estimated shape of the generalised Pareto tail of exp(log_weights).

    Weights of shape k have moments up to the order 1/k. Above k̂ = 0.7, no practical number of
    draws gives a reliable estimate of their mean. The tail is the S' = min(S/5, 3√S) largest of S
    weights. With θ = -k/σ, the profile likelihood and the posterior mean over a grid of θ are

    .. math::
        k(\theta) = \tfrac{1}{n} \sum_i \log(1 - \theta x_i), \qquad
        \ell(\theta) = n \left( \log(-\theta / k(\theta)) - k(\theta) - 1 \right), \qquad
        \hat\theta = \sum_j \theta_j e^{\ell(\theta_j)} / \sum_j e^{\ell(\theta_j)}.

    Arguments:
        log_weights: Logarithms of the weights, of any shape.

    Returns:
        k̂; NaN if the tail has fewer than 5 distinct values above its threshold.

    References:
        | A new and efficient estimation method for the generalized Pareto distribution
        | (Zhang & Stephens, 2009), https://doi.org/10.1198/tech.2009.08017
        | Pareto smoothed importance sampling (Vehtari et al., 2024)
        | https://jmlr.org/papers/v25/19-556.html

    Example:
        >>> log_weights = -0.5 * torch.linspace(1e-4, 1.0, 10_000).log()  # Pareto, of shape 1/2
        >>> round(pareto_k(log_weights), 1)
        0.5
    """
    ordered = real_tensor("log_weights", log_weights).flatten().cpu().double().sort().values
    require_counts(**{"the number of log_weights": len(ordered)})
    if len(ordered) <= _FEWEST_EXCEEDANCES:
        return math.nan
    size = math.ceil(min(len(ordered) / 5, 3 * math.sqrt(len(ordered))))
    start, tail = ordered[-size - 1], ordered[-size:]
    tail = tail[tail > start]
    if len(tail.unique()) < _FEWEST_EXCEEDANCES:
        return math.nan
    x = (tail - ordered[-1]).exp() - (start - ordered[-1]).exp()
    x = x.clamp(min=1e-290)  # so that 1/x is finite
    n = len(x)
    grid = 20 + math.isqrt(n)
    j = torch.arange(1, grid + 1, dtype=torch.float64, device=x.device)
    quartile = x[math.floor(n / 4 + 0.5) - 1]
    theta = 1 / x[-1] + (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[:, None] * x).mean(1)
    log_likelihood = n * ((-theta / k).log() - k - 1)
    best = (log_likelihood.softmax(0) * theta).sum()
    k_hat = torch.log1p(-best * x).mean().item()
    return (n * k_hat + _PRIOR_DRAWS * _PRIOR_K) / (n + _PRIOR_DRAWS)


def _pair(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU, after a check of their values and shapes."""
    log_q, log_p = (
        real_tensor(name, value, ndim=2) for name, value in (("log_q", log_q), ("log_p", log_p))
    )
    if log_q.shape != log_p.shape:
        raise ValueError(
            f"log_q and log_p must have the same shape; got {tuple(log_q.shape)} and "
            f"{tuple(log_p.shape)}. Draw equally many z from q and p."
        )
    return log_q.cpu().double(), log_p.cpu().double()


def _newton(features: Tensor, label: Tensor) -> Tensor:
    """Minimiser of the NCE loss, which is convex, over the weights of a logit.

    Where the samples hardly overlap, a full step overshoots to a Hessian of zero: a step is halved
    until the loss falls.
    """
    weights = features.new_zeros(2)
    loss = _logistic_loss(features, label, weights)
    for _ in range(100):
        gradient, hessian = _derivatives(features, label, weights)
        step = torch.linalg.solve(hessian, gradient.mean((1, 2)).sum(0))
        for _ in range(40):
            there = _logistic_loss(features, label, weights - step)
            if there <= loss:
                break
            step = step / 2
        weights, loss = weights - step, there
        if step.abs().max() < 1e-9 * (1 + weights.abs().max()):
            break
    return weights


def _logistic_loss(features: Tensor, label: Tensor, weights: Tensor) -> Tensor:
    logit = features @ weights
    return softplus(torch.where(label > 0.5, -logit, logit)).mean()


def _derivatives(features: Tensor, label: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of every draw, ``(2, draws, rows, 2)``, and Hessian, ``(2, 2)``."""
    d = (features @ weights).sigmoid()
    gradient = (d - label)[..., None] * features
    draws = d[0].numel()
    hessian = torch.einsum("adn,adni,adnj->ij", d * (1 - d), features, features) / draws
    # Far from the minimum all D may be 0 or 1 to the last bit, and the Hessian zero.
    return gradient, hessian + _RIDGE * torch.eye(2, dtype=hessian.dtype, device=hessian.device)
