"""VAEBM's chains: their laws in closed form, what they reduce to, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.nvae_standin import nvae
from helpers.problems import SampleOnly, standard_normal
from helpers.toys import everything, ladder_prior, same, stir, weights
from helpers.vaebm_problems import (
    LinearGaussian,
    Quadratic,
    Scaled,
    Slope,
    bernoulli,
    nothing,
    sample_only,
)
from scipy import stats
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    Normal,
)

from ncprior import NCPrior, SingleGroup, langevin, sir
from ncprior.adapters.nvae.checkpoints import on_cpu
from ncprior.adapters.nvae.source import NVAESource
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.mixture_em import fit_mixture
from ncprior.bases.rebase import rebase
from ncprior.heads.networks import MLPHead
from ncprior.vaebm.gaussian_decoder import GaussianDecoder
from ncprior.vaebm.model import VAEBM
from ncprior.vaebm.noise import NoiseMap

PROBLEM = LinearGaussian()
ENERGIES = {"bowl": Quadratic(3, a=1.5, h=0.4, centre=1.0), "slope": Quadratic(3, h=-0.7)}


def flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def unit(u: Tensor) -> Independent:
    return Independent(Normal(torch.zeros_like(u), 1.0, validate_args=False), 1)


def seeded(draw: Callable[[], Any], seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return draw()


# --- laws in closed form ---


@pytest.mark.parametrize("slope", [None, Slope(0.8, 0.5)], ids=["alone", "on NCP"])
@pytest.mark.parametrize("energy", ENERGIES)
def test_samples_of_a_linear_gaussian_vae_have_the_product_law(
    energy: str, slope: Slope | None
) -> None:
    source, n = PROBLEM.source(), 4000
    model = VAEBM(source if slope is None else NCPrior(source, slope), ENERGIES[energy])
    chains = model.sample(n, num_steps=60, step_size=0.35, adjusted=True)
    assert 0.4 < chains.acceptance.mean() < 0.98
    mean, covariance = PROBLEM.law(ENERGIES[energy], slope)
    drawn = torch.cat([chains.latents[0], chains.x], 1).double()
    variance = covariance.diagonal()
    spread = (variance[:, None] * variance + covariance.square()) / n
    assert ((drawn.mean(0) - mean).abs() < 4.5 * (variance / n).sqrt()).all()
    assert ((drawn.T.cov() - covariance).abs() < 4.5 * spread.sqrt()).all()


@pytest.mark.parametrize("make", [PROBLEM.source, lambda: Scaled(a=0.7, b=0.4)])
def test_without_energy_and_heads_mala_leaves_the_unit_gaussian_as_it_is(
    make: Callable[[], Any],
) -> None:
    chains = VAEBM(make(), nothing).sample(3000, num_steps=20, step_size=0.5, adjusted=True)
    for part in chains.noise:
        assert stats.kstest(part.flatten().numpy(), "norm").pvalue > 0.01
    assert chains.acceptance.mean() < 1


def test_the_bias_without_correction_is_the_known_one() -> None:
    step = 1.0  # stationary variance of N(0, 1): 1 / (1 - λ/4)
    chains = VAEBM(PROBLEM.source(), nothing).sample(3000, num_steps=30, step_size=step)
    law = stats.norm(scale=(1 - step / 4) ** -0.5)
    for part in chains.noise:
        assert stats.kstest(part.flatten().numpy(), law.cdf).pvalue > 0.01
        assert stats.kstest(part.flatten().numpy(), "norm").pvalue < 1e-4


# --- what it reduces to, draw for draw ---


@pytest.mark.parametrize("adjusted", [False, True])
def test_without_energy_it_is_ncps_langevin_chain(adjusted: bool) -> None:
    head = Slope(0.8, 0.5)
    model = VAEBM(NCPrior(PROBLEM.source(), head), nothing)
    options = {"num_steps": 9, "step_size": 0.3, "adjusted": adjusted}
    chains = seeded(lambda: model.sample(50, **options))

    def log_ratio(u: Tensor) -> Tensor:
        return head(PROBLEM.location + PROBLEM.scale * u[:, :2])

    def chain() -> Any:
        u = flat(model.draw_noise(50))
        return langevin(unit(u), log_ratio, init=u, **options)

    draw = seeded(chain)
    assert torch.equal(flat(chains.noise), draw.z)
    assert torch.equal(chains.latents[0], PROBLEM.location + PROBLEM.scale * draw.z[:, :2])
    if adjusted:
        assert torch.equal(chains.acceptance, draw.acceptance)


def test_with_a_bernoulli_decoder_it_is_langevin_in_z_itself() -> None:
    source, head = bernoulli(), Slope(0.8, 0.5)
    model = VAEBM(NCPrior(source, head), nothing)
    chains = seeded(lambda: model.sample(50, step_size=0.3))
    z = seeded(lambda: source.group(source.start(50)).prior.sample())
    draw = langevin(unit(z), head, num_steps=16, step_size=0.3, init=z)
    assert len(chains.noise) == 1 and torch.equal(chains.latents[0], draw.z)
    assert torch.equal(chains.x, chains.mean)
    assert "none, as p(x | z) is not normal" in repr(model)


def test_groups_of_other_densities_are_walked_in_z() -> None:
    """Two components apart: standardised coordinates would be others."""
    parts = Independent(Normal(torch.tensor([[-2.0, -2.0], [2.0, 2.0]]), 0.7), 1)
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), parts)
    source, head = rebase(PROBLEM.source(), mixture), Slope(0.3, 0.2)
    model = VAEBM(NCPrior(source, head), nothing)
    chains = seeded(lambda: model.sample(50, step_size=0.05))

    def chain() -> Any:
        u = flat(model.draw_noise(50))

        def log_ratio(u: Tensor) -> Tensor:
            return mixture.log_prob(u[:, :2]) + 0.5 * u[:, :2].square().sum(1) + head(u[:, :2])

        return langevin(unit(u), log_ratio, num_steps=16, step_size=0.05, init=u)

    draw = seeded(chain)
    assert torch.allclose(flat(chains.noise), draw.z, atol=1e-5)
    assert torch.equal(chains.noise[0], chains.latents[0])


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_mixtures_are_walked_where_their_components_are_round(
    covariance: str, precision: torch.dtype
) -> None:
    z = torch.cat([torch.randn(200, 2) - 2, 0.3 * torch.randn(200, 2) + 2])
    mixture = fit_mixture(z @ torch.tensor([[1.0, 0.5], [0.0, 0.1]]), 2, covariance=covariance)
    source, head = rebase(PROBLEM.source(), mixture), Slope(0.3, 0.2)
    model = VAEBM(NCPrior(source, head), nothing, precision=precision)
    chains = seeded(lambda: model.sample(50, step_size=0.01))
    scale = mixture.scale if covariance == "full" else mixture.scale.diag_embed()
    weights = mixture.logits.softmax(0)
    within = torch.einsum("k,kij,klj->il", weights, scale, scale)
    factor = torch.linalg.cholesky(within)

    def place(u: Tensor) -> Tensor:
        return u[:, :2] @ factor.mT + weights @ mixture.loc

    def chain() -> Any:
        u = flat(model.draw_noise(50))

        def log_ratio(u: Tensor) -> Tensor:
            log_p = mixture.log_prob(place(u))
            return log_p + 0.5 * u[:, :2].square().sum(1) + head(place(u))

        return langevin(unit(u), log_ratio, num_steps=16, step_size=0.01, init=u)

    drawn = seeded(lambda: source.group(source.start(50)).prior.sample())
    start = seeded(lambda: model.sample(50, num_steps=0))
    assert torch.allclose(start.latents[0], drawn, atol=1e-5)
    draw = seeded(chain)
    tolerance = 1e-3 if precision == torch.float32 else 0.05  # the slope of the head, in 8 bits
    assert torch.allclose(flat(chains.noise), draw.z, atol=tolerance)
    assert torch.allclose(chains.latents[0], place(draw.z), atol=tolerance)


def test_a_narrow_base_needs_no_small_steps() -> None:
    """One Gaussian in any coordinates: ULA's bias is that of a unit Gaussian, 1 / (1 - λ/4)."""
    turn = torch.linalg.qr(torch.randn(2, 2)).Q
    factor = torch.linalg.cholesky(turn @ torch.tensor([4.0, 0.01]).diag() @ turn.mT)
    narrow = GaussianMixture(torch.zeros(1), torch.tensor([[3.0, -1.0]]), factor[None])
    model = VAEBM(rebase(PROBLEM.source(), narrow), nothing)
    latents = model.sample(20_000, num_steps=60, step_size=0.8).latents[0]
    white = torch.linalg.solve_triangular(factor, (latents - narrow.loc).mT, upper=False)
    known = torch.eye(2) / (1 - 0.8 / 4)
    # Variances of 20,000 have a standard error of 1.25 * sqrt(2 / 20,000) = 0.0125.
    assert torch.allclose(white.cov(), known, atol=0.05)


