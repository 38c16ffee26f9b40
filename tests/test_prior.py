from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings
from collections import UserDict
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers.problems import Codes, CorrelatedPair, ExactRatio, GaussianPair, SampleOnly
from helpers.toys import (
    VAE,
    Ladder,
    Rung,
    base,
    everything,
    flat,
    ladder_prior,
    same,
    stir,
    weights,
)
from torch import Size, Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.data import DataLoader, TensorDataset

from ncprior import Draw, Group, NCETrainer, NCPrior, SingleGroup, langevin, sir
from ncprior.bases import Empirical
from ncprior.distributions import PointMass, Sampleable, naming_bad_rows
from ncprior.heads.codes import CategoricalHead
from ncprior.heads.networks import ConvHead, MLPHead
from ncprior.nce import nce_loss
from ncprior.samplers.base import LogRatio
from ncprior.source import posterior_of, sample_posterior

SIR = partial(sir, num_proposals=20)
ULA = partial(langevin, num_steps=3, step_size=0.1)
MALA = partial(langevin, num_steps=3, step_size=0.1, adjusted=True)


def flat_prior() -> NCPrior:
    return stir(NCPrior(flat(), MLPHead((2,), width=8, depth=1)))


def hierarchical_prior() -> NCPrior:
    return stir(ladder_prior())


def codes_prior() -> NCPrior:
    return stir(NCPrior(Codes().source(), CategoricalHead((), 4, width=8, depth=1)))


# Toys that were never trained reconstruct nothing, and for_source says so.
UNTRAINED = pytest.mark.filterwarnings("ignore:Reconstructions of a row")

PRIORS: dict[str, Callable[[], NCPrior]] = {
    "flat": flat_prior,
    "hierarchical": hierarchical_prior,
    "codes": codes_prior,
}


def base_walk(source: Any, batch_size: int) -> tuple[list[Tensor], Tensor]:
    """What the VAE does without us."""
    with torch.no_grad():
        state, latents = source.start(batch_size), []
        for _ in range(source.num_groups):
            latents.append(source.group(state).prior.sample())
            state = source.advance(state, latents[-1])
        return latents, source.decode(state)


def equals_base(prior: NCPrior, sampler: Callable[..., Draw] = SIR) -> bool:
    torch.manual_seed(7)
    latents, x = base_walk(prior.source, 6)
    torch.manual_seed(7)
    sample = prior.sample(6, sampler)
    pairs = [*zip(sample.latents, latents, strict=True), (sample.x, x)]
    return all(torch.equal(a, b) for a, b in pairs)


# --- the base comes back ---


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_that_is_off_draws_the_base_bit_for_bit(name: str) -> None:
    prior = PRIORS[name]()
    assert not equals_base(prior)
    with prior.disabled():
        assert equals_base(prior)
        with prior.disabled():
            assert equals_base(prior)
        assert equals_base(prior)
    assert not equals_base(prior)
    prior.strength = 0.0
    assert equals_base(prior)
    prior.strength = 1.0
    prior.active = [False] * prior.source.num_groups
    assert equals_base(prior)
    prior.active = [True] * prior.source.num_groups
    assert not equals_base(prior)


def test_what_is_off_calls_no_sampler_and_no_head() -> None:
    prior, seen = hierarchical_prior(), []

    def sampler(p: Sampleable, log_ratio: LogRatio) -> Draw:
        z = p.sample()
        seen.append(log_ratio(z).shape)
        return Draw(z, ess=torch.ones(len(z)))

    prior.active = [False, True, False]
    sample = prior.sample(4, sampler)
    assert seen == [(4,)]
    assert [draw.ess is None for draw in sample.draws] == [True, False, True]
    prior.sample(4, sampler)
    with prior.disabled():
        prior.sample(4, sampler)
    assert len(seen) == 2


def test_an_inactive_group_is_the_base_given_the_groups_before_it() -> None:
    prior = hierarchical_prior()
    prior.active = [True, False, False]
    torch.manual_seed(7)
    sample = prior.sample(6, SIR)
    torch.manual_seed(7)
    state = prior.source.start(6)
    group = prior.source.group(state)
    z = sir(group.prior, lambda z: prior.heads[0](z, group.context), num_proposals=20).z
    assert torch.equal(sample.latents[0], z)
    for k in (1, 2):
        state = prior.source.advance(state, sample.latents[k - 1])
        assert torch.equal(sample.latents[k], prior.source.group(state).prior.sample())


def test_disabled_ends_with_an_exception_too() -> None:
    prior = flat_prior()
    with pytest.raises(KeyboardInterrupt), prior.disabled():
        raise KeyboardInterrupt
    assert not equals_base(prior)


def test_an_untrained_prior_has_the_law_of_the_base() -> None:
    prior = NCPrior.for_source(GaussianPair().source(), GaussianPair().data(64), width=16)
    n = 10_000
    sample = prior.sample(n, partial(sir, num_proposals=5))
    assert (sample.latents[0].mean(0).abs() < 4 / n**0.5).all()
    assert ((sample.latents[0].var(0) - 1).abs() < 4 * (2 / n) ** 0.5).all()
    assert sample.draws[0].ess is not None
    torch.testing.assert_close(sample.draws[0].ess, torch.full((n,), 5.0))


# --- sampling ---


