"""Bounds on log p(x), against a linear-Gaussian VAE and the exact law of SIR."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.problems import CorrelatedPair, GaussianPair, SampleOnly, SIRLaw
from scipy.special import logsumexp
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCPrior, SingleGroup
from ncprior.adapters.hvae import HVAE, HVAESource
from ncprior.distributions import PointMass
from ncprior.evaluation.likelihood import log_likelihood
from ncprior.evaluation.normaliser import log_normaliser
from ncprior.source import Group, WrappedSource

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


def error(x: Tensor) -> float:
    return x.std().item() / math.sqrt(len(x))


def test_the_true_posterior_makes_one_draw_exact() -> None:
    x = torch.randn(20, 1)
    found = log_likelihood(linear(), x, num_samples=1)["base"]
    assert torch.allclose(found.lower, evidence(x), atol=1e-5)


def test_the_weights_are_unbiased_and_their_logarithm_is_a_lower_bound() -> None:
    """Of q twice as wide: E exp(bound) = p(x), and E bound < log p(x), rising with S."""
    torch.manual_seed(0)
    x = torch.tensor([[1.0]]).expand(4000, 1)
    means = []
    for num_samples in (1, 5):
        found = log_likelihood(linear(2.0), x, num_samples=num_samples)["base"]
        ratio = (found.lower - evidence(x)).exp()
        assert abs(ratio.mean() - 1) < 4 * error(ratio)
        means.append(ratio.log().mean())
    assert means[0] < means[1] < 0


@pytest.mark.parametrize("chunk_size", [1, 14, 1000])
@pytest.mark.parametrize("batch_size", [2, 50])
def test_chunks_and_batches_do_not_change_the_number_of_draws(
    chunk_size: int, batch_size: int
) -> None:
    """With the exact posterior every chunking gives the same, and a mean over S, not a sum."""
    x = torch.randn(7, 1)
    found = log_likelihood(
        linear(), x, num_samples=11, chunk_size=chunk_size, batch_size=batch_size
    )["base"]
    for bound in (found.lower, found.estimate, found.upper):
        assert torch.allclose(bound, evidence(x), atol=1e-5)


class Problem(NamedTuple):
    """A linear VAE whose base is N(0, 1) and whose heads are `scale` times those of N(mu, 1)."""

    prior: NCPrior
    law: SIRLaw
    kl: float
    scale: float

    @classmethod
    def of(cls, kl: float = 1.0, scale: float = 1.0, width: float = 1.5) -> "Problem":
        pair = GaussianPair(kl=kl, dim=1)
        law = SIRLaw(pair.law.nodes, pair.law.weight, scale * pair.law.log_r)
        return cls(NCPrior(linear(width, pair.prior), pair.head(scale)), law, kl, scale)

    def log_p_sir(self, x: float, num_proposals: int) -> float:
        """log p(x) under SIR(M), by quadrature over its exact law."""
        log_p_x_z = Normal(torch.from_numpy(self.law.nodes), NOISE).log_prob(torch.tensor(x))
        weights = self.law.probabilities(num_proposals)
        return float(logsumexp(log_p_x_z.double().numpy(), b=weights))

    def log_p_ncp(self, x: float) -> float:
        """log p(x) under NCP: r·p/Z is N(scale · mu, 1)."""
        mean = self.scale * math.sqrt(2 * self.kl)
        return Normal(mean, math.sqrt(1 + NOISE**2)).log_prob(torch.tensor(x)).item()


@pytest.mark.parametrize(("num_proposals", "num_pools"), [(1, 1), (3, 1), (20, 2)])
@pytest.mark.parametrize("share_pools", [False, True])
def test_sir_is_unbiased_for_the_exact_law(
    num_proposals: int, num_pools: int, share_pools: bool
) -> None:
    """E exp(bound) is p_SIR(x), by quadrature over SIR's exact law; KL 1, r over-confident."""
    torch.manual_seed(0)
    problem = Problem.of(scale=1.3)
    exact = problem.log_p_sir(1.5, num_proposals)
    found = log_likelihood(
        problem.prior,
        torch.tensor([[1.5]]).expand(6000, 1),
        num_samples=1,
        num_proposals=num_proposals,
        num_pools=num_pools,
        share_pools=share_pools,
        batch_size=4,
    )
    # Rows of a batch may share pools: the means of five batches are independent.
    ratio = (found["sir"].lower - exact).exp().reshape(-1, 20).mean(1)
    assert abs(ratio.mean() - 1) < 4 * error(ratio)
    if num_proposals == 1:
        assert torch.allclose(found["sir"].lower, found["base"].lower)
    else:
        assert abs(found["base"].lower.exp().mean() / math.exp(exact) - 1) > 0.1


