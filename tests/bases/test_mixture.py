"""Gaussian mixtures: density, law of the draws, and their fit."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal
from torch.distributions import Normal as TorchNormal

from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.mixture_em import fit_gaussian, fit_mixture
from ncprior.samplers.langevin import langevin
from ncprior.samplers.sir import sir
from ncprior.utils.fingerprints import base_fingerprint


def full(k: int = 3, d: int = 4, **options: Any) -> GaussianMixture:
    factor = torch.randn(k, d, d).tril() * 0.3
    factor.diagonal(dim1=1, dim2=2).exp_()
    return GaussianMixture(torch.randn(k), 2 * torch.randn(k, d), factor, **options)


def diagonal(k: int = 3, d: int = 4, **options: Any) -> GaussianMixture:
    scale = torch.rand(k, d) + 0.2
    return GaussianMixture(torch.randn(k), 2 * torch.randn(k, d), scale, **options)


KINDS = {"full": full, "diagonal": diagonal}


def theirs(p: GaussianMixture) -> MixtureSameFamily:
    """The same mixture as torch has it."""
    if p.is_full:
        parts: Any = MultivariateNormal(p.loc, scale_tril=p.scale)
    else:
        parts = Independent(TorchNormal(p.loc, p.scale), 1)
    return MixtureSameFamily(Categorical(logits=p.logits), parts)


@pytest.mark.parametrize("kind", KINDS)
def test_density_and_moments_are_those_of_torch(kind: str) -> None:
    p = KINDS[kind]()
    z = 3 * torch.randn(5, 7, 4)
    rows = p.expand((7,))
    assert torch.allclose(rows.log_prob(z), theirs(p).log_prob(z), rtol=1e-5, atol=1e-4)
    assert torch.allclose(p.mean, theirs(p).mean, atol=1e-5)
    assert torch.allclose(p.variance, theirs(p).variance, rtol=1e-5)
    assert (rows.mean.shape, rows.variance.shape) == ((7, 4), (7, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_components_do_not_change_the_density(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, z = KINDS[kind](k=5), torch.randn(20, 4)
    whole = p.log_prob(z)
    monkeypatch.setattr("ncprior.bases.mixture._BLOCK", 160)  # two components at once
    assert torch.allclose(p.log_prob(z), whole, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_mixtures_law_in_every_place(kind: str) -> None:
    """Every slot of a batch sees every component: proposals come in no order."""
    p = KINDS[kind](d=2).expand((4,))
    z = p.sample((3000,)).double()
    weights = p.logits.double().softmax(0).numpy()
    scale = p.scale if kind == "diagonal" else p.scale.square().sum(-1).sqrt()
    for row in range(4):
        for axis in range(2):
            mean, sd = p.loc[:, axis].double().numpy(), scale[:, axis].double().numpy()

            def cdf(t: np.ndarray, mean: np.ndarray = mean, sd: np.ndarray = sd) -> np.ndarray:
                return norm.cdf((t[:, None] - mean) / sd) @ weights

            assert kstest(z[:, row, axis].numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_draws_are_independent(kind: str) -> None:
    z = KINDS[kind](d=1).sample((20_000,))[:, 0]
    z = (z - z.mean()) / z.std()
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("kind", KINDS)
def test_event_shapes_are_kept(kind: str) -> None:
    p = KINDS[kind](d=12, event_shape=(3, 2, 2)).expand((5,))
    z = p.sample((6,))
    assert (z.shape, p.log_prob(z).shape, p.mean.shape) == ((6, 5, 3, 2, 2), (6, 5), (5, 3, 2, 2))
    flat = GaussianMixture(p.logits, p.loc, p.scale)
    assert torch.equal(flat.log_prob(z.flatten(2)), p.log_prob(z))
    assert p.sample((0,)).shape == (0, 5, 3, 2, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_whitening_makes_components_round_on_average(kind: str) -> None:
    p = KINDS[kind](d=12, event_shape=(3, 2, 2))
    z = p.sample((6,))
    assert torch.allclose(p.unwhiten(p.whiten(z)), z, atol=1e-5)
    assert torch.allclose(p.unwhiten(torch.zeros(1, 3, 2, 2))[0], p.mean)
    k, weights = len(p.loc), p.logits.softmax(0)
    if p.is_full:  # the columns of a component's factor, each a row of z
        columns = p.whiten(p.scale.mT.reshape(-1, 3, 2, 2) + p.mean)
        columns = columns.reshape(k, 12, 12)
        within = torch.einsum("k,kji,kjl->il", weights, columns, columns)
        assert torch.allclose(within, torch.eye(12), atol=1e-4)
    else:
        u = p.whiten(p.scale.reshape(k, 3, 2, 2) + p.mean).flatten(1)
        assert torch.allclose(weights @ u.square(), torch.ones(12))


@pytest.mark.parametrize("kind", KINDS)
def test_both_samplers_take_a_mixture(kind: str) -> None:
    """r = exp(w·z) on one Gaussian shifts its mean by Σ w."""
    p = KINDS[kind](k=1, d=2)
    w = torch.tensor([0.5, -0.3])
    covariance = p.scale[0] @ p.scale[0].mT if kind == "full" else p.scale[0].square().diag()
    shifted = p.loc[0] + covariance @ w
    rows = p.expand((4000,))

    def log_r(z: Tensor) -> Tensor:
        return z @ w

    for z in (
        sir(rows, log_r, num_proposals=400).z,
        langevin(rows, log_r, num_steps=300, step_size=0.5, adjusted=True).z,
    ):
        error = z.std(0) / math.sqrt(len(z))
        assert ((z.mean(0) - shifted).abs() < 4 * error + 0.01).all()


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_a_mixture_of_scikit_learn_is_taken_over(covariance: str) -> None:
    z = torch.cat([torch.randn(200, 3), 2 + 0.5 * torch.randn(300, 3)])
    fitted = SklearnMixture(3, covariance_type=covariance, random_state=0).fit(z.numpy())
    p = GaussianMixture.from_sklearn(fitted)
    scores = torch.from_numpy(fitted.score_samples(z.numpy())).float()
    assert torch.allclose(p.log_prob(z), scores, rtol=1e-4, atol=1e-3)


def test_a_mixture_that_is_not_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="not fitted"):
        GaussianMixture.from_sklearn(SklearnMixture(3))


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_one_gaussian_is_fitted_by_its_moments(covariance: str) -> None:
    z = torch.randn(500, 3, 2) @ torch.tensor([[1.0, 0.4], [0.0, 0.7]]) + 5
    p = fit_gaussian(z, covariance=covariance)
    flat = z.reshape(500, 6)
    exact = flat.T.cov(correction=0)
    fitted = p.scale[0] @ p.scale[0].mT if covariance == "full" else p.scale[0].square().diag()
    if covariance == "diagonal":
        exact = exact.diagonal().diag()
    assert torch.allclose(p.mean, z.mean(0), atol=1e-5)
    # Shrunk by no more than the least prior of 0.3 rows per latent, if by anything.
    assert torch.allclose(fitted.diagonal(), exact.diagonal(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(fitted, exact, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_fit_is_as_likely_as_the_truth(covariance: str) -> None:
    """Its likelihood of the data it was fitted to exceeds the truth's: a maximum does."""
    truth = KINDS[covariance](k=4, d=3)
    z = truth.sample((4000,))
    fitted = fit_mixture(z, 4, covariance=covariance)
    assert fitted.log_prob(z).mean() > truth.log_prob(z).mean() - 1e-3
    fresh = truth.sample((4000,))  # 2N·(gain on fresh data) is about minus the parameters, 39
    assert fitted.log_prob(fresh).mean() > truth.log_prob(fresh).mean() - 0.02


