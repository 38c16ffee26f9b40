"""SIR and Langevin dynamics against exact laws. A tolerance is a number of standard errors."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import (
    Array,
    Codes,
    GaussianPair,
    Ring,
    SampleOnly,
    SIRLaw,
    TwoBumps,
    mala_acceptance,
    standard_normal,
    two_point_law,
    ula_variance,
)
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, OneHotCategorical

from ncprior import langevin, sir
from ncprior.distributions import expand
from ncprior.heads.networks import MLPHead
from ncprior.samplers.base import latents_at_once
from ncprior.samplers.proposals import Proposals

LogRatio = Callable[[Tensor], Tensor]

# A p-value below this has the chance of a miss by four standard errors.
RARE = 6e-5


def rows(distribution: Distribution, n: int) -> Distribution:
    """The same distribution in n rows."""
    return distribution.expand((n,))


def flat(z: Tensor) -> Tensor:
    """log r = 0 of latents with one event axis."""
    return torch.zeros_like(z[..., 0])


def standard_error(values: Tensor) -> float:
    return float(values.double().std()) / math.sqrt(len(values))


def law_p_value(draws: Tensor, nodes: Array, probabilities: Array, bins: int = 40) -> float:
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
    """A log-ratio that remembers the latents it was asked for and what it said."""

    def __init__(self, log_ratio: LogRatio) -> None:
        self.log_ratio = log_ratio
        self.z: list[Tensor] = []
        self.log_r: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        log_r = self.log_ratio(z)
        self.z.append(z.clone())
        self.log_r.append(log_r.clone())
        return log_r


# The yardstick itself


@pytest.mark.parametrize(
    ("kl", "mean", "log_z"),
    [
        (1, (0.9087, 0.9868, 0.9985), (-0.051, -0.006, -0.001)),
        (4, (0.677, 0.852, 0.945), (-0.705, -0.228, -0.061)),
        (8, (0.521, 0.686, 0.805), (-2.347, -1.178, -0.564)),
        (12, (0.4375, 0.5833, 0.6956), (-4.443, -2.654, -1.575)),
    ],
)
def test_the_quadrature_gives_the_published_table(
    kl: float, mean: tuple[float, ...], log_z: tuple[float, ...]
) -> None:
    pair = GaussianPair(kl)
    law = pair.law
    digits = 4 if kl in (1, 12) else 3
    for m, expected_mean, expected_log_z in zip((50, 500, 5000), mean, log_z, strict=True):
        # Half a unit of the last digit, and a hundredth of that for a tie.
        assert abs(law.mean(law.nodes, m) / pair.shift - expected_mean) < 0.51 * 10**-digits
        assert abs(law.mean_log_z(m) - expected_log_z) < 0.51e-3


@pytest.mark.parametrize("problem", [GaussianPair(1), GaussianPair(12), Ring(), Codes()])
def test_the_quadrature_is_exact_where_the_answer_is_known(
    problem: GaussianPair | Ring | Codes,
) -> None:
    law = problem.law
    assert abs(law.weight @ np.exp(law.log_r) - 1) < 1e-12
    for m in (1, 3, 1000):
        assert abs(law.probabilities(m).sum() - 1) < 1e-12
    # One proposal is a draw from the base, and its log-weight is log r.
    assert np.abs(law.probabilities(1) - law.weight).max() < 1e-12
    assert abs(law.mean_log_z(1) - law.weight @ law.log_r) < 1e-9
    # L* = 2 log 2 - 2 JSD.
    loss = law.weight @ (
        np.exp(law.log_r) * np.logaddexp(0, -law.log_r) + np.logaddexp(0, law.log_r)
    )
    assert abs(loss - (2 * math.log(2) - 2 * law.jsd)) < 1e-12


@pytest.mark.parametrize("problem", [GaussianPair(1.0), Ring(), Codes()])
def test_a_pretend_vae_has_the_stated_base_and_aggregate_posterior(
    problem: GaussianPair | Ring | Codes,
) -> None:
    n, law, source = 50_000, problem.law, problem.source()
    group = source.group(source.start(n, source.encode(problem.data(n))))
    assert group.posterior is not None
    z_q, z_p = group.posterior.sample(), group.prior.sample()
    assert law_p_value(problem.project(z_p), law.nodes, law.weight) > RARE
    assert law_p_value(problem.project(z_q), law.nodes, law.weight * np.exp(law.log_r)) > RARE
    # E_q[D] + E_p[D] = 1 with D = sigmoid(log r) holds for the exact ratio, in every dimension.
    balance = problem.log_r(z_q).sigmoid() + problem.log_r(z_p).sigmoid() - 1
    assert abs(balance.mean()) < 4 * standard_error(balance)


# SIR against the quadrature


@pytest.mark.parametrize(
    ("kl", "num_proposals", "num_rows"),
    [(0.5, 5, 40_000), (1, 50, 20_000), (4, 50, 20_000), (4, 500, 4_000), (8, 500, 4_000)],
)
def test_sir_has_the_exact_mean_law_and_log_z(
    kl: float, num_proposals: int, num_rows: int
) -> None:
    pair = GaussianPair(kl)
    draw = sir(
        rows(pair.prior, num_rows), pair.log_r, num_proposals=num_proposals, chunk_size=200_000
    )
    assert draw.z.shape == (num_rows, 2)
    assert draw.ess is not None and draw.log_mean_weight is not None
    u = pair.project(draw.z)
    law = pair.law
    assert abs(u.mean() - law.mean(law.nodes, num_proposals)) < 3 * standard_error(u)
    error = draw.log_mean_weight.double().mean() - law.mean_log_z(num_proposals)
    assert abs(error) < 3 * standard_error(draw.log_mean_weight)
    assert law_p_value(u, law.nodes, law.probabilities(num_proposals)) > RARE
    # Across mu, SIR leaves the base alone.
    across = (draw.z[:, 0] - draw.z[:, 1]) / math.sqrt(2)
    assert stats.kstest(across.numpy(), "norm").pvalue > RARE


@pytest.mark.parametrize("chunk_size", [1, 70_000, 10**9])
def test_the_law_of_sir_does_not_depend_on_the_chunk(chunk_size: int) -> None:
    # 70,000 latents are three proposals of every row: 1 + 6·3 + 1.
    ring, num_rows, num_proposals = Ring(), 20_000, 20
    draw = sir(
        rows(ring.prior, num_rows), ring.log_r, num_proposals=num_proposals, chunk_size=chunk_size
    )
    assert draw.log_mean_weight is not None
    law = ring.law
    probabilities = law.probabilities(num_proposals)
    assert law_p_value(ring.project(draw.z), law.nodes, probabilities, bins=20) > RARE
    error = draw.log_mean_weight.double().mean() - law.mean_log_z(num_proposals)
    assert abs(error) < 3 * standard_error(draw.log_mean_weight)


@pytest.mark.parametrize("chunk_size", [1, 12, 1000])
def test_sir_reports_the_ess_and_log_z_of_its_own_proposals(chunk_size: int) -> None:
    record = Recorder(GaussianPair(2.0).log_r)
    draw = sir(rows(standard_normal(2), 3), record, num_proposals=50, chunk_size=chunk_size)
    z, log_r = torch.cat(record.z), torch.cat(record.log_r).double()
    assert log_r.shape == (50, 3)
    assert max(part.numel() for part in record.log_r) <= max(chunk_size, 3)
    assert draw.ess is not None and draw.log_mean_weight is not None
    assert draw.acceptance is None
    r = log_r.exp()
    torch.testing.assert_close(draw.ess.double(), r.sum(0) ** 2 / (r**2).sum(0), rtol=1e-5, atol=0)
    log_z = log_r.logsumexp(0) - math.log(50)
    torch.testing.assert_close(draw.log_mean_weight.double(), log_z, rtol=0, atol=1e-5)
    for row in range(3):  # each draw is one of the proposals of its own row
        assert (draw.z[row] == z[:, row]).all(-1).any()


def test_sir_on_two_points_has_its_exact_law() -> None:
    assert abs(two_point_law(0.3, 3.0, 3) - 0.4536) < 1e-12
    both = SIRLaw(np.array([0, 1]), np.array([0.7, 0.3]), np.log([1.0, 3.0]))
    assert abs(both.probabilities(3)[1] - two_point_law(0.3, 3.0, 3)) < 1e-12

    n = 100_000
    prior = rows(Categorical(torch.tensor([0.7, 0.3])), n)
    draw = sir(prior, lambda z: z * math.log(3.0), num_proposals=3)
    share = draw.z.double().mean()
    assert abs(share - 0.4536) < 3 * math.sqrt(0.4536 * 0.5464 / n)  # binomial
    assert abs(share - 0.5625) > 50 * math.sqrt(0.4536 * 0.5464 / n)  # the limit M -> oo it is not


def slope(x: list[int] | list[float], y: list[float]) -> float:
    """The slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def test_the_bias_of_sir_falls_like_one_over_m() -> None:
    limit = 0.3 * 3 / (0.3 * 3 + 0.7)
    large = [256, 512, 1024]
    exact = slope(large, [limit - two_point_law(0.3, 3.0, m) for m in large])
    assert abs(exact + 1) < 4 / large[0]  # bias = c/M + O(1/M²)

    n, counts = 200_000, [2, 4, 8, 16]
    prior = rows(Categorical(torch.tensor([0.7, 0.3])), n)
    drawn = [
        limit
        - float(
            sir(prior, lambda z: z * math.log(3.0), num_proposals=m, chunk_size=10**6)
            .z.double()
            .mean()
        )
        for m in counts
    ]
    truth = [limit - two_point_law(0.3, 3.0, m) for m in counts]
    # The slope is linear in log bias, whose standard error is sqrt(.5·.5/n)/bias: at most the sum.
    x = np.log(counts) - np.mean(np.log(counts))
    relative = np.sqrt(0.25 / n) / np.array(truth)
    error = math.sqrt(((x * relative) ** 2).sum()) / (x**2).sum()
    assert abs(slope(counts, drawn) - slope(counts, truth)) < 4 * error
    assert abs(slope(counts, drawn) + 1) < 0.15 + 4 * error  # O(1/M²) bends it at small M


