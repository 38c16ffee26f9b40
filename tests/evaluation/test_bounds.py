"""Estimates of log E w from weights of which E w is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ncprior.evaluation.bounds import bounds


def gaussian_weights(count: int, rows: int, *, dim: int = 5, width: float = 2.0) -> Tensor:
    """log w of importance sampling N(0, I) from N(0, width² I): E w = 1."""
    z = width * torch.randn(count, rows, dim, dtype=torch.float64)
    return (0.5 * (z / width) ** 2 - 0.5 * z**2 + math.log(width)).sum(-1)


def spread(x: Tensor) -> float:
    return (x.std() / math.sqrt(len(x))).item()


def test_equal_weights_are_exact() -> None:
    log_w = torch.full((100, 3), -84.0, dtype=torch.float64)
    for found in bounds(log_w):
        assert torch.allclose(found, log_w[0])


@pytest.mark.parametrize("count", [100, 400])
def test_the_three_are_in_order_around_the_truth(count: int) -> None:
    """Weights of standard deviation 4.7 nats; what is known of the biases is of order 1/S."""
    torch.manual_seed(0)
    lower, estimate, upper = bounds(gaussian_weights(count, 4000))
    assert lower.mean() < -3 * spread(lower)
    assert upper.mean() > 3 * spread(upper)
    assert abs(estimate.mean()) < 0.5 * abs(lower.mean()) + 3 * spread(estimate)


def test_the_width_shrinks_like_one_over_s() -> None:
    torch.manual_seed(0)
    widths = []
    for count in (100, 400, 1600):
        lower, _, upper = bounds(gaussian_weights(count, 2000, dim=2))
        widths.append((upper - lower).mean().item())
    slopes = [math.log(b / a) / math.log(4) for a, b in pairwise(widths)]
    assert slopes == pytest.approx([-1, -1], abs=0.2)


def test_the_jackknife_is_that_of_its_definition() -> None:
    torch.manual_seed(0)
    log_w = torch.randn(10, 4, dtype=torch.float64)
    without = [log_w[[j for j in range(10) if j != i]].exp().mean(0).log() for i in range(10)]
    expected = 10 * log_w.exp().mean(0).log() - 9 * torch.stack(without).mean(0)
    assert torch.allclose(bounds(log_w).estimate, expected)


def test_one_weight_that_is_all_stays_finite() -> None:
    log_w = torch.full((50, 1), -1e4, dtype=torch.float64)
    log_w[7] = 0.0
    for found in bounds(log_w):
        assert torch.isfinite(found).all()


def test_few_draws_make_lower_bounds_alone() -> None:
    lower, estimate, upper = bounds(torch.zeros(7, 2, dtype=torch.float64))
    assert torch.equal(lower, torch.zeros(2, dtype=torch.float64))
    assert estimate.isnan().all()
    assert upper.isnan().all()


def test_weights_of_zero_are_weights_and_nan_raises() -> None:
    log_w = torch.zeros(16, 3, dtype=torch.float64)
    log_w[:8, 1] = log_w[:, 2] = -math.inf
    found = bounds(log_w)
    for column in found:
        torch.testing.assert_close(column[0].item(), 0.0)
        assert column[2] == -math.inf
    assert found.lower[1] == pytest.approx(-math.log(2)) and torch.isfinite(found.upper[1])
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="log_w must be"):
            bounds(log_w.clone().fill_(wrong))


def test_one_weight_in_float32_leaves_the_estimate_finite() -> None:
    """1 - 1e-12 is 1 there."""
    log_w = torch.zeros(16, 1)
    log_w[3] = 20.0
    assert all(found.isfinite().all() for found in bounds(log_w))
    assert torch.equal(bounds(log_w).estimate, bounds(log_w.double()).estimate)


@pytest.mark.parametrize("count", [8, 9, 11, 50, 51])
def test_the_upper_estimate_is_at_least_the_lower_bound(count: int) -> None:
    """Blocks may differ in size; Jensen's inequality holds if they count by their size."""
    torch.manual_seed(0)
    lower, _, upper = bounds(0.5 * torch.randn(count, 2000, dtype=torch.float64))
    assert (upper >= lower - 1e-12).all()


def test_the_upper_estimate_is_at_most_log_4_above_the_lower_bound() -> None:
    """Of weights exp(20 ε), log E w = 200, which no 100 draws can know."""
    torch.manual_seed(0)
    lower, _, upper = bounds(20 * torch.randn(100, 50, dtype=torch.float64))
    assert (upper - lower <= math.log(4) + 1e-9).all() and (upper < 150).all()
