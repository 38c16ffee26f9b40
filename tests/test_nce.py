"""The NCE objective, and the ratios that heads learn by it, against closed forms."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import Codes, CorrelatedPair, GaussianPair, Ring
from torch import Tensor, nn

from ncprior import NCETrainer, NCPrior, nce_loss, sir
from ncprior.heads.codes import CategoricalHead
from ncprior.heads.networks import MLPHead

log = math.log


def standard_error(values: Tensor) -> float:
    return float(values.double().std()) / math.sqrt(len(values))


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def train(prior: NCPrior, data: Tensor, *, noise_weight: float = 1.0) -> None:
    """Adam with a linear decay to zero, which averages the noise of the last steps away."""
    steps, batch_size = 600, 512
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    trainer = NCETrainer(prior, optimizer, noise_weight=noise_weight)
    for _ in range(steps):
        trainer.step(data[torch.randint(len(data), (batch_size,))])
        schedule.step()
    prior.eval()


# The objective


def test_the_loss_is_the_formula_on_values_by_hand() -> None:
    # softplus(-log a) = log(1 + 1/a) and softplus(log a) = log(1 + a).
    posterior, prior = torch.tensor([log(3.0), 0.0]), torch.tensor([[log(2.0)]])
    plain = 0.5 * (log(4 / 3) + log(2)) + log(3)
    assert nce_loss(posterior, prior).shape == ()
    assert abs(nce_loss(posterior, prior).item() - plain) < 1e-6
    assert torch.equal(nce_loss(posterior, prior), nce_loss(posterior, prior, 1.0))
    doubled = 0.5 * (log(5 / 3) + log(3)) + 2 * log(2)  # log(1 + 2/r) and 2 log(1 + r/2)
    assert abs(nce_loss(posterior, prior, 2.0).item() - doubled) < 1e-6
    halved = 0.5 * (log(7 / 6) + log(3 / 2)) + 0.5 * log(5)  # log(1 + 1/(2r)), log(1 + 2r)/2
    assert abs(nce_loss(posterior, prior, 0.5).item() - halved) < 1e-6


@pytest.mark.parametrize("noise_weight", [0.5, 1.0, 20.0])
def test_the_loss_is_finite_for_ten_thousand_nats(noise_weight: float) -> None:
    wrong = torch.full((4,), 1e4, requires_grad=True)
    loss = nce_loss(-wrong, wrong, noise_weight)
    expected = (1 + noise_weight) * 1e4 + (1 - noise_weight) * log(noise_weight)
    assert abs(loss.item() - expected) < 1e-6 * expected
    (gradient,) = torch.autograd.grad(loss, wrong)
    torch.testing.assert_close(gradient, torch.full((4,), (1 + noise_weight) / 4))

    right = torch.full((4,), 1e4, requires_grad=True)
    loss = nce_loss(right, -right, noise_weight)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, right)[0].abs().max() == 0


@pytest.mark.parametrize("noise_weight", [0.0, -1.0, math.inf, math.nan])
def test_a_noise_weight_must_be_positive_and_finite(noise_weight: float) -> None:
    with pytest.raises(ValueError, match=f"noise_weight.*{noise_weight}"):
        nce_loss(torch.zeros(2), torch.zeros(2), noise_weight)


@pytest.mark.parametrize("noise_weight", [0.1, 1.0, 3.0, 50.0])
def test_the_optimum_is_the_exact_ratio_for_every_noise_weight(noise_weight: float) -> None:
    # q = (5, 3, 2)/10 and p = (1, 4, 5)/10, as samples in exactly these shares: no noise.
    q, p = torch.tensor([5, 3, 2]), torch.tensor([1, 4, 5])
    at_q, at_p = (torch.arange(3).repeat_interleave(counts) for counts in (q, p))

    def loss(table: Tensor) -> Tensor:
        return nce_loss(table[at_q], table[at_p], noise_weight)

    exact = (q.double() / p).log()
    assert slope(loss, exact).abs().max() < 1e-14 * (1 + noise_weight)
    curvature = torch.autograd.functional.hessian(loss, exact)
    assert torch.linalg.eigvalsh(curvature).min() > 0
    # q (1 - D) with D = q/(q + nu p), on the diagonal alone.
    expected = q / 10 * (noise_weight * p / (q + noise_weight * p))
    torch.testing.assert_close(curvature, torch.diag(expected.double()), rtol=1e-6, atol=1e-12)
    for off in (exact + 0.1, exact - log(noise_weight) + 0.1):
        assert slope(loss, off).abs().max() > 1e-3


@pytest.mark.parametrize("noise_weight", [1.0, 5.0])
@pytest.mark.parametrize("problem", [GaussianPair(2.0), Ring()])
def test_no_direction_improves_the_exact_ratio(
    problem: GaussianPair | Ring, noise_weight: float
) -> None:
    # The gradient along a few functions of z, averaged over pairs of draws.
    n = 50_000
    source = problem.source()
    group = source.group(source.start(n, source.encode(problem.data(n))))
    assert group.posterior is not None
    z_q, z_p = group.posterior.sample(), group.prior.sample()
    logit_q = problem.log_r(z_q) - log(noise_weight)
    logit_p = problem.log_r(z_p) - log(noise_weight)
    for f in (torch.ones_like, lambda u: u, torch.square, torch.cos):
        slope_q = -(-logit_q).sigmoid() * f(z_q[:, 0])
        slope_p = noise_weight * logit_p.sigmoid() * f(z_p[:, 0])
        total = slope_q + slope_p
        assert abs(total.double().mean()) < 4 * standard_error(total)

        def shifted(step: Tensor, f: Callable[[Tensor], Tensor] = f) -> Tensor:
            return nce_loss(
                problem.log_r(z_q) + step * f(z_q[:, 0]),
                problem.log_r(z_p) + step * f(z_p[:, 0]),
                noise_weight,
            )

        assert abs(slope(shifted, torch.zeros(())) - total.mean()) < 1e-5 * (1 + noise_weight)


@pytest.mark.parametrize("noise_weight", [1.0, 5.0])
@pytest.mark.parametrize("problem", [GaussianPair(0.5), GaussianPair(4.0), Ring(), Codes()])
def test_the_least_loss_is_the_exact_one(
    problem: GaussianPair | Ring | Codes, noise_weight: float
) -> None:
    n, law = 100_000, problem.law
    x = problem.data(n)
    logit, r = law.log_r - log(noise_weight), np.exp(law.log_r)
    at_q, at_p = np.logaddexp(0, -logit), noise_weight * np.logaddexp(0, logit)
    least = law.weight @ (r * at_q + at_p)
    if noise_weight == 1:
        assert abs(least - (2 * log(2) - 2 * law.jsd)) < 1e-12
    # The variance of either term is at most its second moment.
    tolerance = 4 * math.sqrt(law.weight @ (r * at_q**2 + at_p**2) / n)
    assert tolerance < 0.02 * noise_weight
    prior = NCPrior(problem.source(), problem.head())
    assert abs(prior.nce_loss(x, noise_weight).item() - least) < tolerance
    for scale in (0.5, 2.0):  # a head too flat or too sharp loses
        off = NCPrior(problem.source(), problem.head(scale))
        assert off.nce_loss(x, noise_weight) > least + tolerance


def test_each_group_has_its_own_least_loss() -> None:
    pair, n = CorrelatedPair(), 100_000
    loss = NCPrior(pair, pair.heads()).nce_loss(pair.data(n))
    assert abs(loss[0].item() - 2 * log(2)) < 1e-6  # log r_1 = 0 says nothing
    # A softplus of the logit has a standard deviation below 1 nat here (0.6 at most).
    assert abs(loss[1].item() - (2 * log(2) - 2 * pair.jsd)) < 4 * math.sqrt(2 / n)


# What heads learn


@pytest.mark.parametrize("noise_weight", [1.0, 4.0])
def test_a_head_recovers_the_ratio_of_a_gaussian_pair(noise_weight: float) -> None:
    pair = GaussianPair(kl=2.0)
    head = MLPHead((2,), width=64, depth=1)
    train(NCPrior(pair.source(), head), pair.data(200_000), noise_weight=noise_weight)

    n = 50_000
    z_q, z_p = pair.target.sample((n,)), pair.prior.sample((n,))
    z = torch.cat([z_q, z_p])
    with torch.no_grad():
        learnt, exact = head(z), pair.log_r(z)
    error = (learnt - exact).square().mean()
    assert 1 - error / exact.var() > 0.99

    # The loss is convex in log r with a curvature of at most 1/4, in either term: the head's
    # excess over L* is between 0 and (E_q + E_p)[error²] / 8, which is error / 4.
    terms = nn.functional.softplus(-learnt[:n]) + nn.functional.softplus(learnt[n:])
    least = 2 * log(2) - 2 * pair.law.jsd
    noise = 4 * standard_error(terms)
    assert least - noise < terms.mean() < least + error / 4 + noise
    assert abs(nce_loss(learnt[:n], learnt[n:]) - terms.mean()) < 1e-5


def test_the_correlation_comes_back_from_an_independent_base() -> None:
    pair, n = CorrelatedPair(), 5_000
    expected = pair.sir_correlation(200)  # 0.797
    noise = 4 * (1 - 0.8**2) / math.sqrt(n)  # of the correlation of n normal pairs

    def correlation(prior: NCPrior) -> float:
        sample = prior.sample(n, partial(sir, num_proposals=200, chunk_size=100_000))
        assert sample.x.shape == (n, 2) and torch.equal(sample.x, torch.cat(sample.latents, 1))
        return float(np.corrcoef(sample.x.numpy().T)[0, 1])

    assert 0.8 - 0.004 < expected < 0.8

    # With exact heads: the law of SIR itself.
    exact = NCPrior(pair, pair.heads())
    assert abs(correlation(exact) - expected) < noise
    with exact.disabled():
        assert abs(correlation(exact)) < 4 / math.sqrt(n)

    learnt = NCPrior(
        pair,
        [
            MLPHead((1,), width=64, depth=1),
            MLPHead((1,), context_shape=(1,), width=64, depth=1),
        ],
    )
    train(learnt, pair.data(200_000))
    z = pair.data(n) + pair.width * torch.randn(n, 2)
    with torch.no_grad():
        log_r = learnt.log_ratio([z[:, :1], z[:, 1:]])
    exact_log_r = pair.log_r(z[:, 1:], z[:, :1])
    error = (log_r[:, 1] - exact_log_r).square().mean()
    assert 1 - error / exact_log_r.var() > 0.97
    nothing = log_r[:, 0].square().mean()  # what group 1 has to say
    assert nothing < 0.1**2
    # To first order, errors e_k of log r_k move E[z_1 z_2] by E[z_1 Cov(z_2, e_2 | z_1)] and by
    # E[e_1 (z_1 z_2 - 0.8)], at most 0.6 rms(e_2) and sqrt(1 + 0.8²) rms(e_1) (Cauchy-Schwarz).
    slack = 0.6 * error.sqrt() + 1.28 * nothing.sqrt()
    assert slack < 0.15
    assert abs(correlation(learnt) - expected) < noise + slack


def test_a_categorical_head_learns_the_exact_ratio() -> None:
    codes = Codes()
    head = CategoricalHead((), codes.num_categories, width=16, depth=1)
    prior = NCPrior(codes.source(), head)
    train(prior, codes.data(200_000))
    z = torch.arange(codes.num_categories)
    with torch.no_grad():
        error = head(z) - codes.log_r(z)
    # The last third of the steps, n = 10^5 draws of each kind, fixes log(q_i/p_i) to a standard
    # error of sqrt(1/(n q_i) + 1/(n p_i)) <= 0.0145; the steps' own noise may double it.
    assert error.abs().max() < 4 * 2 * 0.0145

    # And draws as the exact head does. An error of 0.12 in log r of every code moves a
    # probability p by at most 0.24 p (1 - p).
    n, num_proposals = 20_000, 50
    draw = prior.sample(n, partial(sir, num_proposals=num_proposals))
    assert draw.x.shape == (n, 4)
    expected = codes.law.probabilities(num_proposals)
    variance = expected * (1 - expected)
    slack = 0.24 * variance + 4 * np.sqrt(variance / n)
    assert (np.abs(draw.x.mean(0).numpy() - expected) < slack).all()


@pytest.mark.parametrize(
    ("q", "p", "weight", "match"),
    [
        ([0.0], torch.zeros(2), 1.0, "log_r_posterior must be of type Tensor"),
        (torch.zeros(2), None, 1.0, "log_r_prior must be of type Tensor; got None"),
        (
            torch.zeros(0),
            torch.zeros(2),
            1.0,
            "log_r_posterior must be a tensor of floats with 1 or",
        ),
        (torch.zeros(2), torch.zeros(2).long(), 1.0, "log_r_prior must be a tensor of floats"),
        (torch.zeros(2), torch.zeros(2), "1", "noise_weight must be a number"),
        (torch.zeros(2), torch.zeros(2), torch.nan, "noise_weight must be a number"),
    ],
)
def test_F26_F36_arguments_of_the_loss(q: Any, p: Any, weight: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        nce_loss(q, p, weight)