@pytest.mark.parametrize("sampler", [SIR, ULA, MALA], ids=["sir", "ula", "mala"])
@pytest.mark.parametrize("name", ["flat", "hierarchical"])
def test_a_sample_has_x_latents_and_draws(name: str, sampler: Callable[..., Draw]) -> None:
    prior = PRIORS[name]()
    sample = prior.sample(6, sampler)
    count = prior.source.num_groups
    assert len(sample.latents) == len(sample.draws) == count
    assert all(z.shape == (6, 2) for z in sample.latents)
    assert all(draw.z is z for draw, z in zip(sample.draws, sample.latents, strict=True))
    state = prior.source.start(6)
    for z in sample.latents:
        state = prior.source.advance(state, z)
    assert torch.equal(sample.x, prior.source.decode(state))
    assert not sample.x.requires_grad
    assert all(p.grad is None for p in prior.parameters())


def test_the_hierarchy_brings_the_correlation_back() -> None:
    """Exact heads on an independent base: the exact finite-M correlation of the two groups."""
    problem, n, m = CorrelatedPair(), 20_000, 20
    sample = NCPrior(problem, problem.heads()).sample(n, partial(sir, num_proposals=m))
    z = torch.cat(sample.latents, 1).double()
    expected = problem.sir_correlation(m)
    got = torch.corrcoef(z.T)[0, 1].item()
    # Fisher's z has standard error 1/sqrt(n) for normal pairs; these are nearly so.
    assert abs(math.atanh(got) - math.atanh(expected)) < 5 / n**0.5


def test_a_condition_reaches_sampler_head_and_decoder() -> None:
    vae = VAE(condition=2)
    source = flat(vae, condition=lambda batch: batch[1])
    prior = stir(NCPrior(source, MLPHead((2,), context_shape=(2,), width=8)))
    c = torch.tensor([[1.0, -1.0]]).expand(5, 2)
    torch.manual_seed(1)
    sample = prior.sample(5, SIR, condition=c)
    assert torch.equal(sample.x, vae.decode(sample.latents[0], c))
    torch.manual_seed(1)
    other = prior.sample(5, SIR, condition=-c)  # the same proposals, weighed otherwise
    assert not torch.equal(sample.draws[0].ess, other.draws[0].ess)
    log_ratio = prior.log_ratio(sample.latents, c)
    torch.testing.assert_close(log_ratio[:, 0], prior.heads[0](sample.latents[0], c))
    for call in (lambda: prior.sample(5, SIR), lambda: prior.log_ratio(sample.latents)):
        with pytest.raises(ValueError, match="needs a condition"):
            call()
    assert prior.nce_loss((torch.randn(5, 3), c)).shape == (1,)


def test_errors_of_a_sampler_name_the_group() -> None:
    prior = hierarchical_prior()
    with torch.no_grad():
        prior.heads[1].out.bias.fill_(torch.nan)
    for sampler in (SIR, ULA, MALA):
        with pytest.raises(FloatingPointError, match="^Group 1: .*finite"):
            prior.sample(4, sampler)
    with pytest.raises(TypeError, match="^Group 0: .*discrete. Use sir"):
        codes_prior().sample(4, ULA)
    only = NCPrior(SingleGroup(SampleOnly(base()), VAE().posterior, VAE().decode), MLPHead((2,)))
    only.sample(4, SIR)
    with pytest.raises(TypeError, match="^Group 0: .*SampleOnly can only be sampled"):
        only.sample(4, ULA)
    wrong = NCPrior(flat(), ExactRatio(lambda z: z))
    with pytest.raises(ValueError, match="^Group 0: .*log_ratio must map z"):
        wrong.sample(4, SIR)


# --- strength and log_ratio ---


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_strength_scales_log_ratio_and_what_a_sampler_sees(alpha: float) -> None:
    prior, seen = hierarchical_prior(), []
    latents = [torch.randn(5, 2) for _ in range(3)]
    plain = prior.log_ratio(latents)
    prior.strength = alpha
    torch.testing.assert_close(prior.log_ratio(latents), alpha * plain)

    def sampler(p: Sampleable, log_ratio: LogRatio) -> Draw:
        z = p.sample()
        seen.append(log_ratio(z))
        return Draw(z)

    sample = prior.sample(5, sampler)
    torch.testing.assert_close(torch.stack(seen, 1), prior.log_ratio(sample.latents))


def test_strength_sharpens_the_law() -> None:
    """r^α p for log r = μz - μ²/2 is N(αμ, 1), up to what M proposals reach."""
    problem, n, m = GaussianPair(kl=0.5), 10_000, 200
    for alpha in (0.5, 1.5):
        prior = NCPrior(problem.source(), problem.head())
        prior.strength = alpha
        z = problem.project(prior.sample(n, partial(sir, num_proposals=m)).latents[0])
        law = problem.law
        scaled = type(law)(law.nodes, law.weight, alpha * law.log_r)
        mean = scaled.mean(law.nodes, m)
        assert abs(z.mean().item() - mean) < 4 / n**0.5
        assert abs(mean - alpha * problem.shift) < 0.1


