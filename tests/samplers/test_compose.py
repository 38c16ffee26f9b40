"""Samplers made of samplers."""

import copy
import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import GaussianPair, SampleOnly, standard_normal
from scipy import stats
from torch import Tensor
from torch.distributions import Normal

from ncprior import langevin, sir
from ncprior.samplers.base import Draw
from ncprior.samplers.compose import at_temperature, sequence
from ncprior.samplers.identity import describe, identity_of
from ncprior.samplers.rejection import independence


def test_a_sequence_starts_each_part_from_the_draw_before() -> None:
    first = partial(sir, num_proposals=3)
    still = partial(langevin, num_steps=0, step_size=0.1)
    problem = GaussianPair()
    torch.manual_seed(0)
    alone = first(problem.prior.expand((5,)), problem.log_r)
    torch.manual_seed(0)
    both = sequence(first, still, still)(problem.prior.expand((5,)), problem.log_r)
    assert torch.equal(alone.z, both.z)
    assert alone.ess is not None and both.ess is not None
    assert torch.equal(alone.ess, both.ess)


def test_a_sequence_keeps_what_was_found_last() -> None:
    prior = GaussianPair().prior.expand((5,))
    mala = partial(langevin, num_steps=2, step_size=0.1, adjusted=True)
    draw = sequence(partial(sir, num_proposals=2), mala)(prior, GaussianPair().log_r)
    assert draw.ess is not None and draw.log_mean_weight is not None
    assert draw.acceptance is not None and draw.acceptance.shape == (5,)


def test_mala_after_sir_mends_what_few_proposals_miss() -> None:
    problem, rows = GaussianPair(kl=2.0), 4000
    prior = problem.prior.expand((rows,))
    few = partial(sir, num_proposals=5)
    mala = partial(langevin, num_steps=60, step_size=0.6, adjusted=True)
    before = problem.project(few(prior, problem.log_r).z).mean() / problem.shift
    after = problem.project(sequence(few, mala)(prior, problem.log_r).z)
    assert before < 0.8
    assert stats.kstest(after.numpy(), stats.norm(loc=problem.shift).cdf).pvalue > 0.01


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["sir", "independence", "mala"])
def test_a_temperature_gives_the_power_of_the_density(temperature: float, kind: str) -> None:
    """r·p = N(mu, I), so that (r·p)^{1/T} is N(mu, T I)."""
    samplers = {
        "sir": partial(sir, num_proposals=3000),
        "independence": partial(independence, num_steps=1500),
        "mala": partial(langevin, num_steps=100, step_size=0.5, adjusted=True),
    }
    problem, rows = GaussianPair(kl=0.125, dim=1), 2000
    sampler = at_temperature(samplers[kind], temperature)
    u = problem.project(sampler(problem.prior.expand((rows,)), problem.log_r).z).numpy()
    if kind == "mala" or temperature < 1:  # p has too thin tails to propose hotter draws
        law = stats.norm(loc=problem.shift, scale=math.sqrt(temperature))
        assert stats.kstest(u, law.cdf).pvalue > 0.01
    else:
        assert u.std() > 1.2


def test_temperature_one_changes_nothing() -> None:
    problem = GaussianPair()
    draws: list[Draw] = []
    for sampler in (
        partial(sir, num_proposals=9),
        at_temperature(partial(sir, num_proposals=9), 1.0),
    ):
        torch.manual_seed(0)
        draws.append(sampler(problem.prior.expand((6,)), problem.log_r))
    assert torch.equal(draws[0].z, draws[1].z)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be a number in \(0, inf\)"):
        at_temperature(partial(sir, num_proposals=2), temperature)


def test_a_temperature_needs_a_density() -> None:
    cold = at_temperature(partial(sir, num_proposals=2), 0.5)

    def log_ratio(z: Tensor) -> Tensor:
        return z.sum(-1)

    with pytest.raises(TypeError, match="can only be sampled"):
        cold(SampleOnly(GaussianPair().prior.expand((3,))), log_ratio)


def test_a_sampler_that_calls_itself_is_told_once() -> None:
    def again(prior: Any, log_ratio: Any, left: int = 2) -> Draw:
        return (
            again(prior, log_ratio, left - 1) if left else sir(prior, log_ratio, num_proposals=2)
        )

    assert describe(again).endswith("again(...)")
    assert describe([again, again]) == f"({describe(again)}, {describe(again)})"


def test_temperature_1_needs_no_density() -> None:
    draw = at_temperature(partial(sir, num_proposals=5), 1.0)(
        SampleOnly(standard_normal(2).expand((3,))), lambda z: z[..., 0]
    )
    assert draw.z.shape == (3, 2)


def test_numbers_of_numpy_are_numbers_of_a_sampler() -> None:
    """A job that was begun with one could not go on with what a saved prior has."""
    kinds = (5, np.int64(5))
    first, second = (identity_of(partial(sir, num_proposals=number)) for number in kinds)
    assert first == second


