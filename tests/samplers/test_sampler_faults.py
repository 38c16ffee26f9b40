"""Faults of samplers that were found by trying hard, under their numbers."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers.exact import flat, rows
from helpers.problems import Codes, SampleOnly, standard_normal
from torch import Tensor, nn
from torch.distributions import (
    Beta,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    VonMises,
    constraints,
)

from ncprior import NCPrior, SingleGroup, langevin, sir
from ncprior.bases.mixture import GaussianMixture
from ncprior.heads import MLPHead
from ncprior.samplers import (
    Draw,
    at_temperature,
    budgeted_rejection,
    independence,
    rejection,
    sequence,
    supports_langevin,
    tempered_smc,
    within_components,
)

PRIOR = rows(standard_normal(2), 8)
GRADIENTS: list[Any] = [
    partial(langevin, num_steps=2, step_size=0.1),
    partial(langevin, num_steps=2, step_size=0.1, adjusted=True),
    partial(tempered_smc, num_particles=4),
]
SAMPLERS: list[Any] = [
    partial(sir, num_proposals=4),
    partial(independence, num_steps=2),
    partial(budgeted_rejection, num_proposals=2),
    partial(rejection, log_bound=0.0),
    *GRADIENTS,
]


class Features(nn.Module):
    """A head with parameters, on features without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            features = z.tanh()
        return features @ self.weight


CUT: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": torch.no_grad()(lambda z: z.sum(-1)),
    "inference_mode": torch.inference_mode()(lambda z: z.sum(-1)),
    "detach": lambda z: z.detach().sum(-1),
    "features": Features(),
    "difference": lambda z: z.detach().diff(dim=-1)[..., 0],
    "where it is mostly flat": lambda z: 3.0 * (z[..., 0] > 0),
}


@pytest.mark.parametrize("sampler", GRADIENTS)
@pytest.mark.parametrize("kind", CUT)
def test_F5_a_log_r_whose_gradient_is_cut_raises(sampler: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=r"log_ratio changes with z, .* no gradient.*no_grad"):
        sampler(PRIOR, CUT[kind])


class Cut(Normal):
    """A prior whose density is evaluated without a gradient."""

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value)


@pytest.mark.parametrize("sampler", GRADIENTS)
def test_F5_a_density_whose_gradient_is_cut_raises(sampler: Any) -> None:
    with pytest.raises(ValueError, match=r"prior\.log_prob changes with z"):
        sampler(Cut(torch.zeros(5), 1.0), lambda z: z)


@pytest.mark.parametrize("sampler", GRADIENTS)
@pytest.mark.parametrize("parameter", [None, nn.Parameter(torch.tensor(0.7))])
def test_F5_a_constant_log_r_needs_no_gradient(sampler: Any, parameter: Any) -> None:
    calls: list[int] = []
    constant = torch.tensor(0.7) if parameter is None else parameter

    def log_ratio(z: Tensor) -> Tensor:
        calls.append(1)
        return constant.expand(z.shape[:-1])

    def same(z: Tensor) -> Tensor:
        return 0.7 + 0 * z.sum(-1)

    draws = []
    for function in (log_ratio, same):
        torch.manual_seed(0)
        draws.append(sampler(PRIOR, function).z)
    assert torch.equal(*draws)
    calls.clear()
    langevin(PRIOR, log_ratio, num_steps=9, step_size=0.1)
    assert len(calls) == 9 + 2  # looked at once in a run, not at every step


def test_F5_features_without_a_gradient_are_named_by_the_prior() -> None:
    features = torch.no_grad()(torch.tanh)
    source = SingleGroup(standard_normal(2), posterior, lambda z: z, features=features)
    head = MLPHead((2,), width=4, depth=1)
    with torch.no_grad():
        head.out.weight.normal_()
    with pytest.raises(ValueError, match=r"Group 0: log_ratio changes with z.*features="):
        NCPrior(source, head).sample(8, GRADIENTS[0])


def posterior(x: Tensor) -> Distribution:
    return Independent(Normal(x, 1.0), 1)


def test_F13_shared_proposals_look_at_log_r_too() -> None:
    with pytest.raises(ValueError, match="log_ratio must map z"):
        sir(PRIOR, lambda z: z.sum(), num_proposals=4, share_proposals=True)


COUNTS: list[tuple[Any, str]] = [
    (partial(sir, num_proposals=4), "num_proposals"),
    (partial(sir, num_proposals=4), "chunk_size"),
    (partial(independence, num_steps=4), "num_steps"),
    (partial(independence, num_steps=4), "chunk_size"),
    (partial(rejection, log_bound=0.0), "max_tries"),
    (partial(langevin, num_steps=1, step_size=0.1), "num_steps"),
    *[
        (GRADIENTS[-1], name)
        for name in ("num_particles", "num_moves", "num_leapfrogs", "max_temperatures")
    ],
]