def test_log_ratio_is_one_column_per_group() -> None:
    prior = hierarchical_prior()
    latents = [torch.randn(5, 2) for _ in range(3)]
    log_ratio = prior.log_ratio(latents)
    assert log_ratio.shape == (5, 3)
    state = prior.source.start(5)
    for k, z in enumerate(latents):
        context = prior.source.group(state).context
        torch.testing.assert_close(log_ratio[:, k], prior.heads[k](z, context))
        assert torch.equal(log_ratio[:, k], prior.log_r(k, z, context))
        state = prior.source.advance(state, z)
    prior.active[1] = False
    gated = prior.log_ratio(latents)
    assert (gated[:, 1] == 0).all()
    assert torch.equal(gated[:, [0, 2]], log_ratio[:, [0, 2]])
    with prior.disabled():
        assert torch.equal(prior.log_ratio(latents), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="source has 3 groups; got 2 latents"):
        prior.log_ratio(latents[:2])


def test_log_ratio_is_differentiable_in_every_latent() -> None:
    prior = hierarchical_prior()
    latents = [torch.randn(5, 2, requires_grad=True) for _ in range(3)]
    gradients = torch.autograd.grad(prior.log_ratio(latents).sum(), latents)
    assert all((g != 0).any() for g in gradients)


def test_a_deep_log_r_has_leading_axes() -> None:
    prior = hierarchical_prior()
    z, context = torch.randn(4, 7, 5, 2), torch.randn(5, 8)
    log_r = prior.log_r(2, z, context)
    assert log_r.shape == (4, 7, 5)
    prior.strength, prior.active = 3.0, [False] * 3
    assert torch.equal(prior.log_r(2, z, context), log_r)


# --- the loss ---


def test_nce_loss_is_the_objective_of_every_group_along_the_posterior() -> None:
    prior, x = hierarchical_prior(), torch.randn(64, 3)
    for nu in (1.0, 4.0):
        torch.manual_seed(3)
        losses = prior.nce_loss(x, nu)
        torch.manual_seed(3)
        source, expected = prior.source, []
        state = source.start(64, source.encode(x))
        for k in range(3):
            group = source.group(state)
            z_q = posterior_of(group).sample()
            z_p = group.prior.sample()
            log_q = prior.heads[k](z_q, group.context)
            log_p = prior.heads[k](z_p, group.context)
            expected.append(nce_loss(log_q, log_p, nu))
            state = source.advance(state, z_q)
        torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=1e-6)
        torch.manual_seed(3)
        assert torch.equal(prior(x, nu), losses)
        torch.manual_seed(3)
        each = list(prior.group_losses(x, nu))
        assert torch.equal(torch.stack([one.total for one in each]), losses)
        torch.manual_seed(3)
        plain = prior.nce_loss(x)  # what is reported, beside losses of held-out data
        assert torch.equal(torch.stack([one.nce for one in each]), plain)


@UNTRAINED
def test_an_untrained_prior_has_loss_two_log_two() -> None:
    prior = NCPrior.for_source(Ladder(), torch.randn(32, 3), width=8)
    torch.testing.assert_close(
        prior.nce_loss(torch.randn(9, 3)), torch.full((3,), 2 * math.log(2))
    )


def test_the_loss_has_gradients_for_heads_alone() -> None:
    prior = hierarchical_prior()
    x = torch.randn(8, 3, requires_grad=True)
    prior.nce_loss(x).sum().backward()
    assert all(p.grad is not None for p in prior.parameters())
    assert x.grad is None
    assert all(p.grad is None for p in prior.source.parameters())


def test_a_vae_in_training_mode_is_refused() -> None:
    vae = VAE()
    prior = NCPrior(flat(vae), MLPHead((2,)))
    vae.train()
    for call in (
        lambda: prior.nce_loss(torch.randn(4, 3)),
        lambda: prior.sample(4, SIR),
        lambda: NCPrior.for_source(prior.source, torch.randn(4, 3)),
    ):
        with pytest.raises(ValueError, match=r"training mode. Call vae.eval\(\)"):
            call()


def test_a_source_that_is_a_module_is_refused_in_training_mode_too() -> None:
    """BatchNorm in training mode would move the user's buffers in every step."""
    prior = hierarchical_prior()
    prior.source.train()
    before = everything(prior.source)
    with pytest.raises(ValueError, match="training mode"):
        prior.nce_loss(torch.randn(8, 3))
    assert everything(prior.source) == before


# --- construction ---


def test_one_head_per_group() -> None:
    with pytest.raises(ValueError, match="source has 3 groups, got 1 heads"):
        NCPrior(Ladder(), MLPHead((2,)))
    with pytest.raises(ValueError, match="source has 1 groups, got 2 heads"):
        NCPrior(flat(), [MLPHead((2,)), MLPHead((2,))])
    head = nn.Sequential(MLPHead((2,)))  # a module that is iterable is one head
    assert len(NCPrior(flat(), head).heads) == 1
    heads = nn.ModuleList(MLPHead((2,), context_shape=(8,)) for _ in range(3))
    assert NCPrior(Ladder(), heads).heads is heads
    assert len(NCPrior(Ladder(), (head for head in heads)).heads) == 3


def test_parameters_and_state_dict_are_the_heads() -> None:
    prior = hierarchical_prior()
    assert all(name.startswith("heads.") for name, _ in prior.named_parameters())
    assert all(name.startswith("heads.") for name in prior.state_dict())
    heads = [p for head in prior.heads for p in head.parameters()]
    assert [id(p) for p in prior.parameters()] == [id(p) for p in heads]
    assert prior.source not in list(prior.modules())
    other = hierarchical_prior()
    other.load_state_dict(prior.state_dict())
    assert same(weights(other), weights(prior))


