"""VampPrior of a frozen VAE: the mixture of its posteriors at pseudo-inputs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.problems import Ring, around, standard_normal
from helpers.toys import VAE, Ladder, base, everything, flat
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCPrior, SingleGroup
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.rebase import rebase
from ncprior.bases.vamp import fit_vamp
from ncprior.testing import check_source


def quick(source: Any, data: Any, count: int, **options: Any) -> GaussianMixture:
    return fit_vamp(source, data, count, **{"steps": 20, "progress": False, **options})


@pytest.mark.parametrize("batched", [False, True])
def test_all_the_data_as_pseudo_inputs_give_the_aggregate_posterior(batched: bool) -> None:
    """log (1/N) Σ q(z | x_n), to rounding."""
    source, x = flat(), torch.randn(60, 3)
    data = DataLoader(TensorDataset(x, torch.arange(60)), batch_size=16) if batched else x
    p = quick(source, data, 60, held_out=data, steps=0)
    z = 2 * torch.randn(30, 2)
    q = source.group(source.start(60, source.encode(x))).posterior
    assert q is not None
    exact = q.log_prob(z[:, None]).logsumexp(1) - math.log(60)
    assert torch.allclose(p.log_prob(z), exact, atol=1e-4)


def test_pseudo_inputs_start_at_different_rows_at_random() -> None:
    source, x = flat(), torch.randn(200, 3)
    first, second = (quick(source, x, 50, steps=0).loc for _ in range(2))
    assert len(first.unique(dim=0)) == 50
    assert not torch.equal(first, second)


def test_training_raises_the_held_out_likelihood_towards_the_truth() -> None:
    """A dozen Gaussians around a ring: learnt places are better than random ones."""
    problem = Ring(width=0.5)
    source, x = problem.source(), problem.data(2000)
    z = latents_of(source, problem.data(4000))
    exact = (problem.log_r(z) + problem.prior.log_prob(z)).mean()
    means = []
    for steps in (0, 200):
        torch.manual_seed(1)
        means.append(quick(source, x, 12, steps=steps).log_prob(z).mean())
    # The KL of a mixture to the truth is positive, and z's mean has an error of about 0.02.
    assert means[0] + 0.1 < means[1] < exact + 0.03
    assert exact - means[1] < 0.1


def test_the_gradient_goes_through_the_encoder() -> None:
    """Here z shows x only behind a network; pseudo-inputs still find their places."""
    vae = VAE(features=5)
    with torch.no_grad():
        vae.to_posterior.weight.mul_(4)
    source, x = flat(vae), torch.randn(1000, 5)
    z = latents_of(source, torch.randn(4000, 5))
    means = []
    for steps in (0, 200):
        torch.manual_seed(1)
        means.append(quick(source, x, 4, steps=steps).log_prob(z).mean())
    assert means[1] > means[0] + 0.05


def test_the_vae_stays_as_it_was() -> None:
    vae = VAE()
    vae.encoder[0].weight.grad = torch.ones_like(vae.encoder[0].weight)
    before = everything(vae)
    quick(flat(vae), torch.randn(100, 3), 5)
    assert everything(vae) == before


def widening(x: Tensor) -> Distribution:
    """q(z | a, b) = N(a, (0.1 e^b)²)."""
    return Independent(Normal(x[:, :1], 0.1 * x[:, 1:].exp(), validate_args=False), 1)


@pytest.mark.parametrize(
    ("shift", "bounds", "end"),
    [(0.0, None, 1.0), (0.0, (0.0, 0.2), 0.2), (0.0, (-9.0, 9.0), None), (-0.5, None, None)],
)
def test_pseudo_inputs_stay_in_their_bounds(shift: float, bounds: Any, end: float | None) -> None:
    """One Gaussian for z around a = 0 and 1, of deviation about 0.55: b would like to be 1.7."""
    x = torch.stack([torch.arange(1000) % 2 + shift, 0.9 * torch.rand(1000)], dim=1)
    source = SingleGroup(standard_normal(1), widening, lambda z: z)
    if bounds is not None:
        scale = quick(source, x, 500, bounds=bounds, steps=0).scale
        assert (scale <= 0.1 * math.exp(bounds[1]) + 1e-6).all()
    p = quick(source, x, 1, bounds=bounds, steps=200, learning_rate=0.2)
    b = (10 * p.scale).log().item()
    assert b > 1.2 if end is None else b == pytest.approx(end, abs=1e-5)


def test_the_law_does_not_depend_on_the_units_of_x() -> None:
    problem = Ring(width=0.5)
    means = []
    for unit in (1.0, 1000.0):
        source = SingleGroup(base(), lambda x, u=unit: around(0.5)(x / u), lambda z: z)
        torch.manual_seed(0)
        means.append(quick(source, unit * problem.data(500), 5, steps=50).loc)
    assert torch.allclose(means[0], means[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_of_latents_keep_their_shape(dtype: torch.dtype) -> None:
    prior = Independent(Normal(torch.zeros(2, 3, 3, dtype=dtype), 1.0), 3)
    source = SingleGroup(prior, lambda x: Independent(Normal(x, 0.5 + 0 * x), 3), lambda z: z)
    p = quick(source, torch.randn(50, 2, 3, 3, dtype=dtype), 5)
    assert (p.sample((4,)).shape, p.sample().dtype) == ((4, 2, 3, 3), dtype)
    check_source(rebase(source, p), torch.randn(6, 2, 3, 3, dtype=dtype))


def test_the_mixture_is_no_part_of_a_graph() -> None:
    """Even where the posterior's mean is the pseudo-input itself."""
    p = quick(Ring().source(), Ring().data(50), 5)
    assert not any(t.requires_grad for t in p.tensors().values())


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # an untrained toy
def test_ncp_takes_it_as_a_base() -> None:
    source, x = flat(), torch.randn(100, 3)
    prior = NCPrior.for_source(rebase(source, quick(source, x, 5)), x)
    assert prior.log_ratio([torch.zeros(3, 2)]).shape == (3, 1)