def enclosure(num_samples: int, num_pools: int, seeds: int = 20) -> dict[str, tuple[float, float]]:
    """Means over seeds of nll_lower and nll_upper less the exact value, of SIR(5) and NCP."""
    problem = Problem.of(width=2.0)
    values = torch.tensor([-0.5, 0.8, 2.0])
    x = values[:, None]
    exact = {
        "sir": -np.mean([problem.log_p_sir(v, 5) for v in values.tolist()]),
        "ncp": -np.mean([problem.log_p_ncp(v) for v in values.tolist()]),
    }
    ends: dict[str, list[tuple[float, float]]] = {"sir": [], "ncp": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        draws = [math.sqrt(2) + torch.randn(4, 1)]
        log_z = log_normaliser(problem.prior, num_particles=num_samples, replicates=4, exact=draws)
        found = log_likelihood(
            problem.prior,
            x.repeat(100, 1),
            num_samples=num_samples,
            num_proposals=5,
            num_pools=num_pools,
            log_z=log_z,
            chunk_size=100_000,
        )
        for name, pairs in ends.items():
            pairs.append((found[name].nll_lower, found[name].nll_upper))
    return {
        name: (
            np.mean([pair[0] for pair in pairs]) - exact[name],
            np.mean([pair[1] for pair in pairs]) - exact[name],
        )
        for name, pairs in ends.items()
    }


def test_the_bounds_enclose_the_exact_values_and_shrink() -> None:
    """nll_lower ≤ exact ≤ nll_upper over 20 seeds, SIR(5) by quadrature, NCP in closed form."""
    few, many, pools = enclosure(16, 1), enclosure(100, 1), enclosure(16, 8)
    for found in (few, many, pools):
        for low, high in found.values():
            assert low < 0 < high
    for name in ("sir", "ncp"):
        assert np.diff(many[name]) < 0.5 * np.diff(few[name])
    assert np.diff(pools["sir"]) < 0.9 * np.diff(few["sir"])


def test_an_over_confident_head_shows_the_two_models_apart() -> None:
    """With 2 log r, SIR(10) stays between p and the target while NCP overshoots to 2 mu."""
    torch.manual_seed(0)
    problem = Problem.of(kl=2.0, scale=2.0)
    x = torch.full((200, 1), 2.0)
    log_z = log_normaliser(
        problem.prior, num_particles=2000, num_temperatures=30, step_size=1.0, replicates=4
    )
    found = log_likelihood(problem.prior, x, num_samples=200, num_proposals=10, log_z=log_z)
    assert log_z.lower == pytest.approx(4.0, abs=0.05)  # 2 KL
    sir, ncp = problem.log_p_sir(2.0, 10), problem.log_p_ncp(2.0)
    assert sir - ncp > 0.5
    assert found["sir"].nll_lower - 0.02 < -sir < found["sir"].nll_upper + 0.02
    assert found["ncp"].nll_lower - 0.02 < -ncp < found["ncp"].nll_upper + 0.02
    assert found["ncp"].nll_lower - found["sir"].nll_upper > 0.5


def test_strength_and_groups_that_are_off_are_those_of_the_sampler() -> None:
    problem = GaussianPair(kl=1.0, dim=1)
    prior = NCPrior(linear(1.5, problem.prior), problem.head())
    x = torch.randn(30, 1)
    options: Any = {"num_samples": 2, "num_proposals": 10}
    prior.active = [False]
    found = log_likelihood(prior, x, **options)
    assert torch.equal(found["sir"].lower, found["base"].lower)
    prior.active, prior.strength = [True], 0.5
    torch.manual_seed(0)
    half = log_likelihood(prior, x, **options)
    torch.manual_seed(0)
    flat = log_likelihood(NCPrior(prior.source, problem.head(scale=0.5)), x, **options)
    assert torch.allclose(half["sir"].lower, flat["sir"].lower)


class Likely(CorrelatedPair):
    """The correlated pair with p(x | z) = N(z, 0.2²)."""

    def likelihood(self, state: Any) -> Independent:
        return Independent(Normal(self.decode(state), 0.2, validate_args=False), 1)


def test_a_hierarchy_gains_its_groups_divergence() -> None:
    """With exact heads and many proposals NCP is the data's law: the mean gain is its KL."""
    problem = Likely()
    x = problem.data(600)
    prior = NCPrior(problem, problem.heads())
    found = log_likelihood(prior, x, num_samples=20, num_proposals=200, chunk_size=100_000)
    gain = found["sir"].gain_over(found["base"])
    # x is narrower than z, so that its mean log-ratio is only near that of z.
    assert abs(gain.value - problem.kl) < 4 * gain.error + 0.1


def test_bounds_of_a_convolutional_hierarchy_have_one_value_per_image() -> None:
    vae = HVAE(num_groups=3, width=16, hidden=8).eval()
    x = torch.rand(5, 1, 28, 28).bernoulli()
    prior = NCPrior.for_source(HVAESource(vae), x, width=8)
    found = log_likelihood(prior, x, num_samples=3, num_proposals=4)
    assert found["base"].lower.shape == (5,)
    assert torch.equal(found["base"].lower, found["sir"].lower)
    elbo = -torch.stack([vae.negative_elbo(x) for _ in range(20)]).mean(0)
    many = log_likelihood(prior.source, x, num_samples=20)["base"].lower
    assert (many > elbo - 1).all()


def test_a_posterior_that_knows_its_density_at_its_own_draws_will_do() -> None:
    """As that of NVAE with flows, whose inverse is not at hand."""

    class Flowed(Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            raise NotImplementedError

        def sample_and_log_prob(self) -> tuple[Tensor, Tensor]:
            z = self.sample()
            return z, super().log_prob(z).sum(-1)

    class Source(WrappedSource):
        """The linear VAE, with the true posterior as a flow would give it."""

        def group(self, state: Any) -> Any:
            group = self.source.group(state)
            q: Any = group.posterior
            return group._replace(posterior=Flowed(q.mean, q.stddev, validate_args=False))

    x = torch.randn(20, 1)
    source = Source(linear())
    found = log_likelihood(source, x, num_samples=3)["base"]
    assert torch.allclose(found.lower, evidence(x), atol=1e-5)


def test_the_first_item_of_a_batch_is_x() -> None:
    x = torch.randn(30, 1)
    loader = DataLoader(TensorDataset(x, torch.arange(30)), batch_size=8)
    found = log_likelihood(linear(), loader, num_samples=2)["base"]
    assert torch.allclose(found.lower, evidence(x), atol=1e-5)


def test_the_line_names_model_and_numbers() -> None:
    torch.manual_seed(7)
    problem = Problem.of()
    log_z = log_normaliser(problem.prior, num_particles=10)
    found = log_likelihood(
        problem.prior, torch.randn(30, 1), num_samples=9, num_proposals=4, num_pools=2, log_z=log_z
    )
    assert list(found) == ["base", "sir", "ncp"]
    assert str(found["sir"]).startswith("SIR(4), locally normalised: NLL ")
    assert str(found["sir"]).endswith(f"S = 9, L = 2, ESS {found['sir'].ess.mean():.0f}")
    assert str(found["ncp"]).startswith("NCP, globally normalised: NLL ")
    assert str(found["base"]).endswith("S = 9, ESS 8")


def test_what_has_no_likelihood_is_refused() -> None:
    problem = CorrelatedPair()
    with pytest.raises(
        ValueError, match=r"CorrelatedPair does not know p\(x \| z\). Give it a method likelihood"
    ):
        log_likelihood(problem, problem.data(3), num_samples=1)
    with pytest.raises(TypeError, match="can only be sampled"):
        log_likelihood(linear(prior=SampleOnly(linear().prior)), torch.randn(3, 1), num_samples=1)


def test_a_source_alone_has_no_heads_to_measure() -> None:
    with pytest.raises(ValueError, match="Pass an NCPrior"):
        log_likelihood(linear(), torch.randn(3, 1), num_samples=1, num_proposals=5)


def test_pools_are_not_shared_where_there_is_a_context() -> None:
    problem = Likely()
    prior = NCPrior(problem, problem.heads())
    with pytest.raises(ValueError, match="Group 1 has a context"):
        log_likelihood(prior, problem.data(3), num_samples=1, num_proposals=5, share_pools=True)


def test_pools_are_not_shared_where_rows_have_priors_of_their_own() -> None:
    class Blind(WrappedSource):
        def group(self, state: Any) -> Group:
            return super().group(state)._replace(context=None)

    prior = NCPrior(Blind(conditional()), GaussianPair(kl=1.0, dim=1).head())
    x = torch.randn(3, 1)
    with pytest.raises(ValueError, match=r"Group 0 .*differs between rows.*share_pools=False"):
        log_likelihood(prior, [(x, x)], num_samples=8, num_proposals=5, share_pools=True)
    log_likelihood(prior, [(x, 0 * x)], num_samples=8, num_proposals=5, share_pools=True)


def conditional() -> SingleGroup:
    """A VAE with the prior N(c, 1)."""

    def prior(c: Tensor) -> Independent:
        return Independent(Normal(c, 1.0, validate_args=False), 1)

    return SingleGroup(
        prior,
        lambda x, c: prior(x),
        lambda z, c: z,
        likelihood=lambda z, c: prior(z),
        condition=lambda batch: batch[1],
    )


def test_rows_with_few_effective_samples_are_noticed() -> None:
    """One of 100 draws has nearly all of the weight: log p(x) is 60 nats above both ends."""
    torch.manual_seed(0)
    wide = SingleGroup(
        Independent(Normal(torch.zeros(20), 1.0), 1),
        lambda x: Independent(Normal(0.9 * x, 0.5, validate_args=False), 1),
        lambda z: z,
        likelihood=lambda z: Independent(Normal(z, 0.1, validate_args=False), 1),
    )
    x = math.sqrt(1.01) * torch.randn(30, 20)
    exact = Independent(Normal(torch.zeros(20), math.sqrt(1.01)), 1).log_prob(x).mean()
    found = log_likelihood(wide, x, num_samples=100)["base"]
    assert found.ess.max() < 10 and exact > found.upper.mean() + 20
    assert not found.is_two_sided
    assert str(found).startswith(f"base: NLL at most {found.nll_upper:.2f} nats")
    assert log_likelihood(linear(2.0), x[:, :1], num_samples=100)["base"].is_two_sided


def test_a_point_has_no_density() -> None:
    """Its probability of 1 must not be divided into a density of z, which it was."""
    source = SingleGroup(
        Independent(Normal(torch.zeros(2), 1.0), 1),
        lambda x: PointMass(x),
        lambda z: z,
        likelihood=lambda z: Independent(Normal(z, 0.05, validate_args=False), 1),
    )
    with pytest.raises(TypeError, match="posterior of group 0 is a point without a density"):
        log_likelihood(source, torch.randn(5, 2), num_samples=4)


def test_the_error_of_a_gain_covers_log_z() -> None:
    """log Z is one number for all rows: its error does not fall with their number."""
    torch.manual_seed(0)
    problem = GaussianPair(kl=2.0, dim=1)
    prior = NCPrior(linear(1.0, problem.prior), problem.head())
    x, gains = torch.randn(2000, 1), []
    for _ in range(30):
        log_z = log_normaliser(prior, num_particles=50)
        found = log_likelihood(prior, x, num_samples=8, log_z=log_z)
        gains.append(found["ncp"].gain_over(found["base"]))
    over_runs = torch.tensor([gain.value for gain in gains]).std().item()
    of_rows = error(found["ncp"].lower - found["base"].lower)
    told = math.sqrt(sum(gain.error**2 for gain in gains) / len(gains))
    assert (
        0.6 < told / over_runs < 1.6
    )  # 4 standard errors of a deviation of 30 are a factor of 1.6
    assert over_runs > 4 * of_rows  # which was told alone
    assert found["ncp"].gain_over(found["ncp"]).error == 0  # the same log Z


@pytest.mark.parametrize("name", ["num_samples", "num_proposals", "num_pools"])
def test_numbers_below_one_are_refused(name: str) -> None:
    problem = GaussianPair(kl=1.0, dim=1)
    prior = NCPrior(linear(1.0, problem.prior), problem.head())
    options: Any = {"num_samples": 1, "num_proposals": 1, "num_pools": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a whole number in"):
        log_likelihood(prior, torch.randn(3, 1), **options)
