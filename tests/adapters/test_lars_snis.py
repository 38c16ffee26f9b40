"""LARS and SNIS: the laws of their priors, their VAEs, and the walks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import Array, GaussianPair, SIRLaw, two_point_law
from helpers.toys import everything
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.utils._pytree import tree_leaves

from ncprior import NCPrior, fit, langevin, sir
from ncprior.adapters.lars_snis import (
    EIMVAE,
    Binarised,
    ConvEIMSource,
    ConvEIMVAE,
    EIMSource,
    EnergyNet,
    LARSPrior,
    SNISPrior,
    train_vae,
)
from ncprior.heads.networks import MLPHead
from ncprior.source import sample_posterior
from ncprior.testing import check_source
from ncprior.utils.fingerprints import base_fingerprint

PAIR = GaussianPair(kl=1.0, dim=1)


class Logit(nn.Module):
    """An acceptance of one latent with two bumps; `shift` makes it rare."""

    def __init__(self, shift: float = -2.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, z: Tensor) -> Tensor:
        return self.shift + 3 * torch.sin(2 * z[..., 0]) + z[..., 0]


def grid() -> tuple[Tensor, Tensor]:
    """Nodes z, (n, 1), and weights of the quadrature of N(0, 1)."""
    z = torch.linspace(-9, 9, 3601).double()
    weight = torch.exp(-0.5 * z**2)
    return z[:, None], weight / weight.sum()


def lars(truncation: int, shift: float = -2.0) -> LARSPrior:
    """A LARS prior of one latent with the exact normaliser."""
    prior = LARSPrior(1, truncation=truncation)
    prior.logit = Logit(shift)
    z, weight = grid()
    with torch.no_grad():
        prior.normaliser.fill_(weight @ prior.logit(z).sigmoid())
    return prior.eval()


def chi_square(sample: Tensor, nodes: Array, probability: Array, bins: int = 24) -> float:
    """The p-value of a sample under a law on nodes, over bins of about equal probability."""
    edges = np.searchsorted(np.cumsum(probability), np.arange(1, bins) / bins)
    cuts = (nodes[edges] + nodes[edges + 1]) / 2  # between nodes
    expected = np.diff([0.0, *np.cumsum(probability)[edges], 1.0])
    counts = np.bincount(np.searchsorted(cuts, sample.numpy().ravel()), minlength=bins)
    return float(stats.chisquare(counts, expected * len(sample)).pvalue)


def grey(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 28, 28)


def binary(count: int = 6) -> Tensor:
    return torch.bernoulli(grey(count))


def priors() -> dict[str, Callable[[], SNISPrior | LARSPrior | None]]:
    def estimated() -> LARSPrior:
        prior = LARSPrior()
        prior.estimate_normaliser(1000)
        return prior

    return {"normal": lambda: None, "snis": lambda: SNISPrior(num_proposals=8), "lars": estimated}


def flat(prior: SNISPrior | LARSPrior | None = None) -> EIMVAE:
    return EIMVAE(grey(20).mean(0), prior).eval()


def two_level(prior: SNISPrior | LARSPrior | None = None) -> ConvEIMVAE:
    return ConvEIMVAE(grey(20).mean(0), prior).eval()


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# The networks


def test_the_networks_have_the_papers_numbers_of_parameters() -> None:
    vae = flat()
    assert num_parameters(vae.encoder) == 355_900
    assert num_parameters(vae.decoder) == 341_584
    assert num_parameters(EnergyNet()) == 15_301
    assert num_parameters(flat(SNISPrior())) == 355_900 + 341_584 + 15_301
    assert num_parameters(flat(LARSPrior())) == 355_900 + 341_584 + 15_301


def test_the_convolutions_go_from_28_over_14_and_7_to_4_and_back() -> None:
    vae, sizes = two_level(), []
    for network in (vae.features, vae.decoder):
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.register_forward_hook(lambda *args: sizes.append(args[2].shape[-1]))
    source = ConvEIMSource(vae)
    state = sample_posterior(source, binary())[1]
    source.decode(state)
    assert sizes == [14, 7, 4, 8, 14, 28]


def test_the_last_convolution_pads_the_odd_row_behind() -> None:
    """TensorFlow's 'same' of 7 pixels at stride 2 and kernel 4: 3 in all, 1 in front."""
    (padding,) = [m for m in two_level().features if isinstance(m, nn.ZeroPad2d)]
    assert padding.padding == (1, 2, 1, 2)


