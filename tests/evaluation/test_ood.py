"""Scores of images against exact densities, and AUROC against its closed forms."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from helpers.toys import everything
from helpers.vaebm_problems import LinearGaussian, Quadratic, Slope
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from ncprior import NCPrior, SingleGroup
from ncprior.evaluation.auroc import AUROC, auroc, auroc_gain
from ncprior.evaluation.ood import OODScore, ood_score
from ncprior.heads.networks import MLPHead
from ncprior.vaebm.model import VAEBM

PROBLEM = LinearGaussian()
ENERGY = Quadratic(3, a=0.4, h=0.3)


def marginal(slope: Slope | None = None) -> MultivariateNormal:
    mean, covariance = PROBLEM.law(Quadratic(3), slope)
    return MultivariateNormal(mean[2:].float(), covariance[2:, 2:].float())


def with_true_posterior() -> SingleGroup:
    """The linear-Gaussian VAE with q(z | x) = p(z | x), a little wider."""
    w, s = PROBLEM.weight, PROBLEM.scale
    covariance = torch.linalg.inv(torch.eye(2) / s**2 + w.T @ w / PROBLEM.sigma**2)

    def posterior(x: Tensor) -> MultivariateNormal:
        b = PROBLEM.location / s**2 + x @ w / PROBLEM.sigma**2
        return MultivariateNormal(b @ covariance, 1.1 * covariance)

    source = PROBLEM.source()
    return SingleGroup(source.prior, posterior, PROBLEM.decode, likelihood=PROBLEM.likelihood)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("energy", [False, True])
def test_scores_are_log_densities_up_to_one_constant(heads: bool, energy: bool) -> None:
    source, slope, x = with_true_posterior(), Slope(0.8, 0.2), 2 * torch.randn(60, 3)
    prior: Any = NCPrior(source, slope) if heads else source
    score = ood_score(VAEBM(prior, ENERGY) if energy else prior, x, num_samples=300)
    exact = marginal(slope if heads else None).log_prob(x)
    exact = exact - ENERGY(x).detach() if energy else exact
    difference = score.total - exact
    assert difference.std() < 0.05
    if not heads:
        assert difference.mean().abs() < 0.02
    assert (score.vae - marginal().log_prob(x)).abs().max() < 0.2
    assert bool(score.ncp.abs().max() > 0) == heads
    assert torch.equal(score.energy.float(), -ENERGY(x).detach() * energy)


def test_scores_of_noisy_data_are_means_over_the_noise() -> None:
    """Of x + σε the means of E and of log p are E(x) + aDσ²/2 and log p(x) - σ² tr(C⁻¹)/2."""
    sigma, count, x = PROBLEM.sigma, 400, 2 * torch.randn(60, 3)
    score = ood_score(VAEBM(with_true_posterior(), ENERGY, data_noise=sigma), x, num_samples=count)
    a, slope = ENERGY.a.item(), ENERGY.a.detach() * x + ENERGY.h.detach()
    exact = -(ENERGY(x).detach() + 1.5 * a * sigma**2)
    variance = sigma**2 * slope.square().sum(1) + 1.5 * a**2 * sigma**4
    assert ((score.energy - exact).abs() < 4.5 * (variance / count).sqrt()).all()
    p = marginal()
    log_p = p.log_prob(x) - 0.5 * sigma**2 * p.precision_matrix.trace()
    assert (score.vae - 1.5 < log_p).all()
    assert (score.vae - log_p).std() < 0.05  # a linear decoder's bound is off by a constant


def test_heads_that_have_learnt_nothing_add_nothing() -> None:
    prior, x = NCPrior(PROBLEM.source(), MLPHead((2,))), torch.randn(10, 3)
    score = ood_score(prior, [x[:7], x[7:]], num_samples=4)
    assert torch.equal(score.ncp, torch.zeros(10).double())
    assert torch.equal(score.total, score.vae)


def test_nothing_is_changed_and_what_is_missing_is_named() -> None:
    energy = Quadratic(3, a=0.1)
    before = everything(energy)
    ood_score(VAEBM(PROBLEM.source(), energy), torch.randn(4, 3), num_samples=2)
    assert everything(energy) == before
    with pytest.raises(ValueError, match=r"does not know p\(x \| z\)"):
        ood_score(PROBLEM.source(likelihood=None), torch.randn(4, 3))


def test_a_batch_may_be_a_tuple() -> None:
    x = torch.randn(8, 3)
    score = ood_score(VAEBM(PROBLEM.source(), ENERGY), [(x, torch.zeros(8))], num_samples=2)
    assert torch.allclose(score.energy.float(), -ENERGY(x).detach())


def test_rows_of_a_shuffled_loader_are_scored_by_all_parts_alike() -> None:
    """The energy of an image stands beside its own log p: both grow with |x|²."""
    x = torch.randn(40, 3) * torch.linspace(0.1, 4, 40)[:, None]
    loader = torch.utils.data.DataLoader(x, batch_size=8, shuffle=True)
    score = ood_score(VAEBM(PROBLEM.source(), lambda x: x.square().sum(1)), loader, num_samples=64)
    assert torch.corrcoef(torch.stack([score.vae, score.energy]))[0, 1] > 0.9


# --- AUROC ---


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.5])
def test_two_gaussians_have_the_closed_form(distance: float) -> None:
    found = auroc(torch.randn(4000) + distance, torch.randn(3000))
    exact = NormalDist().cdf(distance / math.sqrt(2))
    assert abs(found.value - exact) < 4 * found.error
    assert found.error < 0.01 and found.low < found.value < found.high


def test_the_standard_error_is_that_of_repetitions() -> None:
    found = [auroc(torch.randn(50) + 1, torch.randn(80)) for _ in range(600)]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    errors = torch.tensor([f.error for f in found], dtype=torch.float64)
    assert errors.square().mean().sqrt().item() == pytest.approx(
        values.std().item(), rel=4 / math.sqrt(2 * 600)
    )
    exact = NormalDist().cdf(1 / math.sqrt(2))
    covered = sum(f.low <= exact <= f.high for f in found) / 600
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 600)
    narrow = [auroc(torch.randn(50) + 1, torch.randn(80), level=0.5) for _ in range(600)]
    covered = sum(f.low <= exact <= f.high for f in narrow) / 600
    assert abs(covered - 0.5) < 4 * math.sqrt(0.25 / 600)


def test_ties_count_one_half() -> None:
    a, b = torch.randint(5, (30,)).float() + 1, torch.randint(5, (20,)).float()
    pairs = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    found = auroc(a, b)
    assert found.value == pytest.approx(pairs.mean().item())
    variance = pairs.mean(1).var() / 30 + pairs.mean(0).var() / 20
    assert found.error == pytest.approx(variance.sqrt().item())
    back = auroc(b, a)
    assert back.value == pytest.approx(1 - found.value)
    assert back.error == pytest.approx(found.error)


def test_perfect_order_and_infinite_scores() -> None:
    assert auroc(torch.ones(3) + 1, torch.ones(4))[:3] == (1.0, 1.0, 1.0)
    assert auroc(torch.zeros(3), torch.tensor([-math.inf, -math.inf])).value == 1.0


@pytest.mark.parametrize(
    ("inside", "outside", "level", "message"),
    [
        (torch.zeros(1), torch.zeros(5), 0.95, "inside must have 1 dimensions and 2 or more rows"),
        (
            torch.zeros(5),
            torch.zeros(0),
            0.95,
            "outside must have 1 dimensions and 2 or more rows",
        ),
        (torch.zeros(5), torch.zeros(5), 1.0, r"level must be a number in \(0, 1\); got 1.0"),
        (
            torch.tensor([0.0, math.nan]),
            torch.zeros(5),
            0.95,
            "inside must be finite; got NaN or infinity in 1 of 2",
        ),
    ],
)
def test_scores_that_make_no_sense_are_refused(
    inside: Tensor, outside: Tensor, level: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        auroc(inside, outside, level=level)


def test_F25_scores_may_be_arrays_or_lists() -> None:
    inside, outside = torch.randn(9) + 1, torch.randn(7)
    assert auroc(inside.numpy(), outside.tolist()) == auroc(inside, outside)
    gain = auroc_gain(inside, [outside], than=(inside + 1, [outside]))
    found = auroc_gain(inside.numpy(), [outside.numpy()], than=((inside + 1).tolist(), [outside]))
    assert found == gain
    for outsides, than in ((outside, (inside, [outside])), ([outside], inside), (None, None)):
        with pytest.raises((TypeError, ValueError), match=r"than must be a pair|outside.* must "):
            auroc_gain(inside, outsides, than=than)  # type: ignore[arg-type]


def test_a_gain_is_the_mean_difference_of_the_areas() -> None:
    inside, other = torch.randn(2, 70).unbind()
    sets, other_sets = ([torch.randn(n) - 1 for n in (40, 90)] for _ in range(2))
    found = auroc_gain(inside, sets, than=(other, other_sets))
    areas = [
        auroc(inside, s).value - auroc(other, o).value
        for s, o in zip(sets, other_sets, strict=True)
    ]
    assert found.value == pytest.approx(sum(areas) / 2)
    back = auroc_gain(other, other_sets, than=(inside, sets))
    assert back.value == pytest.approx(-found.value) and back.error == pytest.approx(found.error)
    assert found.low == pytest.approx(-back.high)


def test_the_error_of_a_gain_is_that_of_repetitions() -> None:
    """Scores of one image are alike: what they share is in neither the gain nor its error."""

    def draw() -> AUROC:
        shared = [torch.randn(n) for n in (60, 50, 80)]
        ours, theirs = ([s + 0.3 * torch.randn(len(s)) for s in shared] for _ in range(2))
        ours[0], theirs[0] = ours[0] + 1.5, theirs[0] + 1.0
        return auroc_gain(ours[0], ours[1:], than=(theirs[0], theirs[1:]))

    found = [draw() for _ in range(600)]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    errors = torch.tensor([f.error for f in found], dtype=torch.float64)
    assert errors.square().mean().sqrt().item() == pytest.approx(
        values.std().item(), rel=4 / math.sqrt(2 * 600)
    )
    cdf = NormalDist().cdf
    exact = cdf(1.5 / math.sqrt(2 * 1.09)) - cdf(1.0 / math.sqrt(2 * 1.09))
    assert abs(values.mean().item() - exact) < 4 * values.std().item() / math.sqrt(600)


@pytest.mark.parametrize("sets", [[], [3], [4, 5]])
def test_a_gain_over_scores_of_other_images_is_refused(sets: list[int]) -> None:
    outside = [torch.randn(n) for n in sets]
    with pytest.raises(ValueError, match="two scores of the same images"):
        auroc_gain(
            torch.randn(5), outside, than=(torch.randn(5), [torch.randn(4)] * len(sets[:1]))
        )


def test_an_energy_turns_the_verdict_of_the_vae_round() -> None:
    """Data lie away from the VAE's mode; what lies at the mode is likelier under the VAE."""
    p, shift = marginal(), torch.tensor([2.0, -1.0, -1.0])
    law = Independent(Normal(p.mean + shift, 0.4), 1)
    inside, outside = law.sample((300,)), p.mean + 0.4 * torch.randn(300, 3)

    def energy(x: Tensor) -> Tensor:
        return p.log_prob(x) - law.log_prob(x)

    model = VAEBM(with_true_posterior(), energy)
    scores: list[OODScore] = [ood_score(model, x, num_samples=8) for x in (inside, outside)]
    assert auroc(scores[0].vae, scores[1].vae).high < 0.5
    assert auroc(scores[0].total, scores[1].total).low > 0.9