def twice(sampler: Any) -> Any:
    """A decorator that changes log r."""

    @wraps(sampler)
    def inner(prior: Any, log_ratio: Any) -> Draw:
        return sampler(prior, lambda z: 2 * log_ratio(z))

    return inner


def thrice(sampler: Any) -> Any:
    @wraps(sampler)
    def inner(prior: Any, log_ratio: Any) -> Draw:
        return sampler(prior, lambda z: 3 * log_ratio(z))

    return inner


def kept_elsewhere(sampler: Any) -> Any:
    """A decorator whose function has no closure."""

    @wraps(sampler)
    def inner(prior: Any, log_ratio: Any) -> Draw:
        return KEPT[0](prior, log_ratio)

    KEPT[:] = [sampler]
    return inner


KEPT: list[Any] = []


def mine(prior: Any, log_ratio: Any) -> Draw:
    return sir(prior, log_ratio, num_proposals=3)


INNER: dict[str, Callable[[int], Any]] = {
    "partial": lambda m: partial(sir, num_proposals=m),
    "composition": lambda m: at_temperature(partial(sir, num_proposals=m), 0.5),
    "function": lambda m: lambda prior, log_ratio: sir(prior, log_ratio, num_proposals=m),
}


@pytest.mark.parametrize("decorate", [twice, torch.no_grad(), kept_elsewhere])
@pytest.mark.parametrize("kind", INNER)
def test_a_decorated_sampler_is_known_by_all_of_it(kind: str, decorate: Any) -> None:
    """Two jobs of `wraps(f)` around a partial were one: both were just a "partial"."""
    few, again, many = (decorate(INNER[kind](m)) for m in (2, 2, 999))
    assert identity_of(few) == identity_of(again) != identity_of(many)
    assert identity_of(partial(few)) == identity_of(partial(again)) != identity_of(partial(many))
    assert "0x" not in identity_of(few)


@pytest.mark.parametrize("inner", [mine, sir, partial(sir, num_proposals=3)])
def test_a_decorator_that_changes_the_draws_changes_the_identity(inner: Any) -> None:
    found = {identity_of(it) for it in (inner, twice(inner), thrice(inner), twice(twice(inner)))}
    assert len(found) == 4


def test_a_function_of_the_package_is_known_by_its_name_without_its_decorators() -> None:
    assert identity_of(torch.no_grad()(sir)) == identity_of(sir) == "sir"
    assert identity_of(at_temperature(sir, 0.5)) == "at_temperature(sir, 0.5)"


def test_people_read_the_innermost_function_and_all_of_a_partial() -> None:
    for decorated in (twice(mine), torch.no_grad()(mine), twice(torch.no_grad()(mine))):
        assert describe(decorated) == "mine"
    few = partial(sir, num_proposals=2)
    assert describe(twice(few)) == "twice.inner(sir(num_proposals=2))"
    assert (
        describe(twice(at_temperature(few, 0.5)))
        == f"twice.inner({describe(at_temperature(few, 0.5))})"
    )


VALUES: list[Any] = [
    torch.zeros(2000, 2),
    torch.zeros(2000, 2, dtype=torch.float64),
    torch.zeros(4000),
    torch.zeros(2000, 2).index_fill(0, torch.tensor(1000), 1.0),
    torch.tensor(0.123456),
    torch.tensor(0.123457),
    torch.zeros(2000, dtype=torch.complex64).conj(),
    torch.zeros(2000, 2).bfloat16(),
    torch.zeros(3000, 2).to_sparse(),
    torch.zeros(2000, 2, device="meta"),
    np.zeros((2000, 3)),
    np.zeros((2000, 3)) + (np.arange(6000) == 3000).reshape(2000, 3),
    np.array(["a", "b"]),
    np.array([{"a": 1}, None], dtype=object),
    Normal(torch.zeros(2000), 1.0),
    Normal(torch.ones(2000), 1.0),
]


def test_tensors_and_arrays_are_known_by_their_values() -> None:
    """Their texts leave out values in the middle, and digits."""

    def kinds(value: Any) -> list[Any]:
        def uses_it(prior: Any, log_ratio: Any, *, init: Any = value) -> Any:
            return langevin(prior, log_ratio, num_steps=1, step_size=0.1, init=init)

        given = partial(langevin, num_steps=1, step_size=0.1, init=value)
        return [given, uses_it, twice(given), partial(mine, {"init": [value]})]

    for these in zip(*map(kinds, VALUES), strict=True):
        assert len(set(map(identity_of, these))) == len(VALUES)
        assert not [it for it in map(identity_of, these) if "0x" in it]
    for value in VALUES:
        copied = copy.deepcopy(value)
        for one, other in zip(kinds(value), kinds(copied), strict=True):
            assert identity_of(one) == identity_of(other)
    assert identity_of(torch.ones(2, 3).T) == identity_of(torch.ones(3, 2))
    assert describe(partial(langevin, init=torch.ones(2))) == "langevin(init=tensor([1., 1.]))"