def test_the_encoder_sees_the_image_less_the_mean() -> None:
    vae, x = flat(), binary()
    expected = vae.encoder(x - vae.mean)[:, :50]
    assert torch.equal(vae.posterior(x).mean, expected)


def test_the_decoder_starts_from_the_mean_image() -> None:
    mean = torch.rand(1, 28, 28)
    mean[0, 0, :2] = torch.tensor([0.0, 1.0])
    vae = EIMVAE(mean).eval()
    with torch.no_grad():
        vae.decoder[-2].weight.zero_()
        x = vae.decode(torch.randn(3, 50))
    assert torch.allclose(x, mean.clamp(1e-4, 0.9999).expand(3, -1, -1, -1), atol=1e-6)


def test_the_posteriors_scale_is_at_least_1e_5() -> None:
    vae = flat()
    with torch.no_grad():
        vae.encoder[-1].bias[50:] = torch.linspace(-100, 10, 50)
    scale = vae.posterior(binary()).stddev
    assert scale.min() == torch.tensor(1e-5)
    assert scale.max() > 5


def test_a_vae_leaves_a_given_priors_weights_as_they_are() -> None:
    for prior in (SNISPrior(), LARSPrior()):
        before = everything(prior)
        for kind in (EIMVAE, ConvEIMVAE):
            kind(grey().mean(0), prior)
            assert everything(prior) == before


# SNIS


def test_snis_draws_from_the_exact_law_of_two_points() -> None:
    """Energy log 3 on the upper 30 % of N(0, 1), else 0, and K = 3: 0.4536, not 0.5625."""
    cut = Normal(0.0, 1.0).icdf(torch.tensor(0.7))
    prior = SNISPrior(1, num_proposals=3, energy=lambda z: math.log(3) * (z[..., 0] > cut).float())
    share = (prior.sample((100_000,)) > cut).float().mean().item()
    exact = two_point_law(0.3, 3, 3)
    assert share == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 100_000))


@pytest.mark.parametrize("num_proposals", [1, 4, 64])
def test_snis_draws_from_the_exact_law_of_k_proposals(num_proposals: int) -> None:
    prior = SNISPrior(1, num_proposals=num_proposals, energy=PAIR.log_r)
    sample = prior.sample((20_000,))
    law = PAIR.law
    assert chi_square(sample, law.nodes, law.probabilities(num_proposals)) > 1e-3
    assert chi_square(sample, law.nodes, law.probabilities(num_proposals + 1)) < 1e-3 or (
        num_proposals == 64  # too close to tell
    )


def log_ratios(law: SIRLaw, num_proposals: int) -> tuple[Tensor, Tensor]:
    """Points z, (n, 1), and the exact log-ratio of SNIS to its base there."""
    some = np.flatnonzero(np.abs(law.nodes) < 2.5)[::20]
    ratio = law.probabilities(num_proposals)[some] / law.weight[some]
    return torch.tensor(law.nodes[some, None]).float(), torch.tensor(ratio).log()


@pytest.mark.parametrize("num_proposals", [2, 8, 32])
def test_snis_bound_is_unbiased_for_the_ratio_and_below_its_log(num_proposals: int) -> None:
    z, exact = log_ratios(PAIR.law, num_proposals)
    prior = SNISPrior(1, num_proposals=num_proposals, energy=PAIR.log_r)
    bounds = torch.stack([prior.log_ratio(z) for _ in range(4000)]).double()
    ratio = bounds.exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert ((ratio.mean(0) - exact.exp()).abs() < 4 * error).all()
    slack = exact - bounds.mean(0)
    assert (slack > 4 * bounds.std(0) / math.sqrt(len(bounds))).all()


