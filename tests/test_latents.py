"""Latents that are no Gaussian vectors: SIR is exact on them, and what leaves their set is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.exact import RARE, chi_square_p_value, rows
from helpers.surfaces import NORTH, Bits, Simplex, Sphere, VonMisesFisher
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    Normal,
    OneHotCategorical,
    StudentT,
    TransformedDistribution,
    Uniform,
    constraints,
)
from torch.distributions.transforms import AffineTransform, StickBreakingTransform

from ncprior import NCPrior, SingleGroup, langevin, sir
from ncprior.bases import Empirical, fit_mixture, latents_of, rebase
from ncprior.distributions import expand
from ncprior.recipe.base import choose_base
from ncprior.recipe.parts import parts_of
from ncprior.recipe.record import Record
from ncprior.samplers import tempered_smc
from ncprior.samplers.target import supports_langevin
from ncprior.testing import check_source
from ncprior.utils.supports import is_outside, shown_by, support_of

pytestmark = pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # the toys decode badly

PROBLEMS = (Sphere(), Simplex(), Bits())
NAMES = ["sphere", "simplex", "bits"]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def sphere_source(**options: Any) -> SingleGroup:
    """x near the north, and q(z | x) around its direction."""
    parts = {"prior": VonMisesFisher(NORTH, 0.1), "decoder": lambda z: 2 * z}
    return SingleGroup(
        **{**parts, "posterior": lambda x: VonMisesFisher(unit(x), 50.0), **options}
    )


def simplex_source(**options: Any) -> SingleGroup:
    parts: dict[str, Any] = {"prior": Dirichlet(torch.ones(3)), "decoder": nn.Linear(3, 3).eval()}
    parts["posterior"] = lambda x: Dirichlet(0.5 + 20 * x.softmax(-1))
    return SingleGroup(**{**parts, **options})


def bits_source(**options: Any) -> SingleGroup:
    parts: dict[str, Any] = {"prior": Independent(Bernoulli(torch.full((3,), 0.5)), 1)}
    parts["posterior"] = lambda x: Independent(Bernoulli(logits=4 * x, validate_args=False), 1)
    return SingleGroup(**{**parts, "decoder": nn.Linear(3, 3).eval(), **options})


SOURCES = (sphere_source, simplex_source, bits_source)


def data(count: int) -> Tensor:
    return torch.randn(count, 3) * 0.3 + torch.tensor([0.0, 0.3, 1.0])


# --- SIR


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
@pytest.mark.parametrize("proposals", [2, 10])
def test_sir_has_its_exact_law(problem: Any, proposals: int) -> None:
    draw = sir(expand(problem.prior, 50_000), problem.log_r, num_proposals=proposals)
    assert not is_outside(expand(problem.prior, 1), draw.z).any()
    law = problem.law
    u = problem.project(draw.z).double()
    if len(law.nodes) < 10:
        assert chi_square_p_value(u.long(), law.nodes, law.probabilities(proposals)) > RARE
        return
    for f in (lambda v: v, lambda v: v**2):
        error = f(u).std().item() / len(u) ** 0.5
        assert abs(f(u).mean().item() - law.mean(f(law.nodes), proposals)) < 4.5 * error


@pytest.mark.parametrize("make", SOURCES, ids=NAMES)
def test_a_source_keeps_the_rules_and_draws_on_its_set(make: Any) -> None:
    source, x = make(), data(64)
    check_source(source, x)
    prior = NCPrior.for_source(source, x, width=8)
    z = prior.sample(200, lambda p, log_r: sir(p, log_r, num_proposals=8)).latents[0]
    assert support_of(source.prior) != ""
    assert not is_outside(source.group(source.start(200)).prior, z).any()


# --- Langevin dynamics


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        (VonMisesFisher(NORTH, 2.0), "VonMisesFisher draws latents on a sphere"),
        (Independent(VonMisesFisher(NORTH.expand(2, 3), 2.0), 1), "VonMisesFisher .* on a sphere"),
        (Dirichlet(torch.ones(3)), "Dirichlet draws latents on a simplex"),
        (
            TransformedDistribution(
                Independent(Normal(torch.zeros(2), torch.ones(2)), 1), StickBreakingTransform()
            ),
            "on a simplex",
        ),
        (Independent(Beta(torch.ones(2), torch.ones(2)), 1), "Beta is bounded"),
        (Independent(Uniform(torch.zeros(2), torch.ones(2)), 1), "Uniform is bounded"),
        (Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1), "bounded"),
        (Independent(Bernoulli(torch.full((2,), 0.5)), 1), "Bernoulli is discrete"),
        (OneHotCategorical(torch.ones(3)), "OneHotCategorical is discrete"),
    ],
    ids=str,
)
def test_langevin_is_refused_by_name_before_any_step(prior: Distribution, words: str) -> None:
    calls: list[int] = []

    def log_r(z: Tensor) -> Tensor:
        calls.append(1)
        return z.flatten(1).sum(1)

    state = torch.get_rng_state()
    for sampler in (langevin, tempered_smc):
        options: dict[str, Any] = {"num_steps": 3, "step_size": 0.1}
        options = options if sampler is langevin else {"num_particles": 4}
        with pytest.raises(TypeError, match=rf"{words}.*Use sir"):
            sampler(expand(prior, 4), log_r, **options)
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert not supports_langevin(expand(prior, 4))


class Bounded(Distribution):
    """A user's class with a constraint of the user's own."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    class _Ball(constraints.Constraint):
        event_dim = 1

        def check(self, value: Tensor) -> Tensor:
            return value.norm(dim=-1) <= 1

    support = _Ball()

    def __init__(self) -> None:
        super().__init__(torch.Size(), torch.Size((2,)), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return unit(torch.randn(*sample_shape, 2)) * torch.rand(*sample_shape, 1).sqrt()


def test_a_constraint_of_the_users_own_is_probed() -> None:
    assert support_of(Bounded()) == "bounded"

    class Free(Bounded):
        support = constraints.real_vector

    assert support_of(Free()) == ""


def test_a_sampler_without_a_density_shows_where_it_draws() -> None:
    class Sampler:
        def sample(self, sample_shape: Any = ()) -> Tensor:
            return unit(torch.randn(*sample_shape, 5))

    assert support_of(Sampler()) == "on a sphere"
    assert shown_by(torch.randn(100, 5)) == "" == shown_by(torch.ones(100, 5))
    assert shown_by(torch.rand(100, 4).log_softmax(-1).exp()) == "on a simplex"


REAL = {
    "Laplace": Laplace(torch.zeros(1), torch.ones(1)),
    "StudentT": StudentT(5.0, torch.zeros(1), torch.ones(1)),
    "mixture": MixtureSameFamily(
        Categorical(torch.ones(1, 2)), Normal(torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2))
    ),
    "affine": TransformedDistribution(
        Normal(torch.zeros(1), torch.ones(1)), AffineTransform(torch.ones(1), 2.0)
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_langevin_samples_real_latents(name: str) -> None:
    """The target is p(z) e^{-z²/2 + z/2}, whose moments are a quadrature."""
    p = Independent(REAL[name], 1)

    def log_r(z: Tensor) -> Tensor:
        return (0.5 * z - 0.5 * z**2)[..., 0]

    grid = torch.linspace(-12, 12, 8001, dtype=torch.float64)[:, None]
    weight = (p.log_prob(grid.float()).double() + log_r(grid)).exp()
    mean = float((weight * grid[:, 0]).sum() / weight.sum())
    draw = langevin(expand(p, 4000), log_r, num_steps=40, step_size=0.5, adjusted=True)
    z = draw.z[:, 0]
    assert abs(z.mean().item() - mean) < 4.5 * z.std().item() / 4000**0.5


# --- bases


@pytest.mark.parametrize("make", SOURCES, ids=NAMES)
def test_a_base_that_leaves_the_set_is_refused(make: Any) -> None:
    source, x = make(), data(300)
    z = latents_of(source, x)
    with pytest.raises(ValueError, match=r"A Gaussian mixture draws from all of R\^n, and z are"):
        fit_mixture(z, 3)
    gaussian = Independent(Normal(z.mean(0), z.std(0)), 1)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="which the decoder has never seen"):
        rebase(source, gaussian)
    assert torch.equal(torch.get_rng_state(), state)
    inside = rebase(source, Empirical(z))
    check_source(inside, x[:8])


@pytest.mark.parametrize("make", SOURCES, ids=NAMES)
def test_improve_keeps_the_set(make: Any) -> None:
    source, record = make(), Record(progress=False, max_seconds=None)
    assert choose_base(source, parts_of(data(100), None, 0), record) is source
    base = record.choices[0]
    assert base.chosen == "the VAE's own prior"
    assert "codes" in base.reason or "a mixture of Gaussians is not" in base.reason


# --- rules of check_source

BROKEN: dict[str, tuple[Any, str]] = {
    "a relaxation of codes": (
        lambda: bits_source(posterior=lambda x: Independent(Beta(1 + x.exp(), x.exp()), 1)),
        "the prior: .*posterior are outside of its support, which is discrete.*Gumbel",
    ),
    "codes beyond the categories": (
        lambda: SingleGroup(
            Categorical(torch.ones(3), validate_args=False),
            lambda x: Categorical(logits=torch.tensor([0.0, 0, 0, 9]).expand(len(x), 4)),
            lambda z: nn.functional.one_hot(z, 4).float() @ torch.ones(4, 3),
        ),
        "outside of its support, which is discrete",
    ),
    "a sphere in a Gaussian": (
        lambda: sphere_source(prior=Independent(Normal(torch.zeros(3), torch.ones(3)), 1)),
        r"latents on a sphere, and the prior in all of R\^n",
    ),
    "a Gaussian on a sphere": (
        lambda: sphere_source(posterior=lambda x: Independent(Normal(x, 1.0), 1)),
        "outside of its support, which is on a sphere",
    ),
    "a simplex in a Gaussian": (
        lambda: simplex_source(prior=Independent(Normal(torch.zeros(3), torch.ones(3)), 1)),
        "latents on a simplex, and the prior",
    ),
    "numbers beyond an interval": (
        lambda: bits_source(
            prior=Independent(Uniform(torch.zeros(3), torch.ones(3)), 1),
            posterior=lambda x: Independent(Normal(x, 1.0), 1),
        ),
        "outside of its support, which is bounded",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_prior_and_posterior_must_share_a_support(name: str) -> None:
    make, words = BROKEN[name]
    with pytest.raises(AssertionError, match=words):
        check_source(make(), data(16))


def test_a_prior_outside_of_its_own_support_is_named() -> None:
    class Wrong(Bounded):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            return 2 + torch.rand(*sample_shape, 2)

    source = SingleGroup(Wrong(), lambda x: Independent(Normal(x, 0.1), 1), lambda z: z)
    with pytest.raises(AssertionError, match="the prior draws latents that its support"):
        check_source(source, torch.randn(8, 2))


def test_a_density_of_a_class_without_expand_is_that_of_its_rows() -> None:
    p = VonMisesFisher(NORTH, 3.0)
    z = expand(p, 7).sample((5,))
    assert z.shape == (5, 7, 3)
    assert torch.equal(expand(p, 7).log_prob(z), p.log_prob(z))
    assert abs(float(np.mean(z.numpy() ** 2)) * 3 - 1) < 1e-5
    assert rows(Normal(torch.tensor(0.0), 1.0), 3).batch_shape == expand(p, 3).batch_shape
