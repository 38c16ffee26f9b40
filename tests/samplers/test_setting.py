"""The sampler of a prior, and draws of p(x | z): their distribution, and errors by name."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from helpers.problems import GaussianPair
from helpers.toys import VAE, flat, ladder_prior, stir
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from ncprior import Draw, NCPrior, SingleGroup, langevin, sir
from ncprior.bases import GaussianMixture, rebase
from ncprior.diagnostics import Recommendation
from ncprior.heads import MLPHead
from ncprior.samplers import at_temperature, sequence, within_components
from ncprior.samplers.setting import sample_x
from ncprior.vaebm import GaussianDecoder

SIR = partial(sir, num_proposals=20)
MALA = partial(langevin, num_steps=2, step_size=0.1, adjusted=True)


def flat_prior(**options: Any) -> NCPrior:
    return stir(NCPrior(flat(**options), MLPHead((2,), width=8, depth=1))).eval()


def test_a_priors_own_sampler_draws_where_none_is_passed() -> None:
    prior = stir(ladder_prior()).eval()
    torch.manual_seed(1)
    expected = prior.sample(6, SIR)
    prior.sampler = SIR
    torch.manual_seed(1)
    sample = prior.sample(6)
    assert torch.equal(sample.x, expected.x)
    prior.sampler = lambda p, log_ratio: Draw(torch.zeros(6, 2))
    assert not prior.sample(6).latents[0].any()
    assert prior.sample(6, SIR).latents[0].all()  # one that is passed goes first
    group = prior.source.group(prior.source.start(6))
    assert not prior.draw(0, group).z.any()
    assert prior.draw(0, group, SIR).z.all()
    prior.sampler = None
    assert prior.sampler is None


def test_without_a_sampler_the_error_names_the_remedy() -> None:
    prior = flat_prior()
    group, before = prior.source.group(prior.source.start(4)), torch.get_rng_state()
    for use in (lambda: prior.sample(4), lambda: prior.draw(0, group)):
        with pytest.raises(
            ValueError, match=r"no sampler yet. Pass one, such as partial\(sir, .*"
        ) as e:
            use()  # type: ignore[no-untyped-call]
        assert "prior.sampler = recommend_sampler(diagnose(prior, held_out), budget=50)" in str(
            e.value
        )
    assert torch.equal(before, torch.get_rng_state())


def test_a_prior_that_is_off_needs_no_sampler() -> None:
    prior = stir(ladder_prior()).eval()
    with prior.disabled():
        assert prior.sample(3).x.shape == (3, 3)
    prior.active = [False, False, True]
    with pytest.raises(ValueError, match="no sampler yet"):
        prior.sample(3)
    assert prior.draw(0, prior.source.group(prior.source.start(3))).z.shape == (3, 2)


class Module(nn.Module):
    """A sampler that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, prior: Any, log_ratio: Any) -> Draw:
        return sir(prior, log_ratio, num_proposals=3)


CHOICE = Recommendation(SIR, 20, "Because.")

WRONG: list[tuple[Any, str]] = [
    (3, "sampler must be a function; got 3"),
    ("sir", "sampler must be a function; got 'sir'"),
    (Draw, "sampler must be a function; got the class Draw"),
    (CHOICE, r"got an object of type Recommendation. Pass .* or .sampler of what recommend_samp"),
    (sir, r"sampler must take \(prior, log_ratio\) alone; sir does not: .*'num_proposals'"),
    (partial(langevin, num_steps=3), "alone; langevin.* does not: .*'step_size'"),
    (lambda prior: None, "alone; .*does not: too many positional arguments"),
    (GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2)), "must be a function"),
]


@pytest.mark.parametrize(("wrong", "match"), WRONG)
def test_a_sampler_is_checked_when_it_is_set_or_passed(wrong: Any, match: str) -> None:
    prior = flat_prior()
    prior.sampler = SIR
    for use in (lambda: setattr(prior, "sampler", wrong), lambda: prior.sample(3, wrong)):
        with pytest.raises(TypeError, match=match):
            use()  # type: ignore[no-untyped-call]
    assert prior.sampler is SIR


def test_a_prior_is_no_sampler() -> None:
    prior = flat_prior()
    with pytest.raises(
        TypeError, match="sampler must draw for a prior; got an object of type NCP"
    ):
        prior.sampler = flat_prior()  # type: ignore[assignment]


def test_sampler_and_report_are_no_part_of_the_weights_and_are_copied() -> None:
    prior = flat_prior()
    names, number = list(prior.state_dict()), len(list(prior.parameters()))
    prior.sampler, prior.report = Module(), nn.Linear(1, 1)
    assert list(prior.state_dict()) == names and len(list(prior.parameters())) == number
    other = copy.deepcopy(prior)
    assert other.sampler is prior.sampler and other.report is prior.report
    assert flat_prior().report is None
    assert prior.sample(3).x.shape == (3, 3)
    prior.sampler = sequence(SIR, MALA)
    assert "sampler=sequence(sir(num_proposals=20), langevin(" in repr(prior)


