"""Tempered sequential Monte Carlo, against targets that are known."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers.problems import Codes, GaussianPair, SampleOnly, TwoBumps
from scipy import stats
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior.samplers import smc as smc_module
from ncprior.samplers.langevin import hmc_step
from ncprior.samplers.sir import sir
from ncprior.samplers.smc import _systematic, tempered_smc
from ncprior.samplers.target import Point, Target


@pytest.mark.parametrize("share", [False, True])
def test_it_recovers_what_sir_cannot_at_kl_12(share: bool) -> None:
    """The mean within 5 %, where SIR with 5,000 proposals gets 0.6956 of it (design, section 6)."""
    problem, rows = GaussianPair(kl=12.0), 400
    prior = problem.prior.expand((rows,))
    draw = tempered_smc(
        prior, problem.log_r, num_particles=1 if share else 30, num_moves=3, share_particles=share
    )
    u = problem.project(draw.z)
    assert u.mean() / problem.shift == pytest.approx(1, abs=0.05)
    assert u.std() == pytest.approx(1, abs=0.15)
    assert draw.log_mean_weight is not None
    assert draw.log_mean_weight.mean().item() == pytest.approx(0, abs=0.5)
    assert draw.acceptance is not None
    assert 0.4 < draw.acceptance.mean() < 0.9
    few = problem.project(sir(prior, problem.log_r, num_proposals=5000).z)
    assert few.mean() / problem.shift == pytest.approx(0.6956, abs=0.03)


@pytest.mark.parametrize("share", [False, True])
def test_both_modes_are_found_in_their_shares(share: bool) -> None:
    problem = TwoBumps(center=1.5, width=0.3)
    prior = problem.prior.expand((2000,))
    draw = tempered_smc(
        prior, problem.log_r, num_particles=1 if share else 20, num_moves=4, share_particles=share
    )
    z = draw.z[:, 0]
    assert abs((z > 0).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(2000) * (2 if share else 1)

    uniform = 2 * problem.target.cdf(z.abs()) - 1
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.001


def test_hmc_goes_further_than_mala_with_as_many_gradients() -> None:
    """64 narrow latents keep steps short, and one that is wide has a long way to go.

    After 24 gradients, 0.03 of the way are left to HMC and 0.54 to MALA.
    """
    calls = []

    def log_r(z: Tensor) -> Tensor:
        calls.append(1)
        return 3 * z[..., 0] - 5 * z[..., 1:].square().sum(-1)  # r·p: N(3, 1), and 64 N(0, 1/11)

    left = []
    for moves, leapfrogs in ((24, 1), (8, 3)):
        torch.manual_seed(0)
        prior = Independent(Normal(torch.zeros(2000, 65), 1.0), 1)
        draw = tempered_smc(
            prior,
            log_r,
            num_particles=1,
            num_moves=moves,
            num_leapfrogs=leapfrogs,
            step_size=0.05,
        )
        left.append(1 - draw.z[:, 0].mean().item() / 3)
        assert len(calls) == 25
        calls.clear()
    assert left[0] > 0.4
    assert left[1] < 0.1


def test_a_flat_ratio_takes_one_temperature_and_keeps_the_base() -> None:
    prior = GaussianPair(kl=1.0).prior.expand((4000,))
    calls = []

    def flat(z: Tensor) -> Tensor:
        calls.append(1)
        return 0 * z.sum(-1)

    draw = tempered_smc(prior, flat, num_particles=2, num_moves=1)
    assert len(calls) == 2  # the start and the end of one move
    assert torch.equal(draw.log_mean_weight, torch.zeros(4000))  # type: ignore[arg-type]
    assert stats.kstest(draw.z[:, 0].numpy(), "norm").pvalue > 0.01


def test_rows_keep_to_themselves_unless_they_share() -> None:
    """Rows of different targets: each finds its own."""
    means = torch.tensor([[-3.0], [0.0], [4.0]]).repeat(200, 1)
    problem = GaussianPair(kl=1.0, dim=1)

    def log_ratio(z: Tensor) -> Tensor:
        return (z * means).sum(-1)

    draw = tempered_smc(problem.prior.expand((600,)), log_ratio, num_particles=100, num_moves=3)
    found = draw.z.reshape(200, 3).mean(0)
    assert torch.allclose(found, means[:3, 0], atol=0.25)
    assert draw.log_mean_weight is not None
    log_z = draw.log_mean_weight.reshape(200, 3).mean(0)
    assert torch.allclose(log_z, 0.5 * means[:3, 0] ** 2, atol=0.5)


def test_the_log_mean_weight_is_an_estimate_of_log_z() -> None:
    problem = GaussianPair(kl=4.0)
    prior = problem.prior.expand((500,))
    draw = tempered_smc(
        prior, lambda z: 2 * problem.log_r(z), num_particles=50, num_moves=4, share_particles=True
    )
    assert draw.log_mean_weight is not None
    assert draw.log_mean_weight[0].item() == pytest.approx(8.0, abs=0.15)  # KL · 2 · (2 - 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_particles", 0), ("num_moves", 0), ("ess_fraction", 1.0), ("max_temperatures", 0)],
)
def test_impossible_numbers_are_refused(name: str, value: float) -> None:
    options = {"num_particles": 2, name: value}
    with pytest.raises(ValueError, match=rf"{name} must be a (whole )?number in .* got {value}"):
        tempered_smc(GaussianPair().prior.expand((3,)), lambda z: z.sum(-1), **options)  # type: ignore[arg-type]


def test_too_few_temperatures_say_so() -> None:
    problem = GaussianPair(kl=12.0)
    with pytest.raises(ValueError, match="β is 0"):
        tempered_smc(
            problem.prior.expand((5,)), problem.log_r, num_particles=10, max_temperatures=2
        )


def test_priors_without_gradients_are_refused() -> None:
    with pytest.raises(TypeError, match="discrete"):
        tempered_smc(Codes().prior.expand((3,)), Codes().log_r, num_particles=5)
    with pytest.raises(TypeError, match="can only be sampled"):
        tempered_smc(SampleOnly(GaussianPair().prior), lambda z: z.sum(-1), num_particles=5)


def test_log_r_that_is_not_finite_is_reported() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        tempered_smc(GaussianPair().prior.expand((3,)), lambda z: z.sum(-1) / 0, num_particles=5)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_a_population_is_large_enough_however_small_the_batch(batch: int) -> None:
    """Nine tenths in one mode, of which a chain from the base would know nothing."""
    target = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.9, 0.1])),
        torch.distributions.Normal(torch.tensor([4.0, -4.0]), 0.5),
    )
    base = torch.distributions.Normal(torch.zeros(batch), 1.0)

    def log_r(z: Tensor) -> Tensor:
        return target.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)

    torch.manual_seed(0)
    smc = partial(tempered_smc, num_particles=1, num_moves=8, share_particles=True)
    calls = max(2, min(60, 200 // batch))
    z = torch.cat([smc(base, log_r).z for _ in range(calls)])
    share = (z > 0).float().mean()
    # Independent populations, whose shares have a standard deviation of 0.045 each.
    assert abs(share - 0.9) < 4 * math.sqrt(0.09 / len(z) + 0.002 / calls)


def test_particles_are_resampled_as_often_as_they_weigh() -> None:
    log_w = torch.randn(50, 3)
    counts = torch.stack([_systematic(log_w)[:, row].bincount(minlength=50) for row in range(3)])
    expected = 50 * log_w.softmax(0).mT
    assert (counts - expected).abs().max() < 1
    torch.manual_seed(0)
    rows = torch.stack([_systematic(log_w) for _ in range(4000)])
    mean = torch.stack([(rows == k).float().mean((0, 1)) for k in range(50)])
    torch.testing.assert_close(mean, log_w.softmax(0), atol=0.002, rtol=0)
    first = torch.stack(
        [(rows[:, 0] == k).float().mean(0) for k in range(50)]
    )  # any place is alike
    torch.testing.assert_close(first, log_w.softmax(0), atol=0.03, rtol=0)


def test_shared_rows_without_a_finite_ratio_are_not_told_of_a_context() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        tempered_smc(
            GaussianPair().prior.expand((3,)),
            lambda z: math.nan * z.sum(-1),
            num_particles=1,
            share_particles=True,
        )


def test_a_trajectory_that_overflows_is_rejected() -> None:
    """The base is so narrow that the first steps are hundreds of times too long: r·p = N(σ, σ²)."""
    sigma = 0.01
    prior = Independent(Normal(torch.zeros(4000, 2), sigma), 1)
    lost, evaluated = [], Target.proposed

    def noted(target: Target, z: Tensor, last: Point) -> tuple[Point, Tensor]:
        point, is_finite = evaluated(target, z, last)
        lost.append(int((~is_finite).sum()))
        return point, is_finite

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "proposed", noted)
        draw = tempered_smc(
            prior, lambda z: z.sum(-1) / sigma, num_particles=1, num_moves=60, num_leapfrogs=20
        )
    assert sum(lost) > 1000
    z = draw.z.flatten() / sigma
    assert abs(z.mean() - 1) < 4 / math.sqrt(len(z))
    assert abs(z.std() - 1) < 4 / math.sqrt(2 * len(z))


def test_a_step_may_be_a_large_whole_number() -> None:
    """Every proposal of a first step of 10^30 is lost."""
    prior = Independent(Normal(torch.zeros(4, 2), 1.0), 1)
    with pytest.raises(FloatingPointError, match="smaller step_size"):
        tempered_smc(prior, lambda z: -(z**4).sum(-1), num_particles=1, step_size=10**30)


def test_one_chain_alone_hardly_adapts_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step must not follow from what has just happened to it, or its draws are biased.

    It changes by a factor of exp(0.75 / 17) = exp(0.0441) at most.
    """
    steps: list[float] = []

    def noted(target: Target, at: Point, step: Tensor, *rest: Any) -> tuple[Point, Tensor]:
        steps.append(float(step.flatten()[0]))
        return hmc_step(target, at, step, *rest)

    monkeypatch.setattr(smc_module, "hmc_step", noted)
    monkeypatch.setattr(smc_module, "_JITTER", (1.0, 1.0))  # of what is adapted, in each move
    for rows, most in ((1, 0.0442), (4000, 0.75)):
        steps.clear()
        prior = Independent(Normal(torch.zeros(rows, 1), 1.0), 1)
        tempered_smc(prior, lambda z: -8 * z.square().sum(-1), num_particles=1, num_leapfrogs=2)
        change = abs(math.log(steps[1] / steps[0]))
        assert 0 < change <= most
    assert change > 0.1


def test_a_trajectory_of_one_length_does_not_lead_back_to_its_start() -> None:
    """In one dimension three leapfrogs at the limit of stability are nearly a whole turn."""
    torch.manual_seed(0)
    prior = Normal(torch.zeros(4000), 1.0)
    draw = tempered_smc(prior, lambda z: -2 * (z - 3) ** 2, num_particles=4, num_leapfrogs=3)
    assert draw.z.mean().item() == pytest.approx(2.4, abs=0.06)  # N(2.4, 0.2)
    assert draw.z.var().item() == pytest.approx(0.2, abs=0.06)  # 0.47 with one length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_several_leapfrogs_keep_the_dtype(dtype: torch.dtype) -> None:
    prior = Independent(Normal(torch.zeros(8, 2, dtype=dtype), 1.0), 1)
    for leapfrogs in (1, 3):
        draw = tempered_smc(
            prior, lambda z: z.float().sum(-1), num_particles=2, num_leapfrogs=leapfrogs
        )
        assert draw.z.dtype == dtype