def test_what_is_done_to_the_prior_is_not_done_to_a_module_source() -> None:
    prior = hierarchical_prior()
    before = everything(prior.source)
    prior.train().requires_grad_(False).double().apply(lambda m: m.train()).zero_grad()
    prior.to("cpu", torch.bfloat16)
    assert everything(prior.source) == before
    assert not prior.source.training


def test_another_module_as_source_is_not_registered_either() -> None:
    prior = hierarchical_prior()
    names = list(prior.state_dict())
    other = Ladder()
    prior.source = other
    assert prior.source is other
    assert list(prior.state_dict()) == names
    assert other not in list(prior.modules())


def test_deepcopy_copies_heads_and_shares_the_source() -> None:
    prior = hierarchical_prior()
    prior.strength, prior.active = 0.5, [True, False, True]
    prior.eval()
    other = copy.deepcopy(prior)
    assert other.source is prior.source
    assert same(weights(other), weights(prior))
    assert {id(p) for p in other.parameters()}.isdisjoint({id(p) for p in prior.parameters()})
    assert (other.strength, other.active, other.training) == (0.5, [True, False, True], False)
    other.active[0] = False
    assert prior.active[0]
    averaged = torch.optim.swa_utils.AveragedModel(prior)  # a common user of deepcopy
    assert averaged.module.source is prior.source


def test_repr_tells_the_settings() -> None:
    prior = hierarchical_prior()
    prior.strength, prior.active[1] = 0.5, False
    text = repr(prior)
    assert "source=Ladder, strength=0.5, groups_off=[1]" in text
    assert "encoder" not in text


# --- for_source ---


@UNTRAINED
def test_for_source_builds_a_head_per_group() -> None:
    prior = NCPrior.for_source(Ladder(), torch.randn(64, 3), width=24, depth=1, dropout=0.1)
    assert len(prior.heads) == 3
    for head in prior.heads:
        assert head.config() == {
            "event_shape": [2],
            "context_shape": [8],
            "width": 24,
            "depth": 1,
            "dropout": 0.1,
        }
    assert (prior.log_ratio([torch.randn(4, 2)] * 3) == 0).all()
    assert all(p.requires_grad for p in prior.parameters())
    assert type(NCPrior.for_source(Codes().source(), Codes().data(64)).heads[0]) is CategoricalHead


@UNTRAINED
def test_for_source_leaves_the_vae_alone() -> None:
    source = Ladder()
    before = everything(source)
    NCPrior.for_source(source, torch.randn(64, 3))
    assert everything(source) == before


def test_for_source_names_the_group_that_no_head_fits() -> None:
    class Broken(Ladder):
        def group(self, state: Rung) -> Group:
            group = super().group(state)
            bad = torch.full_like(state.h, torch.nan)
            return group._replace(context=bad) if len(state.latents) == 2 else group

    with pytest.raises(FloatingPointError, match="^Group 2: .*not finite"):
        NCPrior.for_source(Broken(), torch.randn(64, 3))
    with pytest.raises(TypeError, match="^Group 0: .*breadth"):
        NCPrior.for_source(Ladder(), torch.randn(64, 3), breadth=3)


def autoencoder(scale: Callable[[Tensor], Tensor], rows: int = 64) -> tuple[SingleGroup, Tensor]:
    """An ideal linear VAE of well-separated x, whose network says log_var = -6 (sd 0.05)."""

    def posterior(x: Tensor) -> Independent:
        log_var = torch.full_like(x, -6.0)
        return Independent(Normal(x, scale(log_var), validate_args=False), 1)

    return SingleGroup(base(8), posterior, lambda z: z), torch.randn(rows, 8)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda log_var: log_var.abs(),  # the log-variance itself
        lambda log_var: (-0.5 * log_var).exp(),  # a log-precision read with the wrong sign
        lambda log_var: (-log_var).exp(),
    ],
)
def test_for_source_warns_of_a_far_too_wide_posterior(mistake: Callable[[Tensor], Tensor]) -> None:
    source, x = autoencoder(mistake)
    with pytest.warns(UserWarning, match=r"no closer.*\(0.5 \* log_var\).exp\(\)") as record:
        NCPrior.for_source(source, x)
    assert record[0].filename == __file__  # the caller's line, not one of ours
    with pytest.warns(UserWarning, match="no closer"):
        NCPrior.for_source(source, (x, torch.arange(64)))


