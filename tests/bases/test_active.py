"""Active and collapsed latents: their divergence, and bases and heads that see active ones alone."""

from typing import Any

import pytest
import torch
from helpers.problems import SampleOnly
from helpers.toys import Ladder, base, flat
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    StudentT,
)

from ncprior import NCPrior, SingleGroup
from ncprior.bases.active import active_latents, kl_per_latent
from ncprior.bases.independent import looks_independent
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.mixture_em import fit_gaussian, fit_mixture
from ncprior.bases.rebase import rebase
from ncprior.heads.networks import MLPHead
from ncprior.utils.latent_kl import LatentKL, latent_kl

MEAN, SD = torch.tensor([0.0, 1.5, 0.0, 0.1]), torch.tensor([1.0, 1.0, 0.5, 1.01])


def constant(prior: Any = None, q: Any = None) -> SingleGroup:
    """A source whose posterior is the same for every x."""

    def posterior(x: Tensor) -> Distribution:
        rows = torch.zeros(len(x), 1)
        return q(len(x)) if q else Independent(Normal(MEAN + rows, SD + rows), 1)

    return SingleGroup(base(4) if prior is None else prior, posterior, lambda z: z)


def test_the_divergence_of_gaussians_is_the_closed_form() -> None:
    """KL(N(m, s²) || N(0, 1)) = (m² + s² - 1)/2 - log s."""
    (kl,) = kl_per_latent(constant(), torch.zeros(20, 3), batch_size=7)
    exact = (MEAN.square() + SD.square() - 1) / 2 - SD.log()
    assert torch.allclose(kl, exact.double(), atol=1e-6)
    (active,) = active_latents(constant(), torch.zeros(20, 3))
    assert active.tolist() == [False, True, True, False]
    (active,) = active_latents(constant(), torch.zeros(20, 3), threshold=1e-4)
    assert active.tolist() == [False, True, True, True]


def test_without_a_closed_form_draws_estimate_it() -> None:
    """A Student-t of many degrees of freedom is a Gaussian, up to some 1/degrees."""
    q = Independent(Normal(torch.full((5000, 2), 1.0), torch.ones(5000, 2)), 1)
    kl = latent_kl(q, Independent(StudentT(torch.full((5000, 2), 1e4)), 1))
    assert kl.shape == (5000, 2)
    assert (kl.mean(0) - 0.5).abs().max() < 4 / (5000 * 16) ** 0.5 + 1e-3  # sd of log q - log p: 1
    same = Independent(Laplace(torch.zeros(9, 2), torch.ones(9, 2)), 1)
    assert latent_kl(same, same).abs().max() < 1e-6


def tied(rows: int) -> Distribution:
    return MultivariateNormal(torch.zeros(rows, 4), torch.eye(4))


def codes(rows: int) -> Distribution:
    return Independent(Categorical(logits=torch.zeros(rows, 4, 3)), 1)


@pytest.mark.parametrize(
    "source",
    [
        constant(q=tied),
        constant(SampleOnly(base(4))),
        constant(Independent(Categorical(logits=torch.zeros(4, 3)), 1), codes),
    ],
)
def test_latents_of_unknown_divergence_are_active(source: SingleGroup) -> None:
    assert kl_per_latent(source, torch.zeros(20, 3))[0].isnan().all()
    assert active_latents(source, torch.zeros(20, 3))[0].tolist() == [True] * 4


def test_few_rows_and_noise_leave_a_latent_active() -> None:
    assert active_latents(constant(), torch.zeros(15, 3))[0].all()

    def posterior(x: Tensor) -> Distribution:  # used by few rows: mean KL 0.004 ± 0.004
        return Independent(Normal(x, 1.0), 1)

    x = torch.zeros(1000, 4)
    x[0] = 8**0.5
    assert active_latents(SingleGroup(base(4), posterior, lambda z: z), x)[0].all()