def test_with_heads_that_have_learnt_nothing_it_is_vaebm_alone() -> None:
    source, energy = PROBLEM.source(), ENERGIES["bowl"]
    alone = seeded(lambda: VAEBM(source, energy).sample(50, step_size=0.2))
    prior = NCPrior(source, MLPHead((2,)))
    on_ncp = seeded(lambda: VAEBM(prior, energy).sample(50, step_size=0.2))
    assert torch.equal(alone.x, on_ncp.x) and torch.equal(alone.latents[0], on_ncp.latents[0])
    stirred = VAEBM(stir(prior), energy)
    assert not torch.equal(alone.x, seeded(lambda: stirred.sample(50, step_size=0.2)).x)
    with prior.disabled():
        off = seeded(lambda: stirred.sample(50, step_size=0.2))
    assert torch.equal(alone.x, off.x)
    walk = NoiseMap(source, prior)
    full = walk(alone.noise).log_weight
    prior.strength = 0.5
    assert torch.allclose(walk(alone.noise).log_weight, 0.5 * full)


def test_chains_start_where_the_sampler_of_the_heads_puts_them() -> None:
    prior = NCPrior(PROBLEM.source(), Slope(2.0, 0.0))
    sampler = partial(sir, num_proposals=20)
    model = VAEBM(prior, nothing)
    start = seeded(lambda: model.sample(200, sampler=sampler, num_steps=0))
    expected = seeded(lambda: prior.sample(200, sampler))
    assert torch.allclose(start.latents[0], expected.latents[0], atol=1e-6)
    assert torch.allclose(start.mean, expected.x, atol=1e-5)
    alone = seeded(lambda: model.sample(200, num_steps=0))
    assert not torch.allclose(alone.latents[0], expected.latents[0])
    prior.sampler = sampler  # its own, where none is passed
    own = seeded(lambda: model.sample(200, num_steps=0))
    assert torch.equal(own.latents[0], start.latents[0])
    base = seeded(lambda: model.sample(200, sampler=partial(sir, num_proposals=1), num_steps=0))
    assert not torch.equal(base.latents[0], start.latents[0])