def test_blocks_of_rows_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    z = full(k=2, d=2).sample((1000,))
    fits = []
    for block, kept in ((2**20, 2**24), (256, 0)):
        monkeypatch.setattr("ncprior.bases.em._BLOCK", block)
        monkeypatch.setattr("ncprior.bases.em._KEPT", kept)
        torch.manual_seed(1)
        fits.append(fit_mixture(z, 2, starts=1))
    assert torch.allclose(fits[0].log_prob(z), fits[1].log_prob(z), atol=1e-3)


def test_the_fit_moves_with_the_latents() -> None:
    """Far from 0, and in other units: float32 loses nothing that matters."""
    z = full(k=2, d=2).sample((1000,))
    torch.manual_seed(1)
    here = fit_mixture(z, 2, starts=1)
    torch.manual_seed(1)
    there = fit_mixture(100 * z + 1e4, 2, starts=1)
    shift = here.log_prob(z) - there.log_prob(100 * z + 1e4)
    assert torch.allclose(shift, torch.tensor(2 * math.log(100)), atol=0.02)


def test_a_constant_latent_does_no_harm() -> None:
    z = torch.randn(300, 3)
    z[:, 1] = 7.0
    p = fit_mixture(z, 2)
    assert torch.isfinite(p.log_prob(z)).all()
    assert torch.allclose(p.sample((50,))[:, 1], torch.tensor(7.0), atol=0.02)