def test_compositions_can_be_pickled() -> None:
    problem = GaussianPair()
    target = problem.prior.expand((5,)), problem.log_r
    for sampler in (sequence(SIR, MALA), at_temperature(SIR, temperature=0.5)):
        draws = []
        for one in (sampler, pickle.loads(pickle.dumps(sampler))):
            torch.manual_seed(2)
            draws.append(one(*target).z)
        assert torch.equal(*draws)
    assert repr(pickle.loads(pickle.dumps(within_components(SIR)))) == (
        "within_components(sir(num_proposals=20))"
    )


# --- draws of x


def bernoulli(z: Tensor) -> Distribution:
    """Three pixels that depend on z_1."""
    return Independent(Bernoulli(logits=z[:, :1] * torch.tensor([0.5, 1.0, 2.0])), 1)


def normal(z: Tensor) -> Distribution:
    """Three numbers around multiples of z_1, with different scales."""
    mean = z[:, :1] * torch.tensor([0.5, 1.0, 2.0])
    return Independent(Normal(mean, torch.tensor([0.1, 1.0, 3.0]).expand_as(mean)), 1)


@pytest.mark.parametrize("likelihood", [bernoulli, normal])
def test_draws_of_x_have_mean_and_variance_of_p_x_given_z(likelihood: Any) -> None:
    prior, n = flat_prior(likelihood=likelihood), 4000
    prior.sampler = SIR
    sample = prior.sample(n, draw_x=True)
    p = likelihood(sample.latents[0])
    mean, variance = p.mean, p.variance
    # Given z, Σ (x - mean) / sd has mean 0 and variance n, and Σ (x - mean)² / variance mean n.
    u = (sample.x - mean) / variance.sqrt()
    assert (u.sum(0).abs() < 4 * math.sqrt(n)).all()
    fourth = u.pow(4).mean(0) - 1 if likelihood is normal else (1 / variance - 4).mean(0)
    assert ((u.square().sum(0) - n).abs() < 4 * (n * fourth.clamp(min=0.01)).sqrt()).all()
    if likelihood is bernoulli:
        assert {*sample.x.unique().tolist()} == {0.0, 1.0}


def test_the_latents_do_not_depend_on_the_draw_of_x() -> None:
    prior = flat_prior(likelihood=normal)
    samples = []
    for draw_x in (False, True):
        torch.manual_seed(4)
        samples.append(prior.sample(5, SIR, draw_x=draw_x))
    assert torch.equal(samples[0].latents[0], samples[1].latents[0])
    state = prior.source.advance(prior.source.start(5), samples[0].latents[0])
    assert torch.equal(samples[0].x, prior.source.decode(state))
    assert not torch.equal(samples[1].x, samples[0].x)


def test_text_is_drawn_as_tokens_under_a_condition() -> None:
    vae = VAE(condition=2)

    def tokens(z: Tensor, c: Tensor) -> Distribution:
        logits = torch.log(c + 1e-30)[:, None].expand(-1, 7, -1)
        return Independent(Categorical(logits=logits), 1)

    source = flat(vae, condition=lambda x: x[1], likelihood=tokens)
    prior = NCPrior(source, MLPHead((2,), context_shape=(2,), width=4))
    c = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = prior.sample(2, SIR, condition=c, draw_x=True).x
    assert x.dtype == torch.int64 and x.tolist() == [[0] * 7, [1] * 7]


def test_wrapped_sources_draw_x_by_their_own_likelihood() -> None:
    """A decoder's noise of σ = 0.1 around the mean, also behind another base."""
    noisy = GaussianDecoder(flat(), 0.1)
    mixture = GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2))
    for source in (noisy, rebase(noisy, mixture)):
        prior = NCPrior(source, MLPHead((2,), width=4))
        torch.manual_seed(1)
        mean = prior.sample(400, SIR).x
        torch.manual_seed(1)
        u = (prior.sample(400, SIR, draw_x=True).x - mean) / 0.1
        assert abs(u.var().item() - 1) < 4 * math.sqrt(2 / u.numel())


def test_without_a_likelihood_the_error_names_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"does not know p\(x \| z\). Make it with SingleGroup\(likel"
    ):
        flat_prior().sample(3, SIR, draw_x=True)
    with pytest.raises(
        ValueError, match=r"Ladder does not know p\(x \| z\). Give it a method likel"
    ):
        stir(ladder_prior()).eval().sample(3, SIR, draw_x=True)
    with pytest.raises(TypeError, match="draw_x must be True or False; got 1"):
        flat_prior().sample(3, SIR, draw_x=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("likelihood", "match"),
    [
        (lambda z: z, r"likelihood\(state\) must return p\(x \| z\), .*; got a tensor"),
        (
            lambda z: bernoulli(z[:1]),
            r"A draw of p\(x \| z\) must have 3 rows; got a tensor .*\(1, 3\)",
        ),
        (lambda z: bernoulli(z).expand((4, 3)), "must have 3 rows; got a tensor"),
        (lambda z: Drawing(), r"A draw of p\(x \| z\) must be of type Tensor; got None"),
    ],
)
def test_a_wrong_likelihood_is_named(likelihood: Any, match: str) -> None:
    source: SingleGroup = flat(likelihood=likelihood)
    state = source.advance(source.start(3), torch.zeros(3, 2))
    with pytest.raises((TypeError, ValueError), match=match):
        sample_x(source, state)


class Drawing:
    """A distribution that draws nothing."""

    def sample(self) -> None:
        """Nothing."""