def test_going_on_is_one_long_chain() -> None:
    model = VAEBM(PROBLEM.source(), ENERGIES["bowl"])
    whole = seeded(lambda: model.sample(20, num_steps=7))

    def in_parts() -> Any:
        return model.run_chains(model.sample(20, num_steps=4).noise, num_steps=3)

    assert torch.equal(seeded(in_parts).x, whole.x)


# --- what the published code samples ---


def test_official_forgets_the_jacobian_of_every_group() -> None:
    """In ε_1 the factor 1/σ_2 = e^{-a z_1} moves N(0, 1) to N(-a, 1), and e^{-b z_1} by -b more."""
    a, b = 0.7, 0.4
    options = {"num_steps": 40, "step_size": 0.5, "adjusted": True}
    for scaled in (Scaled(a=a), Scaled(a=a, b=b)):
        model = VAEBM(scaled, nothing, langevin_target="official")
        noise = model.sample(3000, **options).noise
        law = stats.norm(loc=-(scaled.a + scaled.b))
        assert stats.kstest(noise[0].flatten().numpy(), law.cdf).pvalue > 0.01
        assert stats.kstest(noise[1].flatten().numpy(), "norm").pvalue > 0.01
        assert stats.kstest(noise[2].flatten().numpy(), "norm").pvalue > 0.01


