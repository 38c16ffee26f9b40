"""Posteriors under a better prior by importance resampling: closed forms, and EM's fixed point."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.bottom_up import BottomUp
from helpers.linear_gaussian import LinearGaussian
from helpers.problems import ExactRatio, SampleOnly
from helpers.toys import KnownLadder, exactly, flat, stir
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ncprior import NCETrainer, NCPrior, SingleGroup
from ncprior.bases import fit_gaussian, latents_of, rebase
from ncprior.recipe.score_term import has_scores
from ncprior.source import sample_posterior
from ncprior.testing import check_source
from ncprior.training import ResampledPosterior
from ncprior.training.particles import Particles

VAE = LinearGaussian()


def moments(resampled: ResampledPosterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of particles of one x that is repeated in all rows."""
    (z,), _ = sample_posterior(resampled, x)
    return z.mean(0), z.var(0)


def close_to(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], rows: int) -> bool:
    """Whether moments of rows draws are within four standard errors, and 2 % for finite S."""
    (mean, variance), (m, v) = found, truth
    return bool(
        ((mean - m).abs() < 4 * (v / rows).sqrt() + 0.02 * v.sqrt()).all()
        and ((variance / v - 1).abs() < 4 * (2 / rows) ** 0.5 + 0.02).all()
    )


# --- weights ---


@pytest.mark.parametrize("vae", [VAE, LinearGaussian(mean_factor=0.8, scale_factor=1.3)])
def test_particles_have_the_posterior_under_a_fitted_base(vae: LinearGaussian) -> None:
    mean, variance = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 0.2])
    base = Independent(Normal(mean, variance.sqrt()), 1)
    x = torch.tensor([[1.2, 0.3]]).expand(2000, 2)
    found = moments(ResampledPosterior(rebase(vae.source(), base), 200), x)
    assert close_to(found, vae.posterior(mean, variance, x[0]), len(x))
    unchanged = moments(ResampledPosterior(vae.source(), 200), x)
    assert close_to(unchanged, vae.posterior(torch.zeros(2), torch.ones(2), x[0]), len(x))


def test_heads_and_strength_are_part_of_the_prior() -> None:
    """r = N(z; m, 1) / N(z; 0, 1), at strength α: the prior is N(α m, 1)."""
    mean = torch.tensor([1.5, 0.0])
    head = ExactRatio(lambda z: z @ mean - 0.5 * mean.square().sum())
    prior = NCPrior(VAE.source(), head).eval()
    x = torch.tensor([[1.0, 1.0]]).expand(2000, 2)

    def is_under(strength: float) -> bool:
        truth = VAE.posterior(strength * mean, torch.ones(2), x[0])
        return close_to(moments(ResampledPosterior(prior, 200), x), truth, len(x))

    for strength in (1.0, 0.5):
        prior.strength = strength
        assert is_under(strength)
    with prior.disabled():
        assert is_under(0.0)
    prior.active = [False]
    assert is_under(0.0)


def test_the_weights_keep_their_heads_where_those_that_they_train_are_disabled() -> None:
    prior = stir(NCPrior.for_source(VAE.source(), torch.randn(9, 2)))
    resampled = ResampledPosterior(prior, 20)
    assert resampled.prior is not None
    with NCPrior.for_source(resampled, torch.randn(9, 2)).disabled():
        assert resampled.prior.is_on(0)


def test_the_prior_is_that_of_the_beginning() -> None:
    """Heads that are trained later do not change the weights, nor does a change of the strength."""
    x = torch.randn(9, 2)
    prior = stir(NCPrior.for_source(VAE.source(), x))
    resampled = ResampledPosterior(prior, 8)

    def weights() -> Tensor:
        torch.manual_seed(1)
        return resampled.encode(x).log_w

    before = weights()
    stir(prior).strength = 0.5
    prior.active = [False]
    assert torch.equal(weights(), before)
    assert resampled.prior is not None
    assert not any(p.requires_grad for p in resampled.prior.parameters())
    assert not resampled.prior.training