def test_snis_bound_tightens_with_the_number_of_proposals() -> None:
    """To log r - log Z = log r: the head of the pair is normalised."""
    z = torch.linspace(-2, 2, 9)[:, None]
    slack = []
    for num_proposals in (2, 16, 128):
        prior = SNISPrior(1, num_proposals=num_proposals, energy=PAIR.log_r)
        bounds = torch.stack([prior.log_ratio(z) for _ in range(2000)])
        _, exact = z, torch.tensor(PAIR.law.probabilities(num_proposals) / PAIR.law.weight).log()
        nearest = np.abs(PAIR.law.nodes[None] - z.numpy()).argmin(1)
        slack.append((exact[nearest] - bounds.mean(0)).mean().item())
    assert slack[0] > 2 * slack[1] > 4 * slack[2] > 0
    prior = SNISPrior(1, num_proposals=400_000, energy=PAIR.log_r)
    assert torch.allclose(prior.log_ratio(z), PAIR.log_r(z), atol=0.02)


def test_snis_of_one_proposal_is_its_base() -> None:
    prior = SNISPrior(50, num_proposals=1)
    assert torch.equal(prior.log_ratio(torch.randn(3, 4, 50)), torch.zeros(3, 4))


def test_snis_does_not_move_with_the_energys_constant() -> None:
    z = torch.randn(5, 1)
    values = []
    for constant in (0.0, 500.0, -500.0):
        torch.manual_seed(1)
        prior = SNISPrior(1, num_proposals=9, energy=lambda z, c=constant: PAIR.log_r(z) + c)
        values.append(prior.log_ratio(z))
    assert torch.allclose(values[0], values[1], atol=1e-3)
    assert torch.allclose(values[0], values[2], atol=1e-3)


def test_snis_bounds_have_a_gradient_through_z_energy_and_proposals() -> None:
    prior, z = SNISPrior(num_proposals=4), torch.randn(3, 50, requires_grad=True)
    prior.log_ratio(z).sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0
    bias = prior.energy.layers[
        -1
    ].bias.grad  # a constant moves z's energy and the proposals' alike
    assert abs(bias.item()) < 1e-5


# LARS


@pytest.mark.parametrize("truncation", [2, 5, 100])
@pytest.mark.parametrize("shift", [-6.0, 0.0])
def test_lars_density_integrates_to_one(truncation: int, shift: float) -> None:
    prior = lars(truncation, shift)
    z, weight = grid()
    with torch.no_grad():
        total = weight @ prior.log_ratio(z).exp()
    assert total.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("truncation", "shift"), [(2, -2.0), (5, -4.0), (100, -4.0), (20, 0.0)])
def test_lars_draws_from_its_density(truncation: int, shift: float) -> None:
    prior = lars(truncation, shift)
    z, weight = grid()
    with torch.no_grad():
        probability = (weight * prior.log_ratio(z).exp()).numpy()
    sample = prior.sample((20_000,))
    assert chi_square(sample, z[:, 0].numpy(), probability / probability.sum()) > 1e-3
    assert chi_square(sample, z[:, 0].numpy(), weight.numpy()) < 1e-6


def test_lars_takes_the_last_proposal_whatever_it_is() -> None:
    prior = lars(3, shift=-1000.0)  # accepts nothing
    sample = prior.sample((20_000,))
    z, weight = grid()
    assert chi_square(sample, z[:, 0].numpy(), weight.numpy()) > 1e-3


def test_lars_normaliser_is_estimated_within_its_error() -> None:
    prior = lars(10)
    exact = prior.normaliser.item()
    errors = []
    for _ in range(20):
        standard_error = prior.estimate_normaliser(3000)
        errors.append((math.log(prior.normaliser.item()) - math.log(exact)) / standard_error)
    assert 0.5 < np.std(errors) < 1.6  # chi-square of 19 degrees: 4 sd at most
    assert abs(np.mean(errors)) < 4 / math.sqrt(20)
    assert prior.estimate_normaliser(250_000) < 0.01  # more than one chunk