def test_a_discrete_prior_is_drawn_by_its_exact_law() -> None:
    codes, n = Codes(), 50_000
    draw = sir(rows(codes.prior, n), codes.log_r, num_proposals=10)
    assert draw.z.shape == (n,) and not draw.z.is_floating_point()
    assert law_p_value(draw.z, codes.law.nodes, codes.law.probabilities(10)) > RARE


# SIR at the edges


@pytest.mark.parametrize("constant", [0.0, 7.0, -1e4, 1e4])
def test_a_constant_ratio_draws_from_the_base(constant: float) -> None:
    prior = rows(standard_normal(1), 20_000)
    draw = sir(prior, lambda z: flat(z) + constant, num_proposals=10)
    assert draw.ess is not None and draw.log_mean_weight is not None
    assert (draw.ess - 10).abs().max() < 1e-4  # float32 sums of ten ones
    assert (draw.log_mean_weight - constant).abs().max() <= max(1e-5, 1e-7 * abs(constant))
    assert stats.kstest(draw.z[:, 0].numpy(), "norm").pvalue > RARE


def test_one_proposal_is_the_base_draw_bit_for_bit() -> None:
    prior = rows(standard_normal(3), 5)
    torch.manual_seed(1)
    expected = prior.sample()
    torch.manual_seed(1)
    assert torch.equal(sir(prior, lambda z: 5 * z.sum(-1), num_proposals=1).z, expected)


