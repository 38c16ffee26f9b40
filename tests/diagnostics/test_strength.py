"""The strength at which draws have the data's mean log r: exact values, its limits, its manners."""

import math
from functools import partial

import pytest
import torch
from helpers.problems import CorrelatedPair, ExactRatio, GaussianPair
from torch import Tensor
from torch.utils.data import DataLoader

from ncprior import NCPrior, sir
from ncprior.diagnostics import diagnose
from ncprior.diagnostics.strength import match_strength
from ncprior.heads.product import ProductHead

match = partial(match_strength, progress=False)
ROWS = 4000


def prior_of(problem: GaussianPair, scale: float) -> NCPrior:
    return NCPrior(problem.source(), problem.head(scale))


@pytest.mark.parametrize("scale", [0.6, 1.5, 2.0])
def test_a_head_of_the_wrong_scale_gets_the_inverse(scale: float) -> None:
    """log r̂ = c log r: p r̂^α = N(α c μ, I), whose mean of log r̂ is that of q at α = 1/c."""
    problem = GaussianPair(kl=1.0)
    prior = prior_of(problem, scale)
    found = match(prior, problem.data(ROWS), partial(sir, num_proposals=1000))
    # d/dα E[log r̂] = Var(log r̂) = 2c²; data and draws each err by c √(2/N), and it stops early.
    error = scale * math.sqrt(2 / ROWS) * math.sqrt(2) / (2 * scale**2)
    assert found == pytest.approx(1 / scale, abs=3.5 * error)
    assert prior.strength == 1.0


def test_it_makes_up_for_too_few_proposals() -> None:
    """log r is linear in u, so that draws with the right log r have the right mean of u."""
    problem = GaussianPair(kl=1.0)
    prior, sampler = prior_of(problem, 1.0), partial(sir, num_proposals=16)

    def mean() -> float:
        return problem.project(prior.sample(40_000, sampler).latents[0]).mean().item()

    assert problem.law.mean(problem.law.nodes, 16) < 0.8 * problem.shift
    prior.strength = match(prior, problem.data(ROWS), sampler, max_strength=4)
    assert prior.strength > 1.2
    # Errors of the data's mean, of the search's draws, and of 40,000 draws.
    error = math.sqrt(2 / ROWS + 1 / 40_000)
    assert mean() == pytest.approx(problem.shift, abs=3.5 * error)


@pytest.mark.parametrize("seed", range(5))
def test_an_exact_head_with_proposals_in_plenty_stays_as_it_is(seed: int) -> None:
    torch.manual_seed(seed)
    problem = GaussianPair(kl=0.5)
    prior = prior_of(problem, 1.0)
    assert match(prior, problem.data(ROWS), partial(sir, num_proposals=500)) == 1


def test_groups_share_one_strength_under_the_posterior_walk() -> None:
    pair = CorrelatedPair()
    prior = NCPrior(pair, pair.heads(0.5))
    sampler = partial(sir, num_proposals=300)  # at 200 the correlation is 0.797 of 0.8
    prior.strength = match(prior, pair.data(ROWS), sampler, max_strength=4)
    # Var(log r̂) is 0.16 under q, and 0.109 on average given z_1, by which E[log r̂] rises with α:
    # the error is at most √(2·0.16/N)/0.109 = 0.082.
    assert prior.strength == pytest.approx(2, abs=0.25)
    z = torch.cat(prior.sample(20_000, sampler).latents, 1)
    assert torch.corrcoef(z.T)[0, 1] == pytest.approx(pair.correlation, abs=0.03)


def test_nothing_learnt_stays_as_it_is_and_what_is_wrong_is_turned_off() -> None:
    problem = GaussianPair()
    data, sampler = problem.data(500), partial(sir, num_proposals=20)
    assert match(prior_of(problem, 0.0), data, sampler) == 1.0
    assert match(prior_of(problem, -1.0), data, sampler) == 0.0


def test_draws_that_fall_short_are_told() -> None:
    problem = GaussianPair(kl=6.0)
    with pytest.warns(UserWarning, match=r"At strength 3 .* still below .* nats"):
        found = match(
            prior_of(problem, 1.0),
            problem.data(500),
            partial(sir, num_proposals=2),
            max_strength=3,
        )
    assert found == 3


def test_heads_that_are_off_do_not_count() -> None:
    pair = CorrelatedPair()
    prior = NCPrior(pair, [ExactRatio(lambda z: 5 * z[..., 0]), pair.heads(0.5)[1]])
    prior.active[0] = False
    found = match(prior, pair.data(ROWS), partial(sir, num_proposals=1000), max_strength=4)
    assert found == pytest.approx(2, abs=0.25)
    prior.active[1] = False
    with pytest.raises(ValueError, match="none is in use"):
        match(prior, pair.data(9), partial(sir, num_proposals=2))


def test_the_strength_that_a_prior_has_does_not_matter() -> None:
    problem = GaussianPair()
    data, sampler = problem.data(500), partial(sir, num_proposals=20)
    prior, found = prior_of(problem, 0.8), []
    for strength in (0.0, 1.0, 2.0):
        prior.strength = strength
        torch.manual_seed(1)
        found.append(match(prior, data, sampler))
        assert prior.strength == strength
    assert found[0] == found[1] == found[2] != 1


def test_it_leaves_modes_and_strength_as_they_were_when_something_is_wrong() -> None:
    problem = GaussianPair()
    head = ProductHead([problem.head(), ExactRatio(lambda z: z[..., 0] * math.nan)])
    prior = NCPrior(problem.source(), head).train()
    prior.strength = 0.7
    with pytest.raises(FloatingPointError, match="Group 0: log r is not finite"):
        match(prior, problem.data(20), partial(sir, num_proposals=2))
    assert prior.strength == 0.7
    assert prior.training


def test_bad_arguments_are_told() -> None:
    problem = GaussianPair()
    prior, sampler = prior_of(problem, 1.0), partial(sir, num_proposals=2)
    for most in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="max_strength must be a number in"):
            match(prior, problem.data(20), sampler, max_strength=most)
    with pytest.raises(ValueError, match="needs 2 rows"):
        match(prior, problem.data(1), sampler)

    def once() -> Tensor:
        return problem.data(4)

    with pytest.raises(TypeError, match="one-shot"):
        match(prior, iter([once()]), sampler)


def test_a_loader_that_shuffles_is_left_as_it_was() -> None:
    """All passes have the same rows, and a generator of the loader goes on as if there were none."""
    problem = GaussianPair(kl=1.0)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(problem.data(400), 100, shuffle=True, generator=generator)  # type: ignore[arg-type]
    before = generator.get_state()
    prior = prior_of(problem, 1.5)
    assert match(prior, loader, partial(sir, num_proposals=200)) < 1
    assert torch.equal(generator.get_state(), before)
    diagnose(prior, loader, num_proposals=(5, 10), num_draws=400, fresh_steps=0)
    assert torch.equal(generator.get_state(), before)