def test_groups_are_visited_in_order() -> None:
    """In a ladder, q is p shifted by what it has of x and z_<k, with standard deviation 0.3."""
    source, x = Ladder(), torch.randn(4000, 3)
    state = torch.get_rng_state()
    found = kl_per_latent(source, x)
    assert torch.equal(torch.get_rng_state(), state)
    walk = source.start(4000, source.encode(x))
    for k, kl in enumerate(found):
        group: Any = source.group(walk)
        shift = group.posterior.mean - group.prior.mean
        exact = (shift.square() + 0.3**2 - 1) / 2 - torch.tensor(0.3).log()
        error = exact.std(0) * (2 / 4000) ** 0.5 * (k > 0)  # of two walks
        assert ((kl - exact.mean(0)).abs() < 4 * error + 1e-5).all()
        walk = source.advance(walk, group.posterior.sample())


@pytest.mark.parametrize("data", [torch.zeros(0, 3), []])
def test_data_without_rows_are_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="no rows"):
        active_latents(flat(), data)


# --- bases


def few_of_many(n: int, d: int = 64) -> Tensor:
    """Draws of q(z) of two bimodal latents, and of collapsed ones."""
    u = torch.randn(n, d)
    u[:, :2] = 0.2 * torch.randn(n, 2) + 2 * torch.randint(2, (n, 2)) - 1
    return u


def log_p(z: Tensor) -> Tensor:
    """The exact log q(z) of :func:`few_of_many`."""
    two = torch.stack([Normal(m, 0.2).log_prob(z[:, :2]) for m in (-1.0, 1.0)]).logsumexp(0)
    return two.sum(1) - 2 * torch.tensor(2.0).log() + Normal(0.0, 1.0).log_prob(z[:, 2:]).sum(1)


@pytest.mark.parametrize("rows", [600, 3000])
def test_N2_a_mixture_is_fitted_to_the_active_latents(rows: int) -> None:
    train, test = few_of_many(rows), few_of_many(3000)
    p = fit_mixture(train, 10, starts=1)
    apart, parts = p.independent_latents()
    assert apart.tolist() == [False] * 2 + [True] * 62
    assert torch.equal(parts.mean[2:], torch.zeros(62))
    assert torch.equal(parts.variance[2:], torch.ones(62))
    missed = (log_p(test) - p.log_prob(test)).mean()
    assert missed < 60 / rows + 0.02  # 10 · 6 parameters cost 30 / rows nats, if EM finds them all
    z = p.sample((2000,))
    assert torch.isfinite(p.whiten(z)).all()
    assert z[:, 2:].std() - 1 < 0.01


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_a_mask_decides_what_is_fitted(covariance: str) -> None:
    z = few_of_many(400, 6).reshape(400, 3, 2) + torch.tensor([0.0, 2.0])
    active = torch.tensor([[True, True], [False, False], [False, False]])
    p = fit_mixture(z, 3, covariance=covariance, active=active)
    apart, parts = p.independent_latents()
    assert torch.equal(apart, ~active)
    assert torch.allclose(parts.mean[1:, 1], z.mean(0)[1:, 1])  # not N(0, 1): its own moments
    assert torch.equal(parts.mean[1:, 0], torch.zeros(2))
    rest = z[:, 1:, 1].var(0, correction=0)
    assert torch.allclose(parts.variance[1:, 1], rest, rtol=1e-4)
    assert p.log_prob(z).shape == (400,) and p.sample((5,)).shape == (5, 3, 2)


def test_without_active_latents_the_base_is_the_prior() -> None:
    p = fit_mixture(torch.randn(3000, 5), 4)
    z = torch.randn(20, 5)
    assert torch.allclose(p.log_prob(z), base(5).log_prob(z), atol=1e-5)
    none = torch.zeros(5, dtype=torch.bool)
    assert fit_gaussian(torch.randn(50, 5), active=none).independent_latents()[0].all()


def test_dependent_latents_are_not_taken_for_independent_ones() -> None:
    z = torch.randn(4000, 8)
    z[:, 1] = z[:, 0] * torch.sign(torch.randn(4000))  # Gaussian, without correlation
    z[:, 3] = 0.3 * z[:, 2] + 0.91**0.5 * z[:, 3]
    z[:, 5] = torch.randn(4000).sign() * (0.8 + 0.6 * torch.randn(4000))
    assert looks_independent(z).tolist() == [False] * 4 + [True, False, True, True]
    assert not looks_independent(z[:50]).any()