def test_log_ratios_of_ten_thousand_nats_are_no_trouble() -> None:
    record = Recorder(lambda z: 1e4 * z[..., 0].sign())
    draw = sir(rows(standard_normal(1), 500), record, num_proposals=20, chunk_size=2_000)
    positive = (torch.cat(record.log_r) > 0).sum(0)
    assert draw.ess is not None and draw.log_mean_weight is not None
    some = positive > 0  # all but 500 · 2^-20 of the rows
    assert (draw.z[some] > 0).all()
    torch.testing.assert_close(draw.ess[some], positive[some].float(), rtol=1e-5, atol=0)
    expected = 1e4 + (positive[some] / 20).log()
    torch.testing.assert_close(draw.log_mean_weight[some], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 5, 19])
def test_a_single_bad_log_ratio_is_an_error(bad: float, position: int) -> None:
    seen = 0

    def log_ratio(z: Tensor) -> Tensor:
        nonlocal seen
        log_r = z[..., 0].clone()
        if seen <= position < seen + len(z):
            log_r[position - seen, 1] = bad
        seen += len(z)
        return log_r

    with pytest.raises(FloatingPointError, match="log r is not finite"):
        sir(rows(standard_normal(2), 4), log_ratio, num_proposals=20, chunk_size=16)


@pytest.mark.parametrize("chunk_size", [1, 4096])
def test_a_row_does_not_feel_the_other_rows(chunk_size: int) -> None:
    prior = rows(standard_normal(2), 50)
    slopes = torch.randn(50)

    def draw(offset: float) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        shift = torch.full((50,), offset)
        shift[:25] = 0
        z, ess, log_z, _ = sir(
            prior, lambda z: slopes * z[..., 0] + shift, num_proposals=30, chunk_size=chunk_size
        )
        assert ess is not None and log_z is not None
        return z, ess, log_z

    for alone, beside_giants in zip(draw(0.0), draw(1e4), strict=True):
        assert torch.equal(alone[:25], beside_giants[:25])