def test_for_source_does_not_measure_distances_of_tokens() -> None:
    tokens = torch.randint(100, (64, 8))
    posterior = SingleGroup(
        base(8),
        lambda x: Independent(Normal(x.float(), 1.0), 1),
        lambda z: torch.randint_like(z, 9).long(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NCPrior.for_source(posterior, tokens)


def test_for_source_does_not_warn_of_a_good_posterior() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (2, 7, 8, 64):
            source, x = autoencoder(lambda log_var: (0.5 * log_var).exp(), rows)
            NCPrior.for_source(source, x)
            NCPrior.for_source(source, [x])


def test_for_source_does_not_judge_what_it_cannot_compare() -> None:
    """x that is no tensor, or of another size than the decoder's mean (pixels as logits, say)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NCPrior.for_source(Codes().source(), Codes().data(64))
        source, x = autoencoder(lambda log_var: log_var.abs())

        wrapped = SingleGroup(base(8), lambda b: source._posterior(b["x"]), lambda z: z)
        NCPrior.for_source(wrapped, {"x": x})

    class Turned(SingleGroup):
        """Its decoder returns the columns in another order."""

        def observed(self, batch: Any) -> Tensor:
            return super().observed(batch).flip(1)

    source, x = autoencoder(lambda log_var: (0.5 * log_var).exp())
    NCPrior.for_source(Turned(base(8), source._posterior, lambda z: z.flip(1)), x)


# --- dtypes ---


class Recorder(nn.Module):
    """A head that remembers what it is given, and computes with a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.seen: list[tuple[torch.dtype, torch.dtype | None, torch.dtype]] = []

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        log_r = self.linear(z).squeeze(-1)
        self.seen.append((z.dtype, None if context is None else context.dtype, log_r.dtype))
        return log_r


class Autocast(Ladder):
    """A source whose networks run in bfloat16; it keeps what they return."""

    def group(self, state: Rung) -> Group:
        return super().group(state)._replace(context=state.h)


def test_heads_get_float32_under_autocast() -> None:
    prior = NCPrior(Autocast(), [Recorder() for _ in range(3)])
    x = torch.randn(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = prior.nce_loss(x)
        losses.sum().backward()
        sample = prior.sample(6, SIR)
        prior.sample(6, ULA)
        log_ratio = prior.log_ratio(sample.latents)
        assert torch.is_autocast_enabled("cpu")
    assert losses.dtype == log_ratio.dtype == torch.float32
    for head in prior.heads:
        assert len(head.seen) > 3
        assert set(head.seen) == {(torch.float32,) * 3}
        assert head.linear.weight.grad.dtype == torch.float32


def test_autocast_changes_no_log_ratio() -> None:
    prior = hierarchical_prior()
    z, context = torch.randn(5, 2), torch.randn(5, 8)
    plain = prior.log_r(0, z, context)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior.log_r(0, z, context), plain)


def test_half_precision_latents_are_widened() -> None:
    prior = NCPrior(flat(), Recorder())
    for dtype in (torch.float16, torch.bfloat16):
        prior.log_r(0, torch.randn(5, 2, dtype=dtype), torch.randn(5, 2, dtype=dtype))
    prior.log_ratio([torch.randn(5, 2).half()])
    assert [seen[:2] for seen in prior.heads[0].seen] == [
        (torch.float32, torch.float32),
        (torch.float32, torch.float32),
        (torch.float32, None),
    ]


@UNTRAINED
def test_a_float64_source_with_float32_heads() -> None:
    source = Ladder().double()
    x = torch.randn(64, 3).double()
    prior = stir(NCPrior.for_source(source, x, width=8))
    assert prior.nce_loss(x).isfinite().all()
    assert prior.sample(4, SIR).x.dtype == torch.float64
    assert prior.sample(4, ULA).x.dtype == torch.float64


@UNTRAINED
def test_prior_and_posterior_of_another_dtype_are_stacked() -> None:
    prior64 = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    vae = VAE()
    source = SingleGroup(prior64, vae.posterior, vae.decode, module=vae)
    prior = NCPrior.for_source(source, torch.randn(64, 3), width=8)
    prior.nce_loss(torch.randn(4, 3)).sum().backward()
    assert prior.sample(4, SIR).x.shape == (4, 3)


def test_sampling_under_inference_mode() -> None:
    prior = hierarchical_prior()
    with torch.inference_mode():
        assert prior.sample(4, SIR).x.shape == (4, 3)


@UNTRAINED
def test_maps_have_conv_heads_end_to_end() -> None:
    encoder = nn.Conv2d(1, 3, 3, padding=1).eval()
    decoder = nn.Conv2d(3, 1, 3, padding=1).eval()

    def posterior(x: Tensor) -> Independent:
        mean = encoder(x)
        return Independent(Normal(mean, torch.full_like(mean, 0.3), validate_args=False), 3)

    zeros = torch.zeros(3, 6, 6)
    source = SingleGroup(Independent(Normal(zeros, zeros + 1), 3), posterior, decoder)
    x = torch.randn(16, 1, 6, 6)
    prior = NCPrior.for_source(source, x, width=16, depth=1)
    assert type(prior.heads[0]) is ConvHead
    assert prior.nce_loss(x).shape == (1,)
    sample = stir(prior).sample(5, SIR)
    assert (sample.latents[0].shape, sample.x.shape) == ((5, 3, 6, 6), (5, 1, 6, 6))


def test_a_sample_only_prior_is_given_its_size() -> None:
    """SIR with proposals asks the wrapped sampler for (M, B) at once."""

    class Counting(SampleOnly):
        shapes: ClassVar[list[tuple[int, ...]]] = []

        def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
            self.shapes.append(tuple(sample_shape))
            return super().sample(sample_shape)

    vae = VAE()
    prior = stir(NCPrior(SingleGroup(Counting(base()), vae.posterior, vae.decode), MLPHead((2,))))
    assert prior.sample(4, partial(sir, num_proposals=7)).latents[0].shape == (4, 2)
    assert sum(math.prod(shape) for shape in Counting.shapes) == 28


@pytest.mark.parametrize(
    ("decoder", "got"),
    [
        (lambda z: (z, z), "got an object of type tuple"),
        (lambda z: z[:1], r"16 rows; got a tensor of float32, \(1, 2\)"),
    ],
)
def test_a_decoder_that_returns_something_else_is_refused(
    decoder: Callable[[Tensor], Any], got: str
) -> None:
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    source = SingleGroup(base, lambda x: Independent(Normal(x, 0.1), 1), decoder)
    with pytest.raises(TypeError, match=got):
        NCPrior.for_source(source, torch.randn(16, 2))


# --- what must not be silent ---


def test_F7_disabled_holds_for_its_own_thread_alone() -> None:
    prior, both, seen = flat_prior(), threading.Barrier(2), {}

    def first() -> None:
        with prior.disabled():
            both.wait()  # the second is inside as well
            both.wait()  # the second has left
            seen["first"] = prior.is_on(0)

    def second() -> None:
        with prior.disabled():
            both.wait()
            seen["second"] = prior.is_on(0)
        seen["after"] = prior.is_on(0)
        both.wait()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": False, "second": False, "after": True}
    assert prior.is_on(0)
    assert not equals_base(prior)


def test_F7_two_priors_may_leave_in_any_order() -> None:
    a, b = flat_prior(), flat_prior()
    inside_a, inside_b = a.disabled(), b.disabled()
    inside_a.__enter__()
    inside_b.__enter__()
    inside_a.__exit__(None, None, None)
    assert (a.is_on(0), b.is_on(0)) == (True, False)
    with b.disabled():
        pass
    assert not b.is_on(0)
    inside_b.__exit__(None, None, None)
    assert b.is_on(0)


def test_F7_copies_and_pickles_of_a_disabled_prior_are_on() -> None:
    prior = NCPrior(ExactlyNothing(), MLPHead((2,), width=8))
    prior.strength, prior.active = 0.5, [False]
    with prior.disabled():
        others = [copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))]
        assert not any(other.is_on(0) for other in others)  # not active
        for other in others:
            other.active[0] = True
            assert other.is_on(0)
            assert other.strength == 0.5