def test_the_independent_latents_of_a_mixture() -> None:
    loc = torch.tensor([[1.0, 0.0, 2.0, 5.0], [1.0, 1.0, 2.0, 5.0]])
    scale = torch.eye(4).repeat(2, 1, 1)
    scale[1, 2, 2] = 0.5
    assert GaussianMixture(torch.zeros(2), loc, scale).independent_latents()[0].tolist() == [
        *(True, False, False, True)
    ]
    scale[1, 3, 0] = 0.1
    p = GaussianMixture(torch.zeros(2), loc, scale, event_shape=(2, 2)).expand((3,))
    apart, parts = p.independent_latents()
    assert not apart.any()
    assert (parts.batch_shape, parts.event_shape) == ((3,), (2, 2))


def test_N2_a_mixture_that_does_not_generalise_warns() -> None:
    z = few_of_many(600)
    with pytest.warns(UserWarning, match=r"does not generalise: .* nats, and .* under"):
        fit_mixture(z, 10, active=torch.ones(64, dtype=torch.bool))


# --- heads


def test_N3_a_head_does_not_see_collapsed_latents() -> None:
    """It is the head of the active latents alone, with the first layer's weights on their scale."""
    prior = NCPrior.for_source(constant(), torch.zeros(64, 3), width=8)
    head: Any = prior.heads[0]
    torch.nn.init.normal_(head.out.weight)
    used = torch.tensor([False, True, True, False])
    z = torch.randn(5, 4)
    assert torch.equal(prior.log_r(0, z, None), prior.log_r(0, z * used, None))
    assert prior.log_r(0, z, None).std() > 0
    small = MLPHead((2,), width=8)
    state = head.state_dict()
    for name in ("scale.mean", "scale.sd"):
        state[name] = state[name][used]
    state["stem.weight"] = state["stem.weight"][:, used]
    small.load_state_dict(state)
    assert torch.allclose(small(z[:, used]), head(z), atol=1e-6)
    before = small.stem.weight.clone()
    small.leave_out(torch.tensor([True, False]))
    assert torch.allclose(small.stem.weight, before * 2**0.5)


def test_N3_on_a_mixture_of_the_active_latents_too() -> None:
    z = constant().group(constant().start(1)).prior.sample((3000,))[:, 0]
    z[:, 1:3] = few_of_many(3000)[:, :2]
    closer = rebase(constant(), fit_mixture(z, 4))
    assert active_latents(closer, torch.zeros(20, 3))[0].tolist() == [False, True, True, False]
    head: Any = NCPrior.for_source(closer, torch.zeros(64, 3)).heads[0]
    assert (head.scale.sd > 1e20).tolist() == [True, False, False, True]


def test_many_latents_that_are_hardly_used_are_not_hidden_together() -> None:
    """400 latents of 0.008 nats each carried 3.4 nats, which no head saw."""
    p = base(400).expand((64,))
    for shift, hidden in ((0.13, range(4, 7)), (0.01, [400])):
        q = Independent(Normal(torch.full((64, 400), shift), 1.0), 1)
        kl = LatentKL.of(q, p)
        assert int((~kl.active()).sum()) in hidden
        assert kl.mean[~kl.active()].sum() < 0.05
    mixed = torch.tensor([0.13, 2.0, 0.0, 0.01]).expand(64, 4)
    kl = LatentKL.of(Independent(Normal(mixed, 1.0), 1), base(4).expand((64,)))
    assert kl.active().tolist() == [False, True, False, False]


def test_features_few_rows_and_no_active_latent_leave_all_inputs() -> None:
    features = SingleGroup(
        base(4), constant()._posterior, lambda z: z, features=lambda z: z[..., :2]
    )
    unused = constant(q=lambda rows: base(4).expand((rows,)))
    for source, rows in ((features, 64), (constant(), 8), (unused, 64)):
        head: Any = NCPrior.for_source(source, torch.zeros(rows, 3)).heads[0]
        assert (head.scale.sd < 10).all()