def test_each_row_has_the_law_of_its_own_prior_and_ratio() -> None:
    # Row i: base N(m_i, 1), log r = t_i z, so the limit is N(m_i + t_i, 1): SIR's u is m_i + the
    # draw of a Gaussian pair of shift t_i. Both rows of a pair differ; neighbours are independent.
    n, num_proposals = 20_000, 20
    offset = torch.tensor([0.0, 5.0]).repeat(n)
    shift = torch.tensor([1.0, -0.5]).repeat(n)
    prior = Normal(offset, 1.0)
    draw = sir(prior, lambda z: shift * z, num_proposals=num_proposals)
    z = (draw.z - offset).reshape(n, 2)
    for column, t in ((z[:, 0], 1.0), (-z[:, 1], 0.5)):
        law = GaussianPair(t**2 / 2).law
        assert law_p_value(column, law.nodes, law.probabilities(num_proposals)) > RARE
    assert abs(np.corrcoef(z.numpy().T)[0, 1]) < 4 / math.sqrt(n)


def test_sir_needs_no_density() -> None:
    pair = GaussianPair(1.0)
    prior = SampleOnly(rows(pair.prior, 20_000))
    draw = sir(prior, pair.log_r, num_proposals=20)
    u = pair.project(draw.z)
    assert abs(u.mean() - pair.law.mean(pair.law.nodes, 20)) < 3 * standard_error(u)


@pytest.mark.parametrize(("num_proposals", "chunk_size"), [(0, 8), (-1, 8), (8, 0)])
def test_sir_refuses_counts_below_one(num_proposals: int, chunk_size: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_proposals}, {chunk_size}"):
        sir(rows(standard_normal(2), 4), flat, num_proposals=num_proposals, chunk_size=chunk_size)


def test_the_shape_of_log_r_is_checked() -> None:
    prior = rows(standard_normal(2), 4)
    with pytest.raises(ValueError, match=re.escape("(1, 4, 2)")):
        sir(prior, lambda z: z, num_proposals=8)
    with pytest.raises(ValueError, match=re.escape("(4, 2)")):
        langevin(prior, lambda z: z, num_steps=1, step_size=0.1)


