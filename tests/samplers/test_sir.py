"""SIR against exact distributions. A tolerance is a number of standard errors."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers.exact import (
    RARE,
    LogRatio,
    Recorder,
    chi_square_p_value,
    flat,
    rows,
    slope,
    standard_error,
)
from helpers.problems import (
    Codes,
    GaussianPair,
    Ring,
    SampleOnly,
    SIRLaw,
    standard_normal,
    two_point_law,
)
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical, Distribution, Normal, Uniform

from ncprior import sir
from ncprior.distributions import expand
from ncprior.samplers.proposals import Proposals

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
    assert chi_square_p_value(u, law.nodes, law.probabilities(num_proposals)) > RARE
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
    assert chi_square_p_value(ring.project(draw.z), law.nodes, probabilities, bins=20) > RARE
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
    assert chi_square_p_value(draw.z, codes.law.nodes, codes.law.probabilities(10)) > RARE


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
        assert chi_square_p_value(column, law.nodes, law.probabilities(num_proposals)) > RARE
    assert abs(np.corrcoef(z.numpy().T)[0, 1]) < 4 / math.sqrt(n)


def test_sir_needs_no_density() -> None:
    pair = GaussianPair(1.0)
    prior = SampleOnly(rows(pair.prior, 20_000))
    draw = sir(prior, pair.log_r, num_proposals=20)
    u = pair.project(draw.z)
    assert abs(u.mean() - pair.law.mean(pair.law.nodes, 20)) < 3 * standard_error(u)


@pytest.mark.parametrize(("num_proposals", "chunk_size"), [(0, 8), (-1, 8), (8, 0)])
def test_sir_refuses_counts_below_one(num_proposals: int, chunk_size: int) -> None:
    with pytest.raises(ValueError, match=r"must be a whole number in .* got"):
        sir(rows(standard_normal(2), 4), flat, num_proposals=num_proposals, chunk_size=chunk_size)


MEMORY = """
import resource, sys, torch
from torch.distributions import Independent, Normal
from ncprior.distributions import expand
from ncprior.heads import MLPHead
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
        (
            Categorical(logits=torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])),
            lambda z: 0.0 * z,
            "p.z. differs between rows",
        ),
        (
            Uniform(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 6.0]), validate_args=False),
            torch.zeros_like,
            "p.z. differs between rows",
        ),
    ],
    ids=["prior", "ratio", "unknown", "codes", "bounds"],
)
def test_rows_that_differ_do_not_share(prior: Any, log_ratio: LogRatio, reason: str) -> None:
    with pytest.raises(ValueError, match=f"share proposals or particles only if.*{reason}"):
        sir(prior, log_ratio, num_proposals=20, share_proposals=True)


def test_shared_proposals_of_a_prior_without_density_are_all_used() -> None:
    """Draws may cost more than the head, such as those of flow matching: none is thrown away."""
    drawn: list[int] = []

    class Counted(SampleOnly):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            z = super().sample(sample_shape)
            drawn.append(z[..., 0].numel())
            return z

    sir(expand(Counted(standard_normal(2)), 6), flat, num_proposals=24, share_proposals=True)
    assert sum(drawn) == 24


def test_what_a_source_makes_rows_of_can_be_shared() -> None:
    samples = expand(SampleOnly(standard_normal(2)), 6)
    draw = sir(samples, flat, num_proposals=20, share_proposals=True)
    assert draw.z.shape == (6, 2)


@pytest.mark.parametrize("make", [SampleOnly, lambda p: p], ids=["only sampled", "normal"])
@pytest.mark.parametrize(("chunk_size", "calls"), [(None, [50]), (80, [20, 20, 10])])
def test_a_small_job_is_one_call_of_the_head(make: Any, chunk_size: Any, calls: list[int]) -> None:
    """On a GPU, each call of a head costs as much time as hundreds of proposals."""
    prior, seen = expand(make(standard_normal(2)), 4), []

    def log_ratio(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return z.sum(-1)

    draw = sir(prior, log_ratio, num_proposals=50, chunk_size=chunk_size)
    assert [len(z) for z in seen] == calls
    proposals = torch.cat(seen)
    assert len(proposals.flatten(0, 1).unique(dim=0)) == 200  # each is new
    assert (proposals == draw.z).all(-1).any(0).all()


@pytest.mark.parametrize("prior", [Normal(torch.randn(5), 2.0), rows(standard_normal(3), 5)])
def test_streamed_proposals_are_the_priors_own_bit_for_bit(prior: Distribution) -> None:
    proposals = Proposals(prior)
    for count in (1, 70, 3):
        torch.manual_seed(1)
        expected = prior.sample((count,))
        torch.manual_seed(1)
        assert torch.equal(proposals(count), expected)