def test_official_draws_pixels_with_one_scale_and_judges_them_by_the_bounded_one() -> None:
    """x = μ + σ ε judged by N(μ, (2σ)²): ε spreads by 2, and x by the bounded scale."""
    scaled = Scaled(floor=2.0)
    model = VAEBM(scaled, nothing, langevin_target="official")
    chains = model.sample(3000, num_steps=60, step_size=0.7, adjusted=True)
    assert stats.kstest(chains.noise[2].flatten().numpy(), stats.norm(scale=2).cdf).pvalue > 0.01
    start = model.sample(3000, num_steps=0)
    assert stats.kstest((start.x - start.mean).flatten().numpy(), "norm").pvalue > 0.01
    exact = VAEBM(scaled, nothing).sample(3000, num_steps=0)
    residual = (exact.x - exact.mean).flatten().numpy()
    assert stats.kstest(residual, stats.norm(scale=2).cdf).pvalue > 0.01


def test_each_difference_of_the_official_target_is_a_term() -> None:
    scaled = Scaled(a=0.7, b=0.4, floor=1.2)
    exact, official = NoiseMap(scaled), NoiseMap(scaled, official=True)
    noise = exact.draw(30).noise
    z_1, e = noise[0][:, 0], noise[2][:, 0]
    drawn = (scaled.b * z_1).exp()
    bounded = drawn.clamp(min=scaled.floor)
    terms = {
        "Σ log σ_k(z_<k)": scaled.a * z_1,
        "Σ log σ_x(z)": bounded.log(),
        "the bounded scale": 0.5 * ((drawn / bounded).square() - 1) * e.square(),
    }
    difference = exact(noise).log_weight - official(noise).log_weight
    assert torch.allclose(difference, sum(terms.values()), atol=1e-5)
    assert torch.equal(exact(noise).log_weight, torch.zeros(30))


def test_of_one_scale_for_all_the_two_targets_are_the_same() -> None:
    found = [
        seeded(
            lambda target=target: VAEBM(
                PROBLEM.source(), ENERGIES["bowl"], langevin_target=target
            ).sample(20)
        ).x
        for target in ("exact", "official")
    ]
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("target", ["exact", "official"])
def test_nvae_with_vaebms_decoder(target: Any) -> None:
    module = nvae("gaussian", num_scales=2, vaebm=True)
    on_cpu(module)
    source = NVAESource(module)
    before = everything(source.module)
    model = VAEBM(source, lambda x: x.square().sum((1, 2, 3)), langevin_target=target)
    chains = model.sample(3, num_steps=2)
    assert len(chains.noise) == source.num_groups + 1
    state = source.start(3)
    for z in chains.latents:
        state = source.advance(state, z)
    law = source.likelihood(state).base_dist
    scale = law.scale if target == "exact" else law.drawn_scale
    assert torch.allclose(chains.x, law.loc + scale * chains.noise[-1], atol=1e-5)
    assert everything(source.module) == before


# --- decoders trained by squared error ---


def test_one_sigma_is_fitted_to_held_out_residuals() -> None:
    problem, n = LinearGaussian(sigma=0.5), 20_000
    z = problem.source().prior.sample((n,))
    x = problem.decode(z) + 0.5 * torch.randn(n, 3)
    known = SingleGroup(
        problem.source().prior,
        lambda batch: Independent(Normal(batch[:, 3:], 1e-6), 1),  # z rides along with x
        lambda z: torch.cat([problem.decode(z), z], 1),
    )
    fitted = GaussianDecoder.fitted(known, torch.cat([x, z], 1))
    expected = (0.25 * 3 / 5) ** 0.5  # two of five columns leave no residual
    assert fitted.sigma == pytest.approx(expected, rel=4 / (2 * 3 * n) ** 0.5)
    assert "fitted on 20000 held-out rows" in repr(fitted)
    chains = VAEBM(fitted, nothing).sample(2000, num_steps=0)
    assert (chains.x - chains.mean).std().item() == pytest.approx(expected, rel=0.05)
    assert "decoder noise of one σ = 0.3" in repr(VAEBM(fitted, nothing))
    assert "noise on data" not in repr(VAEBM(fitted, nothing))
    assert "noise on data: σ = 0.25" in repr(VAEBM(fitted, nothing, data_noise=0.25))


