"""Bounds on log p(x), against a linear-Gaussian VAE and the exact law of SIR."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import CorrelatedPair, GaussianPair, SampleOnly, SIRLaw
from scipy.special import logsumexp
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup
from ncprior.adapters.hvae import HVAE, HVAESource
from ncprior.likelihood import iwae, sir_iwae

NOISE = 0.7  # standard deviation of p(x | z) = N(z, NOISE²)


def linear(width: float = 1.0, prior: Any = None) -> SingleGroup:
    """p(z) = N(0, 1), p(x|z) = N(z, 0.7²), and q the true posterior, `width` times as wide."""
    gain, sd = 1 / (1 + NOISE**2), NOISE / math.sqrt(1 + NOISE**2)

    def posterior(x: Tensor) -> Independent:
        return Independent(Normal(gain * x, width * sd, validate_args=False), 1)

    def likelihood(z: Tensor) -> Independent:
        return Independent(Normal(z, NOISE, validate_args=False), 1)

    base = Independent(Normal(torch.zeros(1), 1.0), 1) if prior is None else prior
    return SingleGroup(base, posterior, lambda z: z, likelihood=likelihood)


def evidence(x: Tensor) -> Tensor:
    """log p(x), exactly."""
    return Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(x[:, 0].double())


def test_the_true_posterior_makes_one_draw_exact() -> None:
    x = torch.randn(20, 1)
    assert torch.allclose(iwae(linear(), x, num_samples=1), evidence(x), atol=1e-5)


def test_the_weights_are_unbiased_and_their_logarithm_is_a_lower_bound() -> None:
    """Of q twice as wide: E exp(bound) = p(x), and E bound < log p(x), rising with S."""
    x = torch.tensor([[1.0]]).expand(4000, 1)
    means = []
    for num_samples in (1, 5):
        ratio = (iwae(linear(2.0), x, num_samples=num_samples) - evidence(x)).numpy()
        error = np.exp(ratio).std() / math.sqrt(len(ratio))
        assert abs(np.exp(ratio).mean() - 1) < 4 * error
        means.append(ratio.mean())
    assert means[0] < means[1] < 0


def test_chunks_do_not_change_the_number_of_draws() -> None:
    """With the exact posterior every chunking gives the same, and a mean over S, not a sum."""
    x = torch.randn(7, 1)
    for chunk_size in (1, 14, 1000):
        bound = iwae(linear(), x, num_samples=5, chunk_size=chunk_size)
        assert torch.allclose(bound, evidence(x), atol=1e-5)


@pytest.mark.parametrize(("num_proposals", "num_pools"), [(1, 1), (3, 1), (20, 2)])
def test_sir_is_unbiased_for_the_exact_law(num_proposals: int, num_pools: int) -> None:
    """E exp(bound) is p_SIR(x), by quadrature over SIR's exact law; KL 1, r over-confident."""
    problem = GaussianPair(kl=1.0, dim=1)
    prior = NCPrior(linear(1.5, problem.prior), problem.head(scale=1.3))
    law = SIRLaw(problem.law.nodes, problem.law.weight, 1.3 * problem.law.log_r)
    x = torch.tensor([[1.5]]).expand(6000, 1)
    log_p_x_z = Normal(torch.from_numpy(law.nodes).double(), NOISE).log_prob(torch.tensor(1.5))
    exact = logsumexp(log_p_x_z.numpy(), b=law.probabilities(num_proposals))
    bounds = sir_iwae(prior, x, num_samples=1, num_proposals=num_proposals, num_pools=num_pools)
    ratio = np.exp(bounds.sir.numpy() - exact)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    if num_proposals == 1:
        assert torch.allclose(bounds.sir, bounds.base)
    else:
        assert abs(bounds.base.exp().mean() / math.exp(exact) - 1) > 0.1  # the base is another


