"""Rejection and independence Metropolis, against their exact laws."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import Codes, GaussianPair, SampleOnly
from scipy import stats
from torch import Tensor
from torch.distributions import Bernoulli

from ncprior.samplers.base import Draw
from ncprior.samplers.rejection import independence, rejection

P, R, ROWS = 0.3, 3.0, 40_000  # two points: p(1) = 0.3, r(1) = 3, r(0) = 1
SAMPLERS: list[Any] = [
    partial(rejection, log_bound=math.log(R), max_tries=3),
    partial(independence, num_steps=3),
]


def two_points(z: Tensor) -> Tensor:
    return z * math.log(R)


def coins(rows: int = ROWS) -> Bernoulli:
    return Bernoulli(torch.full((rows,), P))


def four_sd(chance: float, count: int = ROWS) -> float:
    return 4 * math.sqrt(chance * (1 - chance) / count)


@pytest.mark.parametrize("tries", [1, 2, 5, 60])
def test_rejection_has_its_truncated_law(tries: int) -> None:
    draw = rejection(coins(), two_points, log_bound=math.log(R), max_tries=tries)
    z_mean = P * 1 + (1 - P) / R  # Z, the share accepted
    alpha = (1 - z_mean) ** (tries - 1)
    exact = (1 - alpha) * P / z_mean + alpha * P
    assert draw.z.mean().item() == pytest.approx(exact, abs=four_sd(exact))
    assert draw.acceptance is not None
    accepted = 1 - (1 - z_mean) ** tries
    assert draw.acceptance.mean().item() == pytest.approx(accepted, abs=four_sd(accepted) + 1e-9)


def test_a_bound_that_is_too_low_caps_the_ratio() -> None:
    draw = rejection(coins(), two_points, log_bound=math.log(2), max_tries=100)
    exact = P / (P + (1 - P) / 2)  # min(r, 2)·p
    assert draw.z.mean().item() == pytest.approx(exact, abs=four_sd(exact))


@pytest.mark.parametrize("steps", [0, 1, 3, 40])
@pytest.mark.parametrize("chunk_size", [1, 3 * ROWS])
def test_independence_metropolis_is_the_exact_markov_chain(steps: int, chunk_size: int) -> None:
    """From 0: accept 1 always, at P; from 1: accept 0 with 1/R, at 1 - P."""
    step = np.array([[1 - P, P], [(1 - P) / R, 1 - (1 - P) / R]])
    exact = (np.array([1 - P, P]) @ np.linalg.matrix_power(step, steps))[1]
    draw = independence(coins(), two_points, num_steps=steps, chunk_size=chunk_size)
    assert draw.z.mean().item() == pytest.approx(exact, abs=four_sd(exact))


def test_its_acceptance_is_the_share_of_moves() -> None:
    draw = independence(coins(), two_points, num_steps=1, init=torch.ones(ROWS))
    assert draw.acceptance is not None
    exact = P + (1 - P) / R
    assert draw.acceptance.mean().item() == pytest.approx(exact, abs=four_sd(exact))


def test_both_find_the_target_on_gaussians() -> None:
    problem = GaussianPair(kl=0.5)
    prior = problem.prior.expand((4000,))
    uniform = stats.norm(loc=problem.shift)
    chain = independence(prior, problem.log_r, num_steps=200)
    assert stats.kstest(problem.project(chain.z).numpy(), uniform.cdf).pvalue > 0.01
    tried = rejection(prior, problem.log_r, log_bound=4.0, max_tries=2000)
    assert tried.acceptance is not None
    assert tried.acceptance.mean() > 0.99
    assert stats.kstest(problem.project(tried.z).numpy(), uniform.cdf).pvalue > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["rejection", "independence"])
def test_codes_and_sample_only_priors_are_fine(sampler: Any) -> None:
    codes = Codes()
    assert sampler(codes.prior.expand((7,)), codes.log_r).z.shape == (7,)
    prior = SampleOnly(GaussianPair().prior.expand((7,)))
    assert sampler(prior, GaussianPair().log_r).z.shape == (7, 2)


def test_a_chain_starts_where_it_is_told() -> None:
    init = torch.full((5, 2), 3.0)
    draw = independence(
        GaussianPair().prior.expand((5,)), lambda z: z[..., 0], num_steps=0, init=init
    )
    assert torch.equal(draw.z, init)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["rejection", "independence"])
def test_log_r_that_is_not_finite_is_reported(sampler: Any) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler(GaussianPair().prior.expand((3,)), lambda z: z.sum(-1) / 0)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["rejection", "independence"])
def test_priors_and_ratios_of_the_wrong_shape_are_refused(sampler: Any) -> None:
    with pytest.raises(ValueError, match="batch shape"):
        sampler(GaussianPair().prior, lambda z: z.sum(-1))
    with pytest.raises(ValueError, match="log_ratio must map"):
        sampler(GaussianPair().prior.expand((3,)), lambda z: z)


@pytest.mark.parametrize(
    "call",
    [
        partial(rejection, log_bound=0.0, max_tries=0),
        partial(rejection, log_bound=math.inf),
        partial(independence, num_steps=-1),
        partial(independence, num_steps=1, chunk_size=0),
    ],
)
def test_impossible_numbers_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a (whole )?number in"):
        call(GaussianPair().prior.expand((3,)), lambda z: z.sum(-1))


def test_a_draw_has_one_z_per_row() -> None:
    for sampler in SAMPLERS:
        draw: Draw = sampler(GaussianPair(dim=3).prior.expand((4,)), lambda z: z.sum(-1))
        assert draw.z.shape == (4, 3)


def test_a_bound_that_is_a_huge_whole_number_is_taken() -> None:
    prior = torch.distributions.Normal(torch.zeros(4), 1.0)
    assert rejection(prior, lambda z: z, log_bound=-(2**70)).z.shape == (4,)