@pytest.mark.parametrize(("sampler", "name"), COUNTS)
def test_F26_F27_counts_are_whole_numbers(sampler: Any, name: str) -> None:
    for value in (math.nan, math.inf, 2.0, "3", True, 1j):
        with pytest.raises(TypeError, match=rf"{name} must be a whole number .* Pass an int"):
            sampler(PRIOR, flat, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be .* got -1"):
        sampler(PRIOR, flat, **{name: -1})


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (partial(langevin, num_steps=1), "step_size"),
        (GRADIENTS[-1], "step_size"),
        (GRADIENTS[-1], "ess_fraction"),
        (rejection, "log_bound"),
        (lambda prior, log_r, temperature: at_temperature(sir, temperature), "temperature"),
    ],
)
def test_F35_settings_are_finite_numbers_in_their_range(sampler: Any, name: str) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name} must be a number in"):
            sampler(PRIOR, flat, **{name: value})
    for value in ("1", None, 1j, True):
        with pytest.raises(TypeError, match=f"{name} must be a number in"):
            sampler(PRIOR, flat, **{name: value})
    for value in (0, -1) if name != "log_bound" else ():
        with pytest.raises(ValueError, match=f"{name} must be a number in"):
            sampler(PRIOR, flat, **{name: value})


def test_F35_switches_are_flags() -> None:
    for sampler, name in (
        (partial(sir, num_proposals=2), "share_proposals"),
        (partial(langevin, num_steps=1, step_size=0.1), "adjusted"),
        (partial(tempered_smc, num_particles=2), "share_particles"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be True or False; got 'no'"):
            sampler(PRIOR, flat, **{name: "no"})


class Draws:
    """A prior that draws whatever it is told."""

    def __init__(self, z: Any) -> None:
        self.z = z

    def sample(self, sample_shape: Any = ()) -> Any:
        return self.z


@pytest.mark.parametrize("sampler", SAMPLERS[:3])
@pytest.mark.parametrize("z", [torch.zeros(1, 3, 2, dtype=torch.complex64), None, [[0.0]]])
def test_F35_priors_draw_tensors_of_real_numbers(sampler: Any, z: Any) -> None:
    with pytest.raises(TypeError, match="prior must draw a tensor of real numbers"):
        sir(Draws(z), flat, num_proposals=4)


def test_F35_priors_draw_one_row_per_sample() -> None:
    for z in (torch.zeros(()), torch.zeros(3), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match=r"must have shape \(1, B, \*event\)"):
            sir(Draws(z), flat, num_proposals=4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "value", [0.0, None, torch.zeros(8, dtype=torch.complex64), torch.zeros(8, dtype=torch.bool)]
)
def test_F13_log_r_is_a_tensor_of_real_numbers(sampler: Any, value: Any) -> None:
    with pytest.raises(TypeError, match="log_ratio must return log r"):
        sampler(PRIOR, lambda z: value)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prior", [None, Normal, nn.Linear(2, 2), torch.zeros(8, 2)])
def test_F36_what_is_no_prior_is_named(sampler: Any, prior: Any) -> None:
    with pytest.raises(TypeError, match=r"prior must be p\(z\).*got "):
        sampler(prior, flat)
    for function in (1.0, nn.Module()):
        with pytest.raises(TypeError, match="log_ratio must be a function; got"):
            sampler(PRIOR, function)


@pytest.mark.parametrize("make", [at_temperature, within_components, sequence])
def test_F36_what_is_no_sampler_is_named(make: Any) -> None:
    arguments = (1.0,) if make is at_temperature else ()
    for wrong in (None, "sir", Draw):
        with pytest.raises(TypeError, match=r"sampler must be a function; got .*partial\(sir"):
            make(wrong, *arguments)


def test_F36_samplers_after_the_first_start_where_it_ends() -> None:
    first = partial(sir, num_proposals=2)
    with pytest.raises(TypeError, match=r"start from init=.*got sir\(num_proposals=2\)"):
        sequence(first, first)
    wrong: Any = [lambda prior, log_ratio: prior.sample(), lambda prior, log_ratio, init: init]
    for sampler in (sequence(wrong[0]), sequence(first, wrong[1])):
        with pytest.raises(TypeError, match="result of a sampler must be of type Draw"):
            sampler(PRIOR, flat)
    with pytest.raises(TypeError, match="z of a Draw must be of type Tensor"):
        sequence(lambda prior, log_ratio: Draw(None))(PRIOR, flat)  # type: ignore[arg-type]
    mixture = GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2)).expand((8,))
    with pytest.raises(TypeError, match="result of a sampler must be of type Draw"):
        within_components(wrong[0])(mixture, flat)
    with pytest.raises(ValueError, match=r"here \(8, 2\); got \(1, 2\)"):
        within_components(lambda prior, log_ratio: Draw(torch.zeros(1, 2)))(mixture, flat)


STARTED: list[Any] = [
    partial(independence, num_steps=3),
    partial(langevin, num_steps=3, step_size=0.1),
]