@pytest.mark.parametrize(
    "sampler",
    [
        partial(sir, num_proposals=8),
        partial(langevin, num_steps=3, step_size=0.1),
        partial(langevin, num_steps=3, step_size=0.1, adjusted=True),
    ],
)
def test_samplers_leave_no_gradients(sampler: Callable[..., tuple[Tensor | None, ...]]) -> None:
    head = MLPHead((2,), width=8, depth=1)
    with torch.no_grad():
        head.out.weight.normal_()
    frozen = nn.Parameter(torch.ones(()), requires_grad=False)
    loc = torch.zeros(4, 2, requires_grad=True)
    before = [p.clone() for p in head.parameters()]
    draw = sampler(Independent(Normal(loc, 1.0), 1), lambda z: frozen * head(z))
    assert all(part is None or not part.requires_grad for part in draw)
    assert loc.grad is None and frozen.grad is None and not frozen.requires_grad
    assert all(p.grad is None and p.requires_grad for p in head.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    assert torch.is_grad_enabled()


MEMORY = """
import resource, sys, torch
from torch.distributions import Independent, Normal
from ncprior.distributions import expand
from ncprior.heads import MLPHead
from ncprior.samplers.base import latents_at_once
from ncprior.samplers.proposals import Proposals
from ncprior.samplers import sir

torch.set_num_threads(1)
head = MLPHead((16,), width=32, depth=1)
prior = Independent(Normal(torch.zeros(4, 16), torch.ones(4, 16)), 1)
sir(prior, head, num_proposals=2)
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for num_proposals in (1_000, 100_000):  # the peak so far: it can only rise
    sir(prior, head, num_proposals=num_proposals)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_proposals() -> None:
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    few, many = map(int, done.stdout.split())
    assert many <= 1.1 * few + 5 * 2**20


# Langevin dynamics


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
    with pytest.raises(ValueError, match=f"got {num_steps}, {step_size}"):
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
    calls = 0

    def log_ratio(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        log_r = z.sum(-1)
        return log_r * bad if calls == 3 else log_r

    # A prior that validates what it is given says nothing of steps.
    prior = Independent(Normal(torch.zeros(4, 2), 1.0, validate_args=validate), 1)
    with pytest.raises(FloatingPointError, match=r"step 2\b"):
        langevin(prior, log_ratio, num_steps=5, step_size=0.1, adjusted=adjusted)


# Shared proposals


def two_points(n: int) -> Categorical:
    return Categorical(torch.tensor([0.7, 0.3]).expand(n, 2))


@pytest.mark.parametrize(("batch", "num_proposals"), [(4, 3), (2, 7), (16, 5), (1, 4)])
def test_shared_proposals_keep_the_law_of_a_row_and_tie_rows_together(
    batch: int, num_proposals: int
) -> None:
    """On two points, with j of M proposals at the second: P(draw = 1 | j) = jr / (jr + M - j)."""
    p, r, n = 0.3, 3.0, 1500 * batch
    j = np.arange(num_proposals + 1)
    weight = stats.binom.pmf(j, num_proposals, p)
    given_j = j * r / (j * r + num_proposals - j)
    mean, covariance = weight @ given_j, weight @ given_j**2 - (weight @ given_j) ** 2
    draws = torch.stack(
        [
            sir(
                two_points(batch),
                lambda z: z * math.log(r),
                num_proposals=num_proposals,
                chunk_size=3 * batch,
                share_proposals=True,
            ).z
            for _ in range(n // batch)
        ]
    ).double()
    of_batch = draws.mean(1)
    error = standard_error(of_batch)
    assert abs(of_batch.mean() - mean) < 4 * error
    assert abs(mean - two_point_law(p, r, num_proposals)) < 1e-12
    expected = covariance + (mean * (1 - mean) - covariance) / batch
    fourth = float((of_batch - of_batch.mean()).pow(4).mean())
    assert abs(of_batch.var() - expected) < 4 * math.sqrt(fourth / len(of_batch))


def test_two_rows_share_a_draw_with_the_probability_of_one_over_the_ess() -> None:
    """With r = 1 that is 1/M, also where the last proposals do not fill all rows."""
    n, m, batch = 5000, 23, 5
    same = 0.0
    for _ in range(n // batch):
        draw = sir(rows(standard_normal(1), batch), flat, num_proposals=m, share_proposals=True)
        pairs = (draw.z[:, None, 0] == draw.z[None, :, 0]).sum() - batch
        same += float(pairs) / (batch * (batch - 1)) / (n // batch)
        assert draw.ess is not None
        assert (draw.ess - m).abs().max() < 1e-3
    # Pairs of a batch are pairwise uncorrelated with r = 1.
    assert abs(same - 1 / m) < 4 * math.sqrt(1 / m / (n / batch * batch * (batch - 1) / 2))


def test_shared_proposals_are_evaluated_once_for_all_rows() -> None:
    record = Recorder(GaussianPair(1.0).log_r)
    draw = sir(
        rows(standard_normal(2), 8),
        record,
        num_proposals=100,
        chunk_size=1024,
        share_proposals=True,
    )
    evaluated = sum(part.numel() for part in record.log_r) - 4 * 8  # but for the check
    assert 100 <= evaluated < 100 + 8
    z, log_r = torch.cat([record.z[0], *record.z[1:]]), torch.cat(record.log_r)
    assert draw.z.shape == (8, 2)
    assert all((z == row).all(-1).any() for row in draw.z)
    assert draw.log_mean_weight is not None
    used = torch.cat(record.log_r[1:]).double().flatten()[:100]
    torch.testing.assert_close(
        draw.log_mean_weight.double(),
        (used.logsumexp(0) - math.log(100)).expand(8),
        rtol=0,
        atol=1e-5,
    )
    assert log_r.shape[1] == 8


@pytest.mark.parametrize(
    ("prior", "log_ratio", "reason"),
    [
        (Normal(torch.arange(4.0), 1.0), lambda z: z, "p.z. differs between rows"),
        (
            Normal(torch.zeros(4), 1.0),
            lambda z: z * torch.arange(4.0),
            "log r.z. differs between rows",
        ),
        (SampleOnly(Normal(torch.zeros(4), 1.0)), lambda z: z, "SampleOnly can only be sampled"),
    ],
    ids=["prior", "ratio", "unknown"],
)
def test_rows_that_differ_do_not_share(prior: Any, log_ratio: LogRatio, reason: str) -> None:
    with pytest.raises(ValueError, match=f"share proposals or particles only if.*{reason}"):
        sir(prior, log_ratio, num_proposals=20, share_proposals=True)


def test_what_a_source_makes_rows_of_can_be_shared() -> None:
    samples = expand(SampleOnly(standard_normal(2)), 6)
    draw = sir(samples, flat, num_proposals=20, share_proposals=True)
    assert draw.z.shape == (6, 2)


@pytest.mark.parametrize("prior", [Normal(torch.randn(5), 2.0), rows(standard_normal(3), 5)])
def test_streamed_proposals_are_the_priors_own_bit_for_bit(prior: Distribution) -> None:
    proposals = Proposals(prior)
    for count in (1, 70, 3):
        torch.manual_seed(1)
        expected = prior.sample((count,))
        torch.manual_seed(1)
        assert torch.equal(proposals(count), expected)


def test_an_accelerator_gets_more_latents_at_once_within_a_bound_on_memory() -> None:
    vectors, maps = (
        torch.empty(1, 16, 16, device="meta"),
        torch.empty(1, 4, 20, 16, 16, device="meta"),
    )
    assert latents_at_once(torch.empty(1, 16, 16), None) == 4096
    assert latents_at_once(vectors, None) == 2**17
    assert latents_at_once(maps, None) == 2**26 // (20 * 16 * 16)
    assert latents_at_once(torch.empty(1, 1, 2**27, device="meta"), None) == 1
    assert latents_at_once(vectors, 7) == 7
