"""Comparison of draws with exact distributions. A tolerance is a number of standard errors."""

import math
from collections.abc import Callable

import numpy as np
import torch
from helpers.problems import Array
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution

LogRatio = Callable[[Tensor], Tensor]

# A p-value below this has the chance of a miss by four standard errors.
RARE = 6e-5


def rows(distribution: Distribution, n: int) -> Distribution:
    """The same distribution in n rows."""
    return distribution.expand((n,))


def flat(z: Tensor) -> Tensor:
    """The log-ratio log r = 0, for latents with one event axis."""
    return torch.zeros_like(z[..., 0])


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of independent values."""
    return float(values.double().std()) / math.sqrt(len(values))


def chi_square_p_value(draws: Tensor, nodes: Array, probabilities: Array, bins: int = 40) -> float:
    """The p-value of a chi-square test, by code or over bins of about equal probability."""
    if not draws.is_floating_point():
        observed = np.bincount(draws.numpy(), minlength=len(nodes))
        return float(stats.chisquare(observed, probabilities * len(draws)).pvalue)
    cuts = np.interp(np.arange(1, bins) / bins, np.cumsum(probabilities), nodes)
    # A node stands for the cell around it: the law between two nodes is by interpolation.
    middle = 0.5 * (nodes[1:] + nodes[:-1])
    cdf = np.interp(cuts, middle, np.cumsum(probabilities)[:-1])
    expected = np.diff(np.concatenate([[0.0], cdf, [1.0]])) * len(draws)
    observed = np.bincount(np.searchsorted(cuts, draws.double().numpy()), minlength=bins)
    return float(stats.chisquare(observed, expected).pvalue)


class Recorder:
    """A log-ratio that records its inputs and its values."""

    def __init__(self, log_ratio: LogRatio) -> None:
        self.log_ratio = log_ratio
        self.z: list[Tensor] = []
        self.log_r: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        log_r = self.log_ratio(z)
        self.z.append(z.clone())
        self.log_r.append(log_r.clone())
        return log_r


def slope(x: list[int] | list[float], y: list[float]) -> float:
    """The least-squares slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