def test_strength_and_groups_that_are_off_are_those_of_the_sampler() -> None:
    problem = GaussianPair(kl=1.0, dim=1)
    prior = NCPrior(linear(1.5, problem.prior), problem.head())
    x = torch.randn(30, 1)
    options = {"num_samples": 2, "num_proposals": 10}
    prior.active = [False]
    bounds = sir_iwae(prior, x, **options)
    assert torch.equal(bounds.sir, bounds.base)
    prior.active, prior.strength = [True], 0.5
    torch.manual_seed(0)
    half = sir_iwae(prior, x, **options)
    torch.manual_seed(0)
    flat = sir_iwae(NCPrior(prior.source, problem.head(scale=0.5)), x, **options)
    assert torch.allclose(half.sir, flat.sir)


class Likely(CorrelatedPair):
    """The correlated pair with p(x | z) = N(z, 0.2²)."""

    def likelihood(self, state: Any) -> Independent:
        return Independent(Normal(self.decode(state), 0.2, validate_args=False), 1)


def test_a_hierarchy_gains_its_groups_divergence() -> None:
    """With exact heads and many proposals NCP is the data's law: the mean gain is its KL."""
    problem = Likely()
    x = problem.data(600)
    prior = NCPrior(problem, problem.heads())
    bounds = sir_iwae(prior, x, num_samples=20, num_proposals=200, chunk_size=100_000)
    gain = bounds.sir - bounds.base
    error = gain.std().item() / math.sqrt(len(gain))
    # x is narrower than z, so that its mean log-ratio is only near that of z.
    assert abs(gain.mean().item() - problem.kl) < 4 * error + 0.1


def test_bounds_of_a_convolutional_hierarchy_have_one_value_per_image() -> None:
    vae = HVAE(num_groups=3, width=16, hidden=8).eval()
    x = torch.rand(5, 1, 28, 28).bernoulli()
    prior = NCPrior.for_source(HVAESource(vae), x, width=8)
    bounds = sir_iwae(prior, x, num_samples=3, num_proposals=4)
    assert bounds.base.shape == (5,)
    assert torch.equal(bounds.base, bounds.sir)
    elbo = -torch.stack([vae.negative_elbo(x) for _ in range(20)]).mean(0)
    many = iwae(prior.source, x, num_samples=20)
    assert (many > elbo - 1).all()


def test_a_posterior_that_knows_its_density_at_its_own_draws_will_do() -> None:
    """As that of NVAE with flows, whose inverse is not at hand."""

    class Flowed(Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            raise NotImplementedError

        def sample_and_log_prob(self) -> tuple[Tensor, Tensor]:
            z = self.sample()
            return z, super().log_prob(z).sum(-1)

    class Source:
        """The linear VAE, with the true posterior as a flow would give it."""

        num_groups = 1

        def __init__(self) -> None:
            self.inner = linear()
            self.encode, self.start = self.inner.encode, self.inner.start
            self.advance, self.likelihood = self.inner.advance, self.inner.likelihood

        def group(self, state: Any) -> Any:
            group = self.inner.group(state)
            q: Any = group.posterior
            return group._replace(posterior=Flowed(q.mean, q.stddev, validate_args=False))

    x = torch.randn(20, 1)
    assert torch.allclose(iwae(Source(), x, num_samples=3), evidence(x), atol=1e-5)  # type: ignore[arg-type]


def test_what_has_no_likelihood_is_refused() -> None:
    problem = CorrelatedPair()
    with pytest.raises(ValueError, match="does not know"):
        iwae(problem, problem.data(3), num_samples=1)
    with pytest.raises(TypeError, match="can only be sampled"):
        iwae(linear(prior=SampleOnly(linear().prior)), torch.randn(3, 1), num_samples=1)


@pytest.mark.parametrize("name", ["num_samples", "num_proposals", "num_pools"])
def test_numbers_below_one_are_refused(name: str) -> None:
    problem = GaussianPair(kl=1.0, dim=1)
    prior = NCPrior(linear(1.0, problem.prior), problem.head())
    options = {"num_samples": 1, "num_proposals": 1, "num_pools": 1, name: 0}
    with pytest.raises(ValueError, match="must be at least 1"):
        sir_iwae(prior, torch.randn(3, 1), **options)