def test_a_fitted_sigma_is_the_likeliest() -> None:
    source, x = PROBLEM.source(likelihood=None), torch.randn(400, 3)
    sigma = GaussianDecoder.fitted(source, x).sigma

    def log_p(scale: float) -> float:
        torch.manual_seed(1)
        noisy = GaussianDecoder(source, scale)
        state = source.start(len(x), source.encode(x))
        state = source.advance(state, source.group(state).posterior.sample())
        return float(noisy.likelihood(state).log_prob(x).mean())

    values = [log_p(factor * sigma) for factor in (0.8, 1.0, 1.25)]
    assert values[1] == max(values)


def test_decoder_noise_that_makes_no_sense_is_refused() -> None:
    source = PROBLEM.source()
    for sigma in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"sigma must be a number in \(0, inf\)"):
            GaussianDecoder(source, sigma)
    with pytest.raises(TypeError, match="around a rebased source"):
        GaussianDecoder(rebase(source, standard_normal(2)), 0.1)
    with pytest.raises(ValueError, match=r"one shape; got .* \(9, 2\) and .* \(9, 3\)"):
        wrong = SingleGroup(
            standard_normal(2), lambda x: Independent(Normal(x, 1.0), 1), PROBLEM.decode
        )
        GaussianDecoder.fitted(wrong, torch.randn(9, 2))
    below = rebase(GaussianDecoder(source, 0.1), standard_normal(2))
    assert (below.likelihood(below.advance(below.start(2), torch.zeros(2, 2)))).mean.shape == (
        2,
        3,
    )


# --- what stays as it was, and what is refused ---


def test_vae_and_heads_stay_as_they_were() -> None:
    prior = stir(ladder_prior())
    ladder: Any = prior.source
    ladder.likelihood = lambda state: Independent(Normal(ladder.decode(state), 0.3), 1)
    energy = Quadratic(3, a=0.5)
    before = everything(ladder), everything(prior.heads), everything(energy)
    model = VAEBM(prior, energy)
    generator = torch.get_rng_state()
    assert torch.equal(generator, seeded_state(lambda: VAEBM(prior, energy)))
    model.sample(5, sampler=partial(sir, num_proposals=4))
    assert (everything(ladder), everything(prior.heads), everything(energy)) == before
    assert [name for name, _ in model.named_parameters()] == ["energy.a", "energy.h"]
    copied = copy.deepcopy(model)
    assert copied.prior is prior and copied.energy is not energy
    assert same(weights(copied), weights(model))


def seeded_state(make: Callable[[], Any]) -> Tensor:
    make()
    return torch.get_rng_state()


def test_priors_without_a_density_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Group 0: VAEBM uses .* prior SampleOnly has no density"):
        VAEBM(sample_only(), nothing)
    bounded = rebase(
        PROBLEM.source(), Independent(torch.distributions.Beta(torch.ones(2), torch.ones(2)), 1)
    )
    with pytest.raises(TypeError, match="prior Beta is discrete or bounded"):
        VAEBM(bounded, nothing)

    def second(k: int, group: Any) -> Any:
        return group.prior if k == 0 else SampleOnly(group.prior)

    with pytest.raises(TypeError, match="Group 1"):
        VAEBM(rebase(Scaled(), second), nothing)


def test_a_laplace_prior_is_walked_in_z() -> None:
    base = Independent(Laplace(torch.zeros(2), torch.ones(2)), 1)
    chains = VAEBM(rebase(PROBLEM.source(), base), nothing).sample(
        3000, num_steps=40, step_size=0.5, adjusted=True
    )
    assert stats.kstest(chains.latents[0].flatten().numpy(), "laplace").pvalue > 0.01