class ExactlyNothing(SingleGroup):
    """A source that pickle can take: without lambdas."""

    def __init__(self) -> None:
        super().__init__(base(), VAE().posterior, VAE().decode)


NOT_A_STRENGTH = [-1, -0.1, math.nan, math.inf, 1 + 1j, True, "1", None, torch.ones(())]


@pytest.mark.parametrize("value", NOT_A_STRENGTH, ids=repr)
def test_F18_W10_a_strength_is_validated_when_it_is_set(value: Any) -> None:
    prior = flat_prior()
    with pytest.raises((TypeError, ValueError), match=r"strength must be a number in \[0, inf\)"):
        prior.strength = value
    assert prior.strength == 1.0


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([True], "one bool per group: there are 3 groups, got 1"),
        ([True] * 4, "there are 3 groups, got 4"),
        ([1, 0, 1], "got 1 in it"),
        (["yes"] * 3, "got 'yes' in it"),
        (True, "list of 3 bools; got True"),
        ("yes", "list of 3 bools; got 'yes'"),
        (None, "list of 3 bools; got None"),
    ],
)
def test_F18_W10_active_is_validated_when_it_is_set(value: Any, match: str) -> None:
    prior = hierarchical_prior()
    with pytest.raises((TypeError, ValueError), match=match):
        prior.active = value
    assert prior.active == [True, True, True]


def test_F18_items_of_active_are_validated_too() -> None:
    prior = hierarchical_prior()
    prior.active = np.array([True, False, True])
    prior.active[2], prior.active[:2] = False, [False, True]
    assert prior.active == [False, True, False]
    with pytest.raises(TypeError, match="got 1 in it"):
        prior.active[0] = 1
    with pytest.raises(ValueError, match="got 2"):
        prior.active[:2] = [True]
    with pytest.raises(AttributeError):
        prior.active.append(True)  # type: ignore[attr-defined]
    assert prior.active == [False, True, False]
    assert repr(prior.active) == "[False, True, False]"


@pytest.mark.parametrize("value", [torch.float16, "bf16", None])
def test_F17_a_precision_is_validated_when_it_is_set(value: Any) -> None:
    with pytest.raises(ValueError, match="precision must be one of torch.float32, torch.bfloat16"):
        flat_prior().precision = value


def test_F14_an_empty_batch_raises() -> None:
    for x in (torch.empty(0, 3), (torch.empty(0, 3),), np.empty((0, 3)), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="1 or more rows"):
            NCPrior.for_source(flat(), x)
    with pytest.raises(ValueError, match="1 or more rows"):
        flat_prior().nce_loss(torch.empty(0, 3))


@pytest.mark.parametrize("x", [None, "x", 3, Tensor, DataLoader(TensorDataset(torch.ones(2, 3)))])
def test_F36_what_is_no_batch_raises(x: Any) -> None:
    for use in (partial(NCPrior.for_source, flat()), flat_prior().nce_loss):
        with pytest.raises(TypeError, match="x must be one batch"):
            use(x)