def test_lars_averages_its_normaliser_while_training() -> None:
    prior = LARSPrior(1, num_proposals=64, decay=0.9).train()
    prior.logit = Logit()
    seen, z = [], torch.randn(5, 1)
    torch.manual_seed(1)
    for _ in range(3):
        value = prior.log_ratio(z)
        seen.append(prior.normaliser.item())
        assert torch.allclose(prior.eval().log_ratio(z), value)
        prior.train()
    torch.manual_seed(1)
    fresh = [prior.logit(torch.randn(64, 1)).sigmoid().mean().item() for _ in range(3)]
    second = 0.9 * fresh[0] + 0.1 * fresh[1]
    assert seen == pytest.approx([fresh[0], second, 0.9 * second + 0.1 * fresh[2]])


def test_lars_of_constant_acceptance_is_its_base_with_no_gradient_to_it() -> None:
    """Whatever a is, a (1 - α)/Z + α = 1 at Z = a: numerator and normaliser must cancel."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(-1.0))

        def forward(self, z: Tensor) -> Tensor:
            return self.value.expand(z.shape[:-1])

    prior = LARSPrior(2).train()
    prior.logit = Constant()
    value = prior.log_ratio(torch.randn(5, 2))
    assert torch.allclose(value, torch.zeros(5), atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), prior.logit.value)
    assert abs(gradient.item()) < 1e-5


@pytest.mark.parametrize("shift", [-1000.0, -90.0, 40.0, 1000.0])
def test_lars_is_finite_where_everything_or_nothing_is_accepted(shift: float) -> None:
    prior = LARSPrior(1).train()
    prior.logit = Logit(shift)
    value = prior.log_ratio(torch.randn(5, 1))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(prior.logit.shift.grad)


def test_lars_needs_its_normaliser() -> None:
    prior = LARSPrior().eval()
    with pytest.raises(ValueError, match=r"call prior\.estimate_normaliser\(\)"):
        prior.log_ratio(torch.randn(2, 50))
    source = EIMSource(flat(LARSPrior()))
    with pytest.raises(ValueError, match="has not been estimated"):
        source.group(source.start(2)).prior.log_prob(torch.randn(2, 50))


def test_lars_law_is_a_distribution() -> None:
    prior = lars(10)
    law = prior.distribution()
    assert isinstance(law, Distribution)
    rows = law.expand((4,))
    assert (rows.batch_shape, rows.event_shape) == ((4,), (1,))
    z = rows.sample((7,))
    assert z.shape == (7, 4, 1)
    expected = Normal(0.0, 1.0).log_prob(z[..., 0]) + prior.log_ratio(z)
    assert torch.allclose(rows.log_prob(z), expected)


def test_lars_law_can_be_walked_by_langevin_and_snis_cannot() -> None:
    heads = MLPHead((50,), width=8)
    sampler = partial(langevin, num_steps=2, step_size=0.1, adjusted=True)
    model = flat(priors()["lars"]())
    draw = NCPrior(EIMSource(model), heads).sample(3, sampler).draws[0]
    assert draw.acceptance is not None and draw.acceptance.min() > 0
    with pytest.raises(TypeError, match=r"prior SNISPrior can only be sampled\. Use sir"):
        NCPrior(EIMSource(flat(SNISPrior())), heads).sample(3, sampler)


def test_lars_fingerprint_tells_weights_normaliser_and_truncation() -> None:
    def fingerprint(change: Callable[[LARSPrior], Any]) -> str | None:
        torch.manual_seed(1)
        prior = LARSPrior()
        change(prior)
        return base_fingerprint(prior.distribution())

    same = fingerprint(lambda prior: None)
    others = {
        fingerprint(lambda prior: setattr(prior, "truncation", 7)),
        fingerprint(lambda prior: prior.normaliser.fill_(0.5)),
        fingerprint(lambda prior: prior.logit.layers[0].bias.data.fill_(1)),
    }
    assert same == fingerprint(lambda prior: None)
    assert len({same, *others}) == 4


# Both priors


@pytest.mark.parametrize("prior", [SNISPrior(num_proposals=5), LARSPrior(truncation=5)])
def test_draws_and_ratios_have_the_asked_shapes(prior: SNISPrior | LARSPrior) -> None:
    for shape in ((), (3,), (2, 3)):
        assert prior.sample(torch.Size(shape)).shape == (*shape, 50)
        assert prior.log_ratio(torch.randn(*shape, 50)).shape == shape


@pytest.mark.parametrize("prior", [SNISPrior(num_proposals=500), LARSPrior(truncation=50)])
def test_rows_do_not_share_proposals(prior: SNISPrior | LARSPrior) -> None:
    """A network that wants one corner would give rows with common proposals the same winner."""
    network = prior.energy if isinstance(prior, SNISPrior) else prior.logit
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(5)
    assert len(prior.sample((200,))[:, 0].unique()) == 200


@pytest.mark.parametrize("prior", [SNISPrior(num_proposals=5), LARSPrior(truncation=5)])
def test_a_network_that_is_not_finite_is_refused(prior: SNISPrior | LARSPrior) -> None:
    with torch.no_grad():
        next(prior.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        prior.sample((3,))
    if isinstance(prior, LARSPrior):
        with pytest.raises(FloatingPointError, match="not finite"):
            prior.estimate_normaliser(10)


def test_wrong_numbers_of_proposals_are_refused() -> None:
    with pytest.raises(ValueError, match="num_proposals must be .*; got 0"):
        SNISPrior(num_proposals=0)
    for name, value in (("truncation", 1), ("num_proposals", 0), ("decay", 1)):
        with pytest.raises(ValueError, match=f"{name} must be .*; got {value}"):
            LARSPrior(**{name: value})
    with pytest.raises(ValueError, match="num_samples must be .*; got 0"):
        LARSPrior().estimate_normaliser(0)


# The VAEs


def test_the_elbo_is_its_two_terms() -> None:
    vae, x = flat(), binary()
    torch.manual_seed(1)
    loss = vae.negative_elbo(x)
    torch.manual_seed(1)
    q = vae.posterior(x)
    z = q.rsample()
    kl = kl_divergence(q, Independent(Normal(torch.zeros(6, 50), 1.0), 1))
    p = vae.decode(z)
    log_p = (x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3))
    assert torch.allclose(loss, kl - log_p, rtol=1e-4)


@pytest.mark.parametrize("make", [flat, two_level])
def test_a_prior_moves_the_elbo_by_its_log_ratio_at_z(make: Callable[..., Any]) -> None:
    vae, x = make(), binary()
    torch.manual_seed(1)
    plain = vae.negative_elbo(x)
    torch.manual_seed(1)
    z = (
        vae.posterior(x) if make is flat else Independent(Normal(*vae.encode(x)[:2]), 1)
    ).rsample()
    prior = SNISPrior(num_proposals=1, energy=None)
    prior.log_ratio = lambda z: z[..., 0]  # type: ignore[method-assign]
    vae.prior = prior
    torch.manual_seed(1)
    assert torch.allclose(vae.negative_elbo(x), plain - z[:, 0], atol=1e-3)


def test_the_two_level_elbo_is_its_three_terms() -> None:
    vae, x = two_level(), binary()
    torch.manual_seed(1)
    loss = vae.negative_elbo(x)
    torch.manual_seed(1)
    source = ConvEIMSource(vae)
    state = source.start(6, source.encode(x))
    kl = torch.zeros(6)
    for _ in range(2):
        group = source.group(state)
        kl = kl + kl_divergence(group.posterior, group.prior)
        state = source.advance(state, group.posterior.rsample())
    assert torch.allclose(loss, kl - source.likelihood(state).log_prob(x), rtol=1e-4)


@pytest.mark.parametrize("kind", priors())
def test_every_flat_source_keeps_the_laws(kind: str) -> None:
    check_source(EIMSource(flat(priors()[kind]())), binary())


@pytest.mark.parametrize("kind", priors())
def test_every_two_level_source_keeps_the_laws(kind: str) -> None:
    check_source(ConvEIMSource(two_level(priors()[kind]())), binary())


def test_half_precision_models_have_sources_that_keep_the_laws() -> None:
    check_source(EIMSource(flat().bfloat16()), binary())
    check_source(ConvEIMSource(two_level().bfloat16()), binary())


def test_only_the_top_prior_is_reweighted_and_z_1_sees_z_2() -> None:
    vae = two_level(SNISPrior())
    source = ConvEIMSource(vae)
    state = source.start(4)
    top = source.group(state)
    z_2 = top.prior.sample()
    bottom = source.group(source.advance(state, z_2))
    assert not isinstance(top.prior, Distribution)
    assert top.context is None
    assert isinstance(bottom.prior, Independent)
    assert torch.equal(bottom.prior.mean, vae.prior_of_z_1(z_2)[0])
    assert torch.equal(bottom.context, z_2)


def test_a_walk_without_z_cannot_decode() -> None:
    source = ConvEIMSource(two_level())
    state = source.start(4)
    state = source.advance(state, torch.randn(4, 50))
    with pytest.raises(ValueError, match="has 1 of 2 latents"):
        source.decode(state)


def test_likelihoods_are_probabilities_of_binary_images() -> None:
    x = binary()
    for source in (EIMSource(flat()), ConvEIMSource(two_level())):
        state = sample_posterior(source, x)[1]
        p = source.likelihood(state)
        assert (p.batch_shape, p.event_shape) == ((6,), (1, 28, 28))
        assert torch.allclose(
            p.log_prob(x),
            (x * source.decode(state) + (1 - x) * (1 - source.decode(state))).log().sum((1, 2, 3)),
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 1, 32, 32), r"\(B, 1, 28, 28\), unpadded; got \(2, 1, 32, 32\)"),
        (torch.zeros(2, 784), r"got \(2, 784\)"),
        (
            torch.full((2, 1, 28, 28), 0.5),
            r"0 or 1; got others\. Draw them: torch\.bernoulli\(x\)",
        ),
        (torch.full((2, 1, 28, 28), math.nan), "x must be finite"),
        (torch.full((2, 1, 28, 28), 255, dtype=torch.uint8), "0 or 1"),
    ],
)
def test_wrong_images_are_refused(x: Tensor, message: str) -> None:
    vae, conv = flat(), two_level()
    for function in (
        EIMSource(vae).encode,
        ConvEIMSource(conv).encode,
        vae.negative_elbo,
        conv.negative_elbo,
    ):
        with pytest.raises(ValueError, match=message):
            function(x)


def test_binary_images_of_whole_numbers_are_taken() -> None:
    vae, x = flat(), binary()
    torch.manual_seed(1)
    first = vae.negative_elbo(x)
    torch.manual_seed(1)
    assert torch.equal(vae.negative_elbo(x.to(torch.uint8)), first)


@pytest.mark.parametrize(
    "source", [EIMSource(flat().train()), ConvEIMSource(two_level().train())], ids=type
)
def test_training_mode_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        source.encode(binary())
    with pytest.raises(ValueError, match="evaluation mode"):
        source.start(2)


def test_other_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Pass images\.mean\(0\)"):
        EIMVAE(grey())
    with pytest.raises(ValueError, match="must have 50 latents; got 3"):
        EIMVAE(grey().mean(0), SNISPrior(3))
    source = ConvEIMSource(two_level())
    with pytest.raises(ValueError, match="7 rows; got 6 rows of encoding"):
        source.start(7, source.encode(binary()))
    with pytest.raises(ValueError, match="4 rows; got 3 rows of z"):
        source.advance(source.start(4), torch.randn(3, 50))
    with pytest.raises(ValueError, match="takes no condition"):
        source.start(4, condition=torch.zeros(4))
    with pytest.raises(ValueError, match=r"batch_size must be a whole number in \[1, 6\]; got 7"):
        Binarised(grey(), 7)


def test_F26_counts_are_whole_numbers() -> None:
    for wrong in (2.0, "2", None, True):
        for make in (EnergyNet, lambda n: SNISPrior(num_proposals=n), SNISPrior, LARSPrior):
            with pytest.raises(TypeError, match="must be a whole number"):
                make(wrong)
        with pytest.raises(TypeError, match="batch_size must be a whole number"):
            Binarised(grey(), wrong)
        with pytest.raises(TypeError, match="epochs must be a whole number"):
            train_vae(flat(), grey(), epochs=wrong)


@pytest.mark.parametrize("wrong", [None, 3, EIMVAE, nn.Linear(2, 2), SNISPrior()])
def test_F32_sources_take_their_own_vae_alone(wrong: Any) -> None:
    for source, other in ((EIMSource, two_level()), (ConvEIMSource, flat())):
        for model in (wrong, other):
            with pytest.raises(
                TypeError, match="model must be of type .*EIMVAE; got .* groups?: "
            ):
                source(model)
    with pytest.raises(TypeError, match="prior must be of type SNISPrior or LARSPrior"):
        EIMVAE(grey().mean(0), wrong if isinstance(wrong, nn.Linear) else SNISPrior)


def loc(encoding: Any) -> Tensor:
    (tensor, *_) = tree_leaves(encoding)
    return tensor


def test_F25_arrays_are_images() -> None:
    x = binary()
    source, conv = EIMSource(flat()), ConvEIMSource(two_level())
    assert torch.equal(loc(source.encode(x.numpy())), loc(source.encode(x)))
    assert torch.equal(conv.encode((x.double().numpy(), 3)).loc, conv.encode(x).loc)


# Training


def test_images_are_drawn_anew_in_every_pass() -> None:
    images = torch.tensor([0.0, 0.3, 1.0]).expand(20_000, 3)
    batches = Binarised(images, batch_size=10_000)
    first, second = (torch.cat(list(batches)) for _ in range(2))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first, second)
    assert torch.allclose(first.mean(0), images[0], atol=4 * math.sqrt(0.21 / 20_000))


def test_a_pass_takes_every_image_of_its_full_batches_once() -> None:
    images = torch.eye(10)
    batches = torch.cat(list(Binarised(images, batch_size=3)))
    assert batches.shape == (9, 10)
    assert batches.sum(0).max() == 1


@pytest.mark.parametrize("make", [flat, two_level])
@pytest.mark.parametrize("kind", priors())
def test_training_lowers_the_loss_and_trains_the_prior(
    make: Callable[..., Any], kind: str
) -> None:
    images = 0.9 * (torch.arange(28 * 28).view(1, 1, 28, 28) % 3 == 0).float().expand(
        256, -1, -1, -1
    )
    images = images * torch.rand(256, 1, 1, 1)
    prior = priors()[kind]()
    before = None if prior is None else [p.clone() for p in prior.parameters()]
    vae = make(prior)
    x = torch.bernoulli(images)
    first = vae.negative_elbo(x).mean().item()
    train_vae(vae, images, epochs=4, batch_size=32, progress=False)
    assert not vae.training
    assert vae.negative_elbo(x).mean() < 0.8 * first
    if prior is not None:
        pairs = zip(prior.parameters(), before, strict=True)
        # The last bias of an energy is a constant, which changes nothing.
        assert sum(not torch.equal(a, b) for a, b in pairs) >= 5
    if kind == "lars":
        assert torch.isfinite(prior.log_ratio(torch.randn(3, 50))).all()


def test_training_stops_where_the_elbo_is_not_finite() -> None:
    vae = flat()
    with torch.no_grad():
        vae.encoder[-1].bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="negative ELBO is nan"):
        train_vae(vae, grey(), epochs=1, progress=False)


@pytest.mark.parametrize("kind", priors())
def test_ncp_wraps_any_prior_and_leaves_the_vae_as_it_was(kind: str) -> None:
    for source in (EIMSource(flat(priors()[kind]())), ConvEIMSource(two_level(priors()[kind]()))):
        before = everything(source.module)
        heads = [EnergyNet(), MLPHead((50,), context_shape=(50,), width=8)][: source.num_groups]
        prior = NCPrior(source, heads)
        batches = Binarised(grey(40), batch_size=20)
        fit(prior, batches, held_out=binary(20), steps=3, progress=False)
        sample = prior.sample(4, partial(sir, num_proposals=4))
        assert sample.x.shape == (4, 1, 28, 28)
        assert everything(source.module) == before


def test_a_state_without_a_normaliser_is_noticed_after_another() -> None:
    prior = LARSPrior(2).eval()
    untrained = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    prior.estimate_normaliser()
    prior.log_ratio(torch.zeros(3, 2))
    prior.load_state_dict(untrained)
    with pytest.raises(ValueError, match="has not been estimated"):
        prior.log_ratio(torch.zeros(3, 2))