def test_sources_that_do_not_know_p_of_x_are_told_how() -> None:
    with pytest.raises(ValueError, match=r"does not know p\(x \| z\).*GaussianDecoder.fitted"):
        VAEBM(PROBLEM.source(likelihood=None), nothing)
    with pytest.raises(ValueError, match=r"Ladder does not know p\(x \| z\).*GaussianDecoder"):
        VAEBM(ladder_prior(), nothing)


def test_a_condition_reaches_the_walk() -> None:
    source = SingleGroup(
        standard_normal(2),
        lambda x, c: Independent(Normal(x[:, :2], 1.0), 1),
        lambda z, c: PROBLEM.decode(z) + c,
        likelihood=lambda z, c: Independent(Normal(PROBLEM.decode(z) + c, 0.1), 1),
        condition=lambda batch: batch[1],
    )
    model = VAEBM(source, ENERGIES["slope"])
    assert "under a condition" in repr(model)
    low, high = (
        seeded(lambda c=c: model.sample(9, condition=torch.full((9, 1), c))).mean
        for c in (0.0, 5.0)
    )
    assert torch.allclose(low + 5, high, atol=1e-5)
    array = np.full((9, 1), 5.0)  # of float64
    assert torch.equal(seeded(lambda: model.sample(9, condition=array)).mean, high)
    with pytest.raises(ValueError, match="needs a condition"):
        model.sample(9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, r"num_steps must be .* in \[0, inf\)"),
        ({"data_noise": -0.1}, r"data_noise must be .* in \[0, inf\)"),
        ({"data_noise": float("inf")}, r"data_noise must be .* in \[0, inf\)"),
        ({"data_noise": float("nan")}, r"data_noise must be .* in \[0, inf\)"),
        ({"step_size": 0.0}, r"step_size must be .* in \(0, inf\)"),
        ({"step_size": float("nan")}, r"step_size must be .* in \(0, inf\)"),
        ({"langevin_target": "exactly"}, "one of 'exact', 'official'; got 'exactly'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEBM(PROBLEM.source(), nothing, **options)


def test_bad_energies_and_samplers_are_named() -> None:
    source = PROBLEM.source()
    with pytest.raises(ValueError, match=r"to shape \(4,\); got \(4, 3\)"):
        VAEBM(source, lambda x: x).sample(4)
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        VAEBM(source, lambda x: x.sum(1) * torch.nan).sample(4)
    with pytest.raises(FloatingPointError, match="not finite"):
        VAEBM(source, lambda x: -x.square().sum(1).exp(), step_size=5.0).sample(4)
    with pytest.raises(ValueError, match="this VAEBM does not have"):
        VAEBM(source, nothing).sample(4, sampler=partial(sir, num_proposals=2))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode forbids"):
        VAEBM(source, nothing).sample(4)


def test_a_vae_in_training_mode_is_refused() -> None:
    vae = nn.Linear(2, 3)
    source = SingleGroup(
        Independent(Normal(torch.zeros(2), 1.0), 1),
        lambda x: Independent(Normal(x[:, :2], 1.0), 1),
        vae,
        module=vae.train(),
        likelihood=lambda z: Independent(Normal(vae(z), 1.0), 1),
    )
    with pytest.raises(ValueError, match="evaluation mode"):
        VAEBM(source, nothing)


def test_a_decoder_without_noise_is_run_once_per_step() -> None:
    calls = []

    def likelihood(z: Tensor) -> Independent:
        calls.append(1)
        return Independent(Bernoulli(logits=z), 1)

    source = SingleGroup(
        Independent(Normal(torch.zeros(2), 1.0), 1),
        lambda x: Independent(Normal(x, 1.0), 1),
        lambda z: calls.append(1) or z.sigmoid(),
        likelihood=likelihood,
    )
    model = VAEBM(source, lambda x: x.sum(1), num_steps=10)
    noise = model.draw_noise(4)
    calls.clear()
    chains = model.run_chains(noise)
    assert len(calls) == 11  # before every step, and where they end
    torch.testing.assert_close(chains.mean, chains.latents[0].sigmoid())


def test_noise_of_another_walk_is_refused() -> None:
    square = SingleGroup(  # whose latents and images have one shape
        standard_normal(3),
        lambda x: Independent(Normal(x, 1.0), 1),
        lambda z: z,
        likelihood=lambda z: Independent(Normal(z, 1.0), 1),
    )
    model, parts = VAEBM(square, nothing), torch.zeros(4, 5, 3)
    for count, needed in ((1, 2), (3, 1), (4, 1)):
        with pytest.raises(ValueError, match=f"needs {needed} tensors of noise.*got {count}"):
            model.run_chains(parts[:count])
    with pytest.raises(ValueError, match="needs 1 tensors of noise.*got 2"):
        VAEBM(bernoulli(), nothing).run_chains(torch.zeros(2, 5, 2))


def test_energies_are_in_float32_also_under_autocast() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
    model = VAEBM(PROBLEM.source(), net)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 3)).dtype == torch.float32
        assert model(torch.randn(4, 3).bfloat16()).dtype == torch.float32
        assert model.sample(4).x.dtype == torch.float32