def test_chunks_change_nothing_but_the_order_of_draws() -> None:
    x = torch.tensor([[1.2, 0.3]]).expand(2000, 2)
    truth = VAE.posterior(torch.ones(2), torch.tensor([0.5, 0.5]), x[0])
    base = Independent(Normal(torch.ones(2), 0.5**0.5), 1)
    for chunk_size in (1, 7000):  # 1 sample at a time, and 3
        resampled = ResampledPosterior(rebase(VAE.source(), base), 100, chunk_size=chunk_size)
        assert resampled.encode(x).log_w.shape == (2000, 100)
        assert close_to(moments(resampled, x), truth, len(x))


def test_ess_is_that_of_two_weights() -> None:
    """Two z, one of which is e² times as likely: 1 / (w² + (1 - w)²) with w = sigmoid(±2)."""
    base = Independent(Normal(torch.zeros(1), 1.0), 1)
    z = torch.tensor([[0.0], [1.0]])

    class Alternating(Distribution):
        def __init__(self, count: int) -> None:
            super().__init__(torch.Size([count]), torch.Size([1]), validate_args=False)

        def sample(self, sample_shape: Any = ()) -> Tensor:
            return z.repeat_interleave(self.batch_shape[0] // 2, 0)

        def log_prob(self, value: Tensor) -> Tensor:
            return base.log_prob(value) - 2 * value[:, 0]  # p / q = e^{2 z}

    def likelihood(z: Tensor) -> Independent:
        return Independent(Normal(torch.zeros_like(z), 1.0), 1)

    source = SingleGroup(base, lambda x: Alternating(len(x)), lambda z: z, likelihood=likelihood)
    w = torch.tensor(2.0).sigmoid()
    ess = ResampledPosterior(source, 2).ess(torch.zeros(3, 1))
    torch.testing.assert_close(ess, (1 / (w**2 + (1 - w) ** 2)).expand(3))


# --- several groups ---


def test_all_groups_have_the_latents_of_one_particle() -> None:
    resampled = ResampledPosterior(KnownLadder(3), num_samples=5)
    encoding = resampled.encode(torch.randn(50, 3))
    state = resampled.start(50, encoding)
    drawn = []
    for _ in range(resampled.num_groups):
        posterior = resampled.group(state).posterior
        assert posterior is not None
        drawn.append(posterior.sample((3,))[0])
        state = resampled.advance(state, drawn[-1])
    same = [
        (particles == z[:, None]).flatten(2).all(2)
        for particles, z in zip(encoding.latents, drawn, strict=True)
    ]
    assert torch.stack(same).all(0).any(1).all()


def test_groups_and_draws_of_encode_have_the_exact_posterior() -> None:
    """Linear and Gaussian: p(z, b, t | x) is known; encode draws b and z anew for every particle."""
    one = torch.eye(4, dtype=torch.float64)
    z = one[0]
    b, t = 0.6 * z + 0.8 * one[1], -0.5 * z + 0.7 * one[2]
    latents, x = torch.stack([z, b, t]), b + 0.5 * t + 0.3 * z + 0.5 * one[3]
    slope = latents @ x / (x @ x)
    covariance = latents @ latents.T - torch.outer(slope, slope) * (x @ x)
    value, rows = 1.3, 4000
    particles, _ = sample_posterior(
        ResampledPosterior(BottomUp(), 64), torch.full((rows, 1), value)
    )
    drawn = torch.cat(particles, 1).double()
    variance = covariance.diagonal()
    assert ((drawn.mean(0) - value * slope).abs() < 5 * (variance / rows).sqrt()).all()
    found, scale = torch.cov(drawn.T), torch.outer(variance, variance).sqrt()
    assert ((found - covariance).abs() < (5 * (2 / rows) ** 0.5) * scale).all()


# --- the rules of a source ---


def test_the_rules_of_a_source() -> None:
    check_source(ResampledPosterior(VAE.source(), 4), torch.randn(6, 2))
    check_source(ResampledPosterior(KnownLadder(3), 4), torch.randn(6, 3))


def test_particles_are_a_distribution() -> None:
    z = torch.tensor([[[0.0], [1.0]], [[2.0], [3.0]]])
    particles = Particles(z, torch.tensor([[0.0, 0.75]]).log().expand(2, 2).clone())
    particles.log_w[1] = torch.tensor([0.25, 0.75]).log()
    assert particles.sample((5, 3)).shape == (5, 3, 2, 1)
    torch.testing.assert_close(particles.mean, torch.tensor([[1.0], [2.75]]))
    draws = particles.sample((10_000,))
    assert (draws[:, 0] == 1).all()  # the other has weight 0
    share = (draws[:, 1] == 3).float().mean()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 10_000) ** 0.5


