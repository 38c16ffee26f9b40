"""Langevin dynamics against closed forms. A tolerance is a number of standard errors."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers.exact import RARE, flat, rows, slope
from helpers.problems import (
    Array,
    Codes,
    GaussianPair,
    SampleOnly,
    TwoBumps,
    hmc_acceptance,
    mala_acceptance,
    standard_normal,
    ula_variance,
)
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal, OneHotCategorical

from ncprior import langevin
from ncprior.samplers.base import LogRatio
from ncprior.samplers.langevin import hmc_step
from ncprior.samplers.target import Target


@pytest.mark.parametrize(("variance", "step_size"), [(1.0, 0.4), (2.0, 1.0), (0.5, 0.2)])
def test_ula_has_the_closed_form_variance(variance: float, step_size: float) -> None:
    # Base N(0, 1), target N(0, variance): half of the energy is log r's, half is log p's.
    def log_ratio(z: Tensor) -> Tensor:
        return 0.5 * (1 - 1 / variance) * z.square().sum(-1)

    n, num_steps = 50_000, 40
    draw = langevin(
        rows(standard_normal(2), n), log_ratio, num_steps=num_steps, step_size=step_size
    )
    assert draw.ess is None and draw.log_mean_weight is None and draw.acceptance is None
    expected = ula_variance(variance, step_size)
    assert (
        abs(expected - ula_variance(variance, step_size, num_steps, start=1.0)) < 1e-4 * variance
    )
    # 2n Gaussian values: the variance of their mean square is 2 v²/(2n).
    assert abs(draw.z.double().square().mean() - expected) < 4 * expected / math.sqrt(n)
    assert abs(draw.z.double().mean()) < 4 * math.sqrt(expected / (2 * n))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_ula_has_the_closed_form_variance_on_the_way(num_steps: int) -> None:
    n = 50_000
    init = torch.full((n, 2), 0.0)
    draw = langevin(
        rows(standard_normal(2), n), flat, num_steps=num_steps, step_size=0.3, init=init
    )
    expected = ula_variance(1.0, 0.3, num_steps, start=0.0)
    assert abs(draw.z.double().square().mean() - expected) < 4 * expected / math.sqrt(n)


def test_the_bias_of_ula_grows_like_the_step() -> None:
    n, steps = 400_000, [0.2, 0.4, 0.8]
    prior = rows(standard_normal(1), n)
    bias, error = [], []
    for step_size in steps:
        # From exact stationary draws, so few steps are enough to forget what a bug would change.
        init = math.sqrt(ula_variance(1.0, step_size)) * torch.randn(n, 1)
        z = langevin(
            prior, flat, num_steps=math.ceil(4 / step_size), step_size=step_size, init=init
        ).z
        v = float(z.double().square().mean())
        # v = 1/(1 - lambda/4), so the bias relative to v is lambda/4: slope 1 at every step size.
        bias.append(1 - 1 / v)
        error.append(math.sqrt(2 / n) / v / bias[-1])
    x = np.log(steps) - np.mean(np.log(steps))
    tolerance = 4 * math.sqrt(((x * error) ** 2).sum()) / float((x**2).sum())
    assert tolerance < 0.3
    assert abs(slope(steps, bias) - 1) < tolerance


@pytest.mark.parametrize("adjusted", [True, False])
def test_mala_leaves_the_target_invariant_and_ula_does_not(adjusted: bool) -> None:
    bumps, n = TwoBumps(), 50_000
    init = bumps.target.sample((n, 1))
    draw = langevin(
        rows(bumps.prior, n),
        bumps.log_r,
        num_steps=10,
        step_size=0.25,
        adjusted=adjusted,
        init=init,
    )

    def cdf(z: Array) -> Array:
        return bumps.target.cdf(torch.from_numpy(z)).numpy()

    p_value = stats.kstest(draw.z[:, 0].double().numpy(), cdf).pvalue
    assert (p_value > RARE) == adjusted
    moved = (draw.z != init).double().mean()
    assert moved > 0.95


@pytest.mark.parametrize("step_size", [0.01, 0.5, 1.5])
def test_mala_accepts_as_often_as_it_should(step_size: float) -> None:
    n = 100_000
    prior = rows(standard_normal(1), n)
    draw = langevin(
        prior, flat, num_steps=2, step_size=step_size, adjusted=True, init=torch.randn(n, 1)
    )
    assert draw.acceptance is not None and draw.acceptance.shape == (n,)
    assert draw.acceptance.min() >= 0 and draw.acceptance.max() <= 1
    expected = mala_acceptance(step_size)
    # Shares of two steps, maybe correlated: the variance of a share is at most a (1 - a).
    tolerance = 4 * math.sqrt(expected * (1 - expected) / n)
    assert abs(draw.acceptance.double().mean() - expected) < tolerance


@pytest.mark.parametrize(("step_size", "num_leapfrogs"), [(0.5, 1), (1.5, 1), (0.5, 3), (1.0, 5)])
def test_hmc_accepts_as_often_as_it_should(step_size: float, num_leapfrogs: int) -> None:
    n = 100_000
    target = Target(rows(standard_normal(1), n), flat)
    _, accept = hmc_step(target, target(torch.randn(n, 1)), step_size, num_leapfrogs=num_leapfrogs)
    expected = hmc_acceptance(step_size, num_leapfrogs)
    if num_leapfrogs == 1:
        assert expected == pytest.approx(mala_acceptance(step_size), abs=1e-4)
    assert abs(accept.double().mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("num_leapfrogs", [1, 4])
def test_hmc_leaves_the_target_invariant(num_leapfrogs: int) -> None:
    bumps, n = TwoBumps(), 50_000
    init = bumps.target.sample((n, 1))
    target = Target(rows(bumps.prior, n), bumps.log_r)
    at = target(init)
    for _ in range(5):
        at, accept = hmc_step(target, at, 0.25, num_leapfrogs=num_leapfrogs)
    assert 0.3 < accept.float().mean() < 0.95
    cdf = bumps.target.cdf(at.z[:, 0])
    assert stats.kstest(cdf.numpy(), "uniform").pvalue > RARE


def test_mala_finds_the_target_from_the_base() -> None:
    pair, n = GaussianPair(2.0), 20_000
    draw = langevin(rows(pair.prior, n), pair.log_r, num_steps=60, step_size=0.5, adjusted=True)
    z = draw.z - pair.mean
    # The chains forget the base like (1 - lambda/2)^60 = 3e-8 where nothing is rejected.
    assert (z.double().mean(0).abs() < 4 / math.sqrt(n)).all()
    covariance = np.cov(z.double().numpy().T)
    assert np.abs(covariance - np.eye(2)).max() < 4 * math.sqrt(2 / n)


def test_the_chains_start_where_they_are_told() -> None:
    prior = rows(standard_normal(2), 50)
    init = torch.full((50, 2), 100.0, requires_grad=True)
    for adjusted in (False, True):
        run = partial(langevin, prior, flat, step_size=1e-4, adjusted=adjusted, init=init)
        assert torch.equal(run(num_steps=0).z, init.detach())
        z = run(num_steps=1).z
        # One step: drift lambda/2 · 100, noise sqrt(lambda) = 0.01.
        assert (z - 100).abs().max() < 0.005 + 5 * 0.01
        assert (z != 100).any()
    assert (init == 100).all() and init.grad is None
    torch.manual_seed(1)
    expected = prior.sample()
    torch.manual_seed(1)
    assert torch.equal(langevin(prior, flat, num_steps=0, step_size=0.1).z, expected)


@pytest.mark.parametrize(
    ("prior", "name"),
    [
        (rows(OneHotCategorical(torch.ones(3)), 4), "OneHotCategorical"),
        (rows(Codes().prior, 4), "Categorical"),
        (Independent(Categorical(torch.ones(4, 2, 3)), 1), "Categorical"),
    ],
)
def test_langevin_refuses_discrete_priors_by_name(prior: Distribution, name: str) -> None:
    with pytest.raises(TypeError, match=rf"\b{name}\b.*discrete.*Use sir"):
        langevin(prior, flat, num_steps=1, step_size=0.1)


def test_langevin_refuses_priors_without_a_density_by_name() -> None:
    with pytest.raises(TypeError, match=r"\bSampleOnly\b.*Use sir"):
        langevin(SampleOnly(standard_normal(2)), flat, num_steps=1, step_size=0.1)


@pytest.mark.parametrize(("num_steps", "step_size"), [(-1, 0.1), (1, 0.0), (1, -0.1)])
def test_langevin_refuses_impossible_steps(num_steps: int, step_size: float) -> None:
    with pytest.raises(ValueError, match=r"(num_steps|step_size) must be .* got"):
        langevin(rows(standard_normal(2), 4), flat, num_steps=num_steps, step_size=step_size)


def test_langevin_says_why_not_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        langevin(rows(standard_normal(2), 4), flat, num_steps=1, step_size=0.1)


@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("validate", [False, True])
def test_langevin_names_the_step_that_is_not_finite(
    bad: float, adjusted: bool, validate: bool
) -> None:
    """Of adjusted chains, four of five proposals are lost."""
    ratio, prior = _bad_from(3, bad), _pairs(validate)
    with pytest.raises(FloatingPointError, match=r"step 2\b"):
        langevin(prior, ratio, num_steps=5, step_size=0.1, adjusted=adjusted)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("validate", [False, True])
def test_a_proposal_that_is_not_finite_is_rejected(bad: float, validate: bool) -> None:
    """Chains whose last two proposals are lost are where they were after the first two."""
    draws = []
    for ratio, steps in ((_bad_from(4, bad), 4), (_bad_from(99, bad), 2)):
        torch.manual_seed(0)
        draws.append(
            langevin(_pairs(validate), ratio, num_steps=steps, step_size=0.1, adjusted=True)
        )
    assert torch.equal(draws[0].z, draws[1].z)
    torch.testing.assert_close(draws[0].acceptance, draws[1].acceptance / 2)


def _bad_from(first: int, bad: float) -> LogRatio:
    """A log r that is not finite from some call on."""
    calls = 0

    def log_ratio(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        log_r = z.sum(-1)
        return log_r * bad if calls >= first else log_r

    return log_ratio


def _pairs(validate: bool) -> Independent:
    """A prior of two latents; one that validates them says nothing of steps."""
    return Independent(Normal(torch.zeros(4, 2), 1.0, validate_args=validate), 1)