# --- mixed precision ---


class Flat(nn.Module):
    """A net of one number per row; any context is left aside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The number, with shape (*, B)."""
        return self.net(x).squeeze(-1)  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """A linear layer that notes what its products come out in."""

    seen: list[torch.dtype]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        self.seen = [*getattr(self, "seen", []), y.dtype]
        return y


@pytest.mark.parametrize("target", ["exact", "official"])
def test_chains_in_bfloat16_are_those_of_float32_but_for_rounding(target: Any) -> None:
    """Each product is off by 2⁻⁸ at most, five on the way to ½λ∇log π: two weights, three results."""
    steps, step_size, largest_gradient = 20, 0.05, 2.0
    decoder, energy, head = (Linear(*sizes).eval() for sizes in ((2, 3), (3, 1), (2, 1)))

    def likelihood(z: Tensor) -> Independent:
        return Independent(Normal(decoder(z), 0.5, validate_args=False), 1)

    source = SingleGroup(standard_normal(2), lambda _: None, decoder, likelihood=likelihood)
    over = NCPrior(source, nn.ModuleList([Flat(head)]))
    ends = []
    for precision in (torch.float32, torch.bfloat16):
        options = {"num_steps": steps, "step_size": step_size, "langevin_target": target}
        model = VAEBM(over, Flat(energy), precision=precision, **options)
        noise = seeded(lambda m=model: m.draw_noise(500))
        for net in (decoder, energy, head):
            net.seen = []
        chains = seeded(lambda m=model, n=noise: m.run_chains(n))
        assert decoder.seen[:steps] == head.seen[:steps] == energy.seen == [precision] * steps
        assert torch.equal(chains.mean, decoder(chains.latents[0]))
        parts = (chains.x, *chains.latents, *chains.noise)
        assert all(part.dtype == torch.float32 for part in parts)
        ends.append(flat(chains.noise))
        x = torch.randn(4, 3)
        assert model(x).dtype == torch.float32
    difference = (ends[1] - ends[0]).abs().max()
    assert 0 < difference < steps * step_size / 2 * largest_gradient * 5 * 2**-8


def test_a_vae_called_under_autocast_stays_under_it() -> None:
    decoder, energy = Linear(2, 3).eval(), Linear(3, 1)

    def likelihood(z: Tensor) -> Independent:
        return Independent(Normal(decoder(z), 0.5, validate_args=False), 1)

    source = SingleGroup(standard_normal(2), lambda _: None, decoder, likelihood=likelihood)
    model = VAEBM(source, Flat(energy))
    decoder.seen = []
    with torch.autocast("cpu", torch.bfloat16):
        model.sample(4, num_steps=3)
    assert set(decoder.seen) == {torch.bfloat16} and set(energy.seen) == {torch.float32}


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.float32.* torch.bfloat16; got torch.float16"):
        VAEBM(PROBLEM.source(), nothing, precision=torch.float16)