def test_what_has_no_density_is_named() -> None:
    class NoDensity(Independent):
        def log_prob(self, value: Tensor) -> Tensor:
            raise NotImplementedError

    x = torch.randn(5, 2)
    whole = VAE.source()
    own = SingleGroup(
        whole.prior,
        lambda x: NoDensity(Normal(x, torch.ones_like(x)), 1),
        lambda z: z,
        likelihood=VAE.decoded,
    )
    with pytest.raises(TypeError, match="the posterior of group 0, a NoDensity"):
        ResampledPosterior(own, 4).ess(x)
    sampler = rebase(whole, SampleOnly(whole.prior))
    with pytest.raises(TypeError, match="the prior of group 0"):
        ResampledPosterior(sampler, 4).ess(x)
    with pytest.raises(ValueError, match=r"does not know p\(x \| z\)"):
        ResampledPosterior(flat(), 4).ess(torch.randn(5, 3))
    twice = ResampledPosterior(ResampledPosterior(whole, 4), 4)
    with pytest.raises(TypeError, match="resampled.source"):
        twice.ess(x)
    with pytest.raises(FloatingPointError, match="infinite for some rows"):
        ResampledPosterior(whole, 4).encode(x.fill_(torch.inf))


def test_there_is_no_score_term_on_particles() -> None:
    x = torch.randn(64, 2)
    prior = NCPrior.for_source(ResampledPosterior(VAE.source(), 4), x)
    assert has_scores(NCPrior.for_source(VAE.source(), x), x)
    assert not has_scores(prior, x)
    trainer = NCETrainer(prior, torch.optim.Adam(prior.parameters()), score_weight=1.0)
    with pytest.raises(TypeError, match="Particles has none. Set score_weight=0"):
        trainer.step(x)


def test_a_loop_of_your_own_trains_on_particles() -> None:
    x = torch.randn(64, 2) + 1
    prior = NCPrior.for_source(VAE.source(), x)
    step = NCPrior(ResampledPosterior(prior, 4), prior.heads)
    before = prior.nce_loss(x).item()
    trainer = NCETrainer(step, torch.optim.Adam(prior.parameters(), lr=1e-2))
    for _ in range(20):
        trainer.step(x)
    assert prior.eval().nce_loss(x).item() < before - 0.05


# --- EM ---


@pytest.mark.parametrize("vae", [VAE, LinearGaussian(mean_factor=0.7, scale_factor=1.5)])
def test_bases_reach_the_prior_of_highest_likelihood(vae: LinearGaussian) -> None:
    """Its Gaussian has the mean of the data, and their covariance less that of the noise.

    The aggregate of q is 0.06 and 0.24 nats below it. A fit of 5 parameters to 4,000 particles
    costs 5 / (2 · 4000) nats at most, less by the share that x decides.
    """
    covariance = torch.tensor([[0.8, 0.3], [0.3, 0.7]]).double()
    mean = torch.tensor([1.0, -1.0]).double()
    x = exactly(mean, covariance + vae.noise**2 * torch.eye(2), 4000).float()
    source: Any = vae.source()
    base = fit_gaussian(latents_of(source, x))
    gaps = [vae.gap(base.loc[0], base.scale[0] @ base.scale[0].T, x)]
    for _ in range(6):
        resampled = ResampledPosterior(rebase(source, base), 64)
        base = fit_gaussian(latents_of(resampled, x))
        gaps.append(vae.gap(base.loc[0], base.scale[0] @ base.scale[0].T, x))
    assert gaps[0] > 0.05
    assert 0 <= gaps[-1] < 1e-3
    assert all(later < earlier + 1e-3 for earlier, later in pairwise(gaps))