@pytest.mark.parametrize("sampler", STARTED)
def test_F25_F35_the_start_of_chains_is_looked_at(sampler: Any) -> None:
    draws = []
    for init in (torch.ones(8, 2), np.ones((8, 2)), [[1.0, 1.0]] * 8):
        torch.manual_seed(0)
        draws.append(sampler(PRIOR, lambda z: z.sum(-1), init=init).z)
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    for wrong in (torch.zeros(7, 2), torch.zeros(8), torch.zeros(8, 1)):
        with pytest.raises(ValueError, match=r"init must have the prior's shape .*\(8, 2\); got"):
            sampler(PRIOR, flat, init=wrong)
    with pytest.raises(ValueError, match="init must be finite; got NaN or infinity in 1 of 8"):
        sampler(PRIOR, flat, init=torch.ones(8, 2).index_fill(0, torch.tensor(3), math.nan))
    for wrong in ("z", torch.zeros(8, 2, dtype=torch.complex64), torch.zeros(8, 2) > 0):
        with pytest.raises(TypeError, match="init must be"):
            sampler(PRIOR, flat, init=wrong)


@pytest.mark.parametrize("shape", [(1, 2), (8, 1), (7, 2)])
def test_F25_the_start_of_chains_on_a_prior_that_only_draws_is_looked_at(shape: Any) -> None:
    """A start of another shape was broadcast in silence."""

    class Drawn:
        def sample(self, shape: Any) -> Tensor:
            return torch.randn(*shape, 8, 2)

    with pytest.raises(ValueError, match=r"init must have the prior's shape .*\(8, 2\); got"):
        independence(Drawn(), flat, num_steps=3, init=torch.zeros(shape))


def test_F35_chains_of_codes_keep_their_dtype_and_chains_of_numbers_are_floats() -> None:
    codes = torch.tensor([0, 1, 2, 3])
    draw = independence(Codes().prior.expand((4,)), Codes().log_r, num_steps=2, init=codes)
    assert draw.z.dtype == torch.int64
    whole = torch.ones(8, 2, dtype=torch.int64)
    assert langevin(PRIOR, flat, num_steps=2, step_size=0.1, init=whole).z.dtype == torch.float32


CIRCLES: list[Distribution] = [
    Independent(VonMises(torch.zeros(4, 2), torch.ones(4, 2)), 1),
    Independent(VonMises(torch.zeros(2), torch.ones(2)), 1).expand((4,)),
    MixtureSameFamily(
        Categorical(torch.ones(4, 3)), VonMises(torch.zeros(4, 3), torch.ones(4, 3))
    ),
]


@pytest.mark.parametrize("prior", CIRCLES)
def test_W8_angles_of_a_von_mises_prior_are_for_sir(prior: Distribution) -> None:
    def log_ratio(z: Tensor) -> Tensor:
        return z.cos().reshape(*z.shape[: z.ndim - len(prior.event_shape)], -1).sum(-1)

    assert not supports_langevin(prior)
    for sampler in GRADIENTS:
        with pytest.raises(TypeError, match=r"VonMises|Mixture.* is bounded\. Use sir"):
            sampler(prior, log_ratio)
    assert sir(prior, log_ratio, num_proposals=5).z.abs().max() <= math.pi


def test_W8_other_priors_keep_their_answer() -> None:
    mixture = MixtureSameFamily(Categorical(torch.ones(3)), Normal(torch.zeros(3), 1.0))
    assert supports_langevin(mixture) and supports_langevin(standard_normal(2))
    assert not supports_langevin(Beta(1.0, 1.0)) and not supports_langevin(
        SampleOnly(standard_normal(2))
    )
    wishart = torch.distributions.Wishart(3.0, covariance_matrix=torch.eye(2))
    assert not supports_langevin(wishart)
    with pytest.raises(TypeError, match=r"prior must be p\(z\).*got 3"):
        supports_langevin(3)  # type: ignore[arg-type]


class Sphere(Distribution):
    """The uniform distribution on the unit sphere, as code of VAEs on spheres has it."""

    support = constraints.real_vector
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, rows: int) -> None:
        super().__init__(torch.Size((rows,)), torch.Size((3,)), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        z = torch.randn(*sample_shape, *self.batch_shape, 3)
        return z / z.norm(dim=-1, keepdim=True)


def test_W11_a_sphere_is_for_sir_and_the_docs_of_langevin_say_so() -> None:
    norms = sir(Sphere(50), lambda z: z[..., 0], num_proposals=5).z.norm(dim=-1)
    assert torch.allclose(norms, torch.ones(50))
    assert "a sphere" in str(langevin.__doc__) and "sir" in str(langevin.__doc__)


def test_GM2_the_mark_of_a_clean_run_is_an_integer_that_a_double_holds() -> None:
    from ncprior.samplers.target import _NEVER, Target

    target = Target(PRIOR, lambda z: z.sum(-1))
    target(torch.zeros(8, 2))
    assert target.first_bad == _NEVER == 2**31 - 1