@pytest.mark.parametrize(
    ("z", "options", "match"),
    [
        (torch.randn(10, 2), {"num_components": 10}, "more rows than components"),
        (torch.randn(10), {"num_components": 2}, "shape"),
        (torch.randn(10, 2), {"num_components": 0}, "components"),
        (torch.full((10, 2), math.nan), {"num_components": 2}, "must be finite"),
        (
            torch.randn(10, 2),
            {"num_components": 2, "covariance": "tied"},
            "'full', 'diagonal'; got 'tied'",
        ),
        (
            torch.randn(10, 2),
            {"num_components": 2, "starts": 0},
            r"starts must be .* \[1, inf\); got 0",
        ),
        (
            torch.randn(20, 3000),
            {"num_components": 10},
            r"10 full covariances of 3000 latents each .* Pass covariance=\"diagonal\"",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(z: Tensor, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fit_mixture(z, **options)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_the_average_is_that_of_the_densities(kind: str) -> None:
    z, at = torch.randn(60, 3, 2), torch.randn(500, 3, 2)
    parts = [fit_mixture(z, k, covariance=kind) for k in (2, 3, 4)]
    average = GaussianMixture.average(parts)
    expected = torch.stack([p.log_prob(at) for p in parts]).logsumexp(0) - math.log(3)
    assert torch.allclose(average.log_prob(at), expected, atol=1e-5)
    assert average.event_shape == (3, 2)


def test_what_has_no_average_is_refused() -> None:
    z = torch.randn(60, 2)
    full, diagonal = fit_mixture(z, 2), fit_mixture(z, 2, covariance="diagonal")
    other = fit_mixture(z[:, :1], 2)
    for parts in ([], [full, diagonal], [full, other]):
        with pytest.raises(ValueError, match="one event shape"):
            GaussianMixture.average(parts)
    with pytest.raises(TypeError, match="A mixture must be of type GaussianMixture"):
        GaussianMixture.average([full, TorchNormal(0.0, 1.0)])


@pytest.mark.filterwarnings("ignore:The mixture of 10 does not generalise")
def test_draws_of_the_same_rows_are_no_held_out_rows() -> None:
    """With ten draws near each of 200 points, a mixture memorises them, unless others are held out."""
    points = torch.randn(200, 6)
    z = (points + 0.1 * torch.randn(10, 200, 6)).flatten(0, 1)
    new, other = (torch.randn(n, 6) for n in (2000, 200))
    careless = fit_mixture(z, 10).log_prob(new).mean()
    careful = fit_mixture(z, 10, held_out=other).log_prob(new).mean()
    entropy = 3 * math.log(2 * math.pi * math.e)
    assert careless < -entropy - 1
    assert careful > -entropy - 0.5


def test_held_out_latents_are_not_fitted_to() -> None:
    z, far = torch.randn(500, 2), torch.full((100, 2), 9.0)
    p = fit_mixture(z, 3, held_out=far)
    assert p.mean.abs().max() < 0.3  # 1.5 if it were fitted to both


@pytest.mark.parametrize("held_out", [torch.randn(5, 3), torch.randn(5)])
def test_held_out_latents_of_another_shape_are_refused(held_out: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"held_out must be latents of other rows.*\(M, \*event\)"
    ):
        fit_mixture(torch.randn(50, 2), 3, held_out=held_out)


def test_a_diagonal_mixture_takes_many_latents() -> None:
    """Matrices of 8,000 latents would take 0.5 GB each."""
    p = fit_gaussian(torch.randn(150, 20, 20, 20), covariance="diagonal")
    assert p.scale.shape == (1, 8000)


@pytest.mark.parametrize(
    ("shapes", "event"),
    [
        (((2,), (3, 4), (3, 4)), None),
        (((3,), (3, 4), (3, 5)), None),
        (((3,), (3, 4), (3, 4, 5)), None),
        (((3,), (3, 4), (3, 4)), (5,)),
        (((3,), (12,), (12,)), None),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: Any, event: Any) -> None:
    with pytest.raises(ValueError, match=r"logits \(K,\), loc \(K, D\) and scale"):
        GaussianMixture(*(torch.ones(shape) for shape in shapes), event_shape=event)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_of_the_parameters_alone(kind: str) -> None:
    p = KINDS[kind]()
    before = base_fingerprint(p)
    p.log_prob(p.sample((3,)))  # caches what it derives
    assert base_fingerprint(p) == before == base_fingerprint(p.to("cpu"))
    other = GaussianMixture(p.logits, p.loc + 1e-3, p.scale)
    assert base_fingerprint(other) != before


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_that_was_used_in_inference_mode_has_gradients(kind: str) -> None:
    """What it derived there was an inference tensor, which cannot be saved for a gradient."""
    with torch.inference_mode():
        made = KINDS[kind]()
    for p in (KINDS[kind](), made):
        z = p.sample((4,))
        with torch.inference_mode():
            p.log_prob(z)
        draw = langevin(
            p.expand((4,)), lambda z: 0.1 * z.flatten(1).sum(1), num_steps=1, step_size=0.1
        )
        assert draw.z.isfinite().all()


def test_expanded_mixtures_derive_once(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    solve = torch.linalg.solve_triangular
    monkeypatch.setattr(
        torch.linalg, "solve_triangular", lambda *a, **k: solved.append(1) or solve(*a, **k)
    )
    p = GaussianMixture(torch.zeros(2), torch.randn(2, 3), torch.eye(3).repeat(2, 1, 1))
    for _ in range(3):
        p.expand((4,)).log_prob(torch.zeros(4, 3))
    assert len(solved) == 1


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e4])
def test_small_latents_keep_their_scale(scale: float) -> None:
    """Standard deviations below 1e-3 were 1e-3."""
    torch.manual_seed(0)
    z = scale * torch.randn(5000, 3)
    sd = fit_gaussian(z).variance.sqrt() / scale
    assert sd.tolist() == pytest.approx([1.0] * 3, rel=0.05)


def test_parameters_of_several_dtypes_become_one() -> None:
    loc = torch.randn(3, 2).double()
    for scale in (torch.ones(3, 2), torch.eye(2).expand(3, 2, 2)):
        p = GaussianMixture(torch.zeros(3), loc, scale)
        assert {t.dtype for t in p.tensors().values()} == {torch.float64}
        assert p.sample((4,)).dtype == p.mean.dtype == torch.float64


def test_a_latent_that_is_one_number_is_whitened() -> None:
    p = GaussianMixture(torch.zeros(3), torch.randn(3, 1), torch.ones(3, 1), event_shape=())
    z = p.sample((5,))
    assert z.shape == (5,)
    torch.testing.assert_close(p.unwhiten(p.whiten(z)), z)
    assert p.unwhiten(p.whiten(z[:0])).shape == (0,)


def test_one_gaussian_is_drawn_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels and a shuffle took most of the time."""
    monkeypatch.delattr(torch, "randperm")
    torch.manual_seed(0)
    factor = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    p = GaussianMixture(torch.zeros(1), torch.tensor([[1.0, -2.0]]), factor[None])
    z = p.sample((20_000, 1))[:, 0]
    torch.testing.assert_close(z.mean(0), p.loc[0], atol=0.03, rtol=0)
    torch.testing.assert_close(z.mT.cov(), factor @ factor.mT, atol=0.04, rtol=0)