@pytest.mark.parametrize("name", ["flat", "hierarchical"])
def test_F15_a_row_that_is_not_finite_raises(name: str) -> None:
    prior, x = PRIORS[name](), torch.randn(32, 3)
    x[5, 1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"Group 0: The NCE loss is not finite.*in x"):
        prior.nce_loss(x)
    for use in (sample_posterior, NCPrior.for_source):
        with pytest.raises((ValueError, FloatingPointError), match="finite"):
            use(prior.source, x)
    z = torch.randn(32, 2)
    z[3] = torch.inf
    with pytest.raises(FloatingPointError, match="log r is not finite"):
        prior.log_ratio([z] * prior.source.num_groups)


def test_F15_the_rows_are_counted() -> None:
    source = SingleGroup(
        base(), lambda x: Independent(Normal(x, x.abs(), validate_args=False), 1), lambda z: z
    )
    x = torch.randn(32, 2)
    x[3] = x[7, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"Group 0: q\(z \| x\) is NaN or infinite in 2 of 32 rows"
    ):
        sample_posterior(source, x)


def test_F15_other_errors_are_left_as_they_are() -> None:
    """A logit of -inf and an unknown log q are in order."""
    logits = torch.tensor([[0.0, -torch.inf]]).expand(32, 2)
    for q in (Categorical(logits=logits), PointMass(torch.randn(32, 2))):
        with pytest.raises(ValueError, match="of my own"), naming_bad_rows(0, q):
            raise ValueError("An error of my own.")
    bad = Categorical(logits=torch.full((32, 2), torch.nan), validate_args=False)
    with pytest.raises(ValueError, match="in 32 of 32 rows"), naming_bad_rows(0, bad):
        raise ValueError("An error of torch.")


def test_heads_share_no_parameter_with_each_other() -> None:
    prior = hierarchical_prior()
    head, other = prior.heads[0], prior.heads[1]
    other.norm = head.norm
    for heads in ([head] * len(prior.heads), prior.heads):
        with pytest.raises(ValueError, match=r"heads 0 and 1 share the parameter"):
            NCPrior(prior.source, heads)


@pytest.mark.parametrize("of_latents", [False, True])
def test_log_ratio_back_propagates_into_the_vae_for_latents_alone(*, of_latents: bool) -> None:
    prior = hierarchical_prior()
    latents = prior.sample(5, SIR).latents
    if of_latents:
        latents = tuple(z.requires_grad_() for z in latents)
    prior.log_ratio(latents).sum().backward()
    assert all(p.grad is not None for p in prior.parameters())
    ladder = prior.source
    assert isinstance(ladder, Ladder)
    assert any(p.grad is not None for p in ladder.parameters()) == of_latents