def conditional(x: Tensor, c: Tensor) -> Distribution:
    return around(0.5)(x[:, :2] + c)


def correlated(x: Tensor) -> Distribution:
    return MultivariateNormal(x[:, :2], torch.eye(2).expand(len(x), 2, 2))


@torch.no_grad()
def blocked(x: Tensor) -> Distribution:
    return around(0.5)(x[:, :2])


def single(posterior: Callable[..., Distribution], **options: Any) -> SingleGroup:
    return SingleGroup(standard_normal(2), posterior, lambda z, *c: z, **options)


DATA = torch.randn(50, 3)


@pytest.mark.parametrize(
    ("source", "data", "options", "error", "match"),
    [
        (Ladder(), DATA, {}, ValueError, "one group of latents; the source has 3"),
        (
            single(conditional, condition=lambda x: x[:, 1:]),
            DATA, {}, ValueError, "without conditions",
        ),
        (single(correlated), DATA, {}, TypeError, "diagonal Gaussians.*got MultivariateNormal"),
        (single(blocked), DATA, {}, ValueError, "blocks gradients"),
        (flat(), DATA, {"num_components": 49}, ValueError, "49 pseudo-inputs.*which has only 48"),
        (flat(), DATA, {"num_components": 0}, ValueError, "num_components must be"),
        (flat(), [DATA], {}, ValueError, "No rows of a list can be held out"),
        (flat(), iter([DATA]), {"held_out": DATA}, TypeError, "one-shot list_iterator"),
        (
            single(lambda x: around(0.5)(x.float())),
            torch.randint(9, (50, 2)), {}, TypeError, "got torch.int64",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused(
    source: Any, data: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    arguments = {"num_components": 5, "steps": 1, "progress": False, **options}
    with pytest.raises(error, match=match):
        fit_vamp(source, data, **arguments)