def test_F21_gradients_under_autocast_are_those_without() -> None:
    source = SingleGroup(
        base(), lambda x: Independent(Normal(x, 0.3, validate_args=False), 1), lambda z: z
    )
    prior, x = stir(NCPrior(source, MLPHead((2,), width=64))), torch.randn(64, 2)
    ula = partial(langevin, num_steps=10, step_size=0.1)
    found = []
    for enabled in (False, True):
        trainer = NCETrainer(prior, torch.optim.SGD(prior.parameters(), lr=0.0))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.manual_seed(1)
            z = prior.sample(50, ula).latents[0]
            trainer.step(x)
            assert torch.is_autocast_enabled("cpu") == enabled
        found.append((z, [p.grad.clone() for p in prior.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("count", [-1, 0, 2.5, "3", None, True])
def test_F26_sample_takes_a_whole_number(count: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"batch_size must be a whole number in \[1"):
        flat_prior().sample(count, SIR)


def test_F26_draws_and_weights_are_numbers() -> None:
    prior, x = flat_prior(), torch.randn(4, 3)
    for wrong in (0, 1.5, "2"):
        with pytest.raises((TypeError, ValueError), match="num_draws must be a whole number"):
            prior.nce_loss(x, num_draws=wrong)
        with pytest.raises((TypeError, ValueError), match=r"must be a (whole )?number in"):
            prior.is_on(wrong + 3 if wrong != "2" else wrong)
    for weight in (0, -1.0, math.nan, math.inf, "1", None):
        with pytest.raises((TypeError, ValueError), match=r"noise_weight must be a number in \(0"):
            prior.nce_loss(x, weight)


def test_F36_wrong_objects_of_a_prior_are_named() -> None:
    prior = flat_prior()
    group, z = prior.source.group(prior.source.start(4)), torch.randn(4, 2)
    for use, match in (
        (lambda: prior.sample(4, 3), "sampler must be a function; got 3"),
        (lambda: prior.sample(4, Draw), "sampler must be a function; got the class Draw"),
        (
            lambda: prior.sample(4, lambda p, r: p.sample()),
            "result of a sampler must be of type Draw",
        ),
        (lambda: prior.draw(0, group.prior, SIR), "group must be of type Group"),
        (lambda: prior.log_ratio(z), "latents must be of type list or tuple"),
        (lambda: prior.log_r(0, None, None), "z must be of type Tensor"),
        (
            lambda: setattr(prior, "source", VAE()),
            "A source is a subclass of ncprior.LatentSource",
        ),
    ):
        with pytest.raises(TypeError, match=match):
            use()  # type: ignore[no-untyped-call]


def test_F35_a_sampler_that_returns_nan_raises() -> None:
    with pytest.raises(FloatingPointError, match="Group 0: the sampler has drawn z that are not"):
        flat_prior().sample(4, lambda p, r: Draw(p.sample() * torch.nan))


def nan_beyond(vae: VAE, limit: float) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.where(z[:, :1].abs() > limit, torch.nan, vae.decode(z))


def test_W9_nan_images_are_told() -> None:
    vae = VAE()
    source = SingleGroup(base(), vae.posterior, nan_beyond(vae, 1.0), module=vae)
    prior = stir(NCPrior(source, MLPHead((2,), width=8)))
    with pytest.warns(
        UserWarning, match=r"The decoder has returned NaN or infinity in \d+ of 200"
    ):
        prior.sample(200, SIR)
    with pytest.warns(UserWarning, match="The decoder has returned NaN") as found:
        NCPrior.for_source(
            SingleGroup(base(), vae.posterior, nan_beyond(vae, 0.1)), torch.randn(64, 3)
        )
    assert len(found) == 1  # and no word of the posterior's scale
    assert found[0].filename == __file__


def test_C5_one_number_per_row_is_a_batch() -> None:
    source = SingleGroup(
        Normal(torch.tensor(0.0), 1.0), lambda v: Normal(v, 0.1 + 0 * v), lambda z: z
    )
    assert NCPrior.for_source(source, torch.randn(64)).nce_loss(torch.randn(64)).shape == (1,)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_M3_data_in_bytes_reconstruct_as_well_as_data_in_one(dtype: torch.dtype) -> None:
    p = Independent(Normal(torch.zeros(6), torch.ones(6)), 1)
    source = SingleGroup(p, lambda x: Independent(Normal(x / 255, 0.01), 1), lambda z: z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NCPrior.for_source(source, (255 * torch.rand(64, 6)).to(dtype))


def test_G_C2_data_are_moved_to_the_heads() -> None:
    """The VAE is a fake on another device: it sees where its batch is."""
    seen = []

    class Far(SingleGroup):
        def encode(self, x: Any) -> Any:
            seen.append(x["x"].device.type)
            raise InterruptedError

    source = Far(base(), VAE().posterior, VAE().decode)
    prior = NCPrior(source, MLPHead((2,), width=8)).to("meta")
    with pytest.raises(InterruptedError):
        prior.nce_loss({"x": torch.randn(4, 3)})
    assert seen == ["meta"]


def test_G_C6_parts_on_two_devices_are_named() -> None:
    prior = NCPrior(flat(), MLPHead((2,), width=8)).to("meta")
    match = "base on cpu, VAE on cpu, heads on meta. Move"
    for use in (lambda: prior.nce_loss(torch.randn(4, 3)), lambda: prior.sample(4, SIR)):
        with pytest.raises(ValueError, match=match):
            use()
    far = Independent(Normal(torch.zeros(2, device="meta"), 1.0, validate_args=False), 1)
    vae = VAE()
    with pytest.raises(ValueError, match="base on meta, VAE on cpu. Move"):
        NCPrior.for_source(
            SingleGroup(far, vae.posterior, vae.decode, module=vae), torch.randn(9, 3)
        )


def test_a_decoder_of_several_tensors_is_told_of_at_the_first_sample() -> None:
    base = Independent(Normal(torch.zeros(2), 1.0), 1)
    source = SingleGroup(base, lambda x: base.expand(x.shape[:1]), lambda z: (z, z))
    prior = NCPrior(source, MLPHead((2,), width=8)).eval()
    with pytest.raises(
        TypeError, match=r"mean of p\(x \| z\) as one tensor; got an object of type tuple"
    ):
        prior.sample(4, partial(sir, num_proposals=5))


def test_a_wrapper_of_the_vae_has_no_mode_of_its_own() -> None:
    """`vae.eval()` does not reach it, and the remedy was to call that."""
    vae = nn.Linear(2, 2).eval()
    base = Independent(Normal(torch.zeros(2), 1.0), 1)
    source = SingleGroup(
        base, lambda x: base.expand(x.shape[:1]), vae, module=nn.DataParallel(vae)
    )
    NCPrior(source, MLPHead((2,), width=8)).eval().sample(4, partial(sir, num_proposals=5))


def test_stored_latents_of_an_array_have_the_default_dtype() -> None:
    assert Empirical(np.zeros((5, 2))).sample((3,)).dtype == torch.float32
    assert Empirical(torch.zeros(5, 2, dtype=torch.float64)).sample().dtype == torch.float64


def test_a_source_of_other_groups_is_refused() -> None:
    prior = hierarchical_prior()
    with pytest.raises(ValueError, match="the source has 1 groups, got 3 heads"):
        prior.source = flat()


def test_conditions_may_be_mappings_of_any_kind_and_are_named() -> None:
    source = SingleGroup(
        base(),
        lambda x, c: Independent(Normal(x[:, :2], 1.0), 1),
        lambda z, c: z,
        condition=lambda x: UserDict(y=x),
        context=lambda c: c["y"],
    )
    prior = NCPrior(source, MLPHead((2,), context_shape=(3,), width=8))
    assert prior.sample(4, SIR, condition=UserDict(y=torch.randn(4, 3))).x.shape == (4, 2)
    with pytest.raises(
        TypeError, match=r"condition must be one batch.*one row per row of the batch"
    ):
        prior.sample(4, SIR, condition=3)
