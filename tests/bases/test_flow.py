"""Normalizing flows as bases: a density that is one, its law, its gradient, its fit."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zuko
from helpers.hub_problems import equal_draws, gaussian, trained
from helpers.problems import Ring
from helpers.toys import flat
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import NCPrior, langevin
from ncprior.bases.code_network import fit_code_network
from ncprior.bases.empirical import stored_numbers
from ncprior.bases.flow import Flow
from ncprior.bases.flow_fit import fit_flow
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture_em import fit_gaussian
from ncprior.bases.rebase import rebase
from ncprior.saving.heads import FILE, inspect
from ncprior.saving.tensors import load_tensors, save_tensors
from ncprior.testing import check_source
from ncprior.utils.fingerprints import base_fingerprint


class Affine(nn.Module):
    """A flow as normflows has them: w = shift + exp(log_scale) noise, flat."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))

    @property
    def law(self) -> Independent:
        return Independent(Normal(self.shift, self.log_scale.exp()), 1)

    def log_prob(self, z: Tensor) -> Tensor:
        return self.law.log_prob(z)

    def sample(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        z = self.law.sample((num_samples,))
        return z, self.law.log_prob(z)


def bent(features: int = 2, **options: Any) -> zuko.flows.NSF:
    """A spline flow of random weights, far from the identity."""
    flow = zuko.flows.NSF(features, transforms=2, hidden_features=(16,), passes=2, **options)
    with torch.no_grad():
        for w in flow.parameters():
            w.mul_(2)
    return flow


def on_a_grid(p: Flow, width: float = 8.0, n: int = 400) -> tuple[Tensor, Tensor]:
    """Midpoints of cells of the plane around p's centre, and their probabilities."""
    side = (torch.arange(n) + 0.5) * (2 * width / n) - width
    white = torch.cartesian_prod(side, side)
    z = p.loc + p.scale * white
    cell = (2 * width / n) ** 2 * p.scale.prod().item()
    return z, p.log_prob(z).double().exp() * cell


def quick(z: Tensor, flow: nn.Module | None = None, **options: Any) -> Flow:
    return fit_flow(z, flow, **{"steps": 3, "progress": False, **options})


def test_the_density_integrates_to_one_and_is_that_of_the_draws() -> None:
    p = Flow(bent(), torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.1]))
    z, mass = on_a_grid(p)  # of cells of 0.04, over which splines have kinks
    assert mass.sum().item() == pytest.approx(1, abs=4e-3)
    draws = p.sample((20_000,)).double()
    for f in (lambda z: z, lambda z: (z - p.loc).square(), lambda z: z.prod(1, keepdim=True)):
        mean = mass @ f(z.double())
        error = f(draws).std(0) / math.sqrt(20_000)
        assert ((f(draws).mean(0) - mean).abs() < 4 * error + 4e-3 * mean.abs()).all()


def test_standardising_is_a_change_of_variables() -> None:
    loc, scale = torch.randn(6), torch.rand(6) + 0.1
    p = Flow(Affine(6), loc, scale, event_shape=(3, 2)).expand((5,))
    exact = Independent(Normal(loc.reshape(3, 2), scale.reshape(3, 2)), 2)
    z = 2 * torch.randn(4, 5, 3, 2)
    assert torch.allclose(p.log_prob(z), exact.log_prob(z), rtol=1e-5, atol=1e-5)


def test_event_shapes_are_kept() -> None:
    p = Flow(bent(6), torch.zeros(6), torch.ones(6), event_shape=(3, 2)).expand((5,))
    z = p.sample((4,))
    assert (z.shape, p.log_prob(z).shape) == ((4, 5, 3, 2), (4, 5))
    assert p.sample((0,)).shape == (0, 5, 3, 2)
    assert p.sample().shape == (5, 3, 2)
    flat = Flow(p.flow, p.loc, p.scale)
    assert torch.equal(flat.log_prob(z.flatten(2)), p.log_prob(z))


def test_the_gradient_is_that_of_z_alone() -> None:
    p = Flow(bent().double(), torch.zeros(2).double(), torch.full((2,), 0.5).double())
    z = (0.3 * torch.randn(6, 2).double()).requires_grad_()
    assert torch.autograd.gradcheck(p.log_prob, (z,))
    p.log_prob(z).sum().backward()
    assert all(w.grad is None and not w.requires_grad for w in p.flow.parameters())


def test_langevin_walks_in_a_flow() -> None:
    """Metropolis-adjusted and with r = exp(w z), which shifts a Gaussian's mean by its variance."""
    p = Flow(Affine(2), torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])).expand((3000,))
    draw = langevin(p, lambda z: 2 * z[:, 0], num_steps=60, step_size=0.2, adjusted=True)
    error = 4 * 0.5 / math.sqrt(3000)
    assert draw.z[:, 0].mean().item() == pytest.approx(1.5, abs=error)
    assert draw.z[:, 1].mean().item() == pytest.approx(2.0, abs=error)
    spline = Flow(bent(), torch.zeros(2), torch.ones(2)).expand((50,))
    assert torch.isfinite(langevin(spline, lambda z: z[:, 0], num_steps=5, step_size=0.1).z).all()


def test_the_default_flow_bends_around_a_ring() -> None:
    """A Gaussian misses the truth by 1 nat on held-out latents, the flow by less than 0.3."""
    problem = Ring()
    z, fresh = (latents_of(problem.source(), problem.data(2000)) for _ in range(2))
    truth = (problem.log_r(fresh) + problem.prior.log_prob(fresh)).mean()
    missed = truth - fit_gaussian(z).log_prob(fresh).mean()
    p = fit_flow(z, steps=100, learning_rate=5e-3, progress=False)
    assert missed > 0.9
    assert -0.03 < truth - p.log_prob(fresh).mean() < 0.3  # a KL, and its error of about 0.01


def test_maximum_likelihood_finds_the_moments() -> None:
    """Of latents that standardising has not normalised: an affine flow in front of none."""
    z = 5 + 3 * torch.randn(1000, 2)
    flow = Affine(2)
    with torch.no_grad():
        flow.shift.fill_(1.0)
    p = fit_flow(z, flow, steps=400, learning_rate=0.02, weight_decay=0.0, progress=False)
    draws = p.sample((20_000,))
    # The loss is minimised on 950 of the rows, whose moments are those of all to 3 / √950 · √0.05.
    assert ((draws.mean(0) - z.mean(0)).abs() < 0.2).all()
    assert ((draws.std(0) / z.std(0) - 1).abs() < 0.06).all()
    assert p.flow is flow and not flow.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    z = torch.randn(60, 2, 2, dtype=dtype)
    p = quick(z)
    assert (p.sample().dtype, p.log_prob(z).dtype) == (torch.float32, torch.float32)
    own = quick(z, Affine(4).to(dtype))
    assert (own.sample().dtype, own.log_prob(z).dtype, own.loc.dtype) == (dtype,) * 3


def test_one_latent_will_do() -> None:
    p = quick(torch.randn(100, 1))
    assert p.log_prob(p.sample((5,))).shape == (5,)


def test_what_a_flow_holds_fixed_stays() -> None:
    flow = Affine(2)
    flow.shift.requires_grad_(False).fill_(1.0)
    quick(torch.randn(100, 2), flow)
    assert (flow.shift == 1).all() and (flow.log_scale != 0).all()


@pytest.mark.parametrize("flow", [None, Affine])
def test_it_is_a_base(flow: Any) -> None:
    source = rebase(flat(), quick(torch.randn(100, 2), flow if flow is None else flow(2)))
    check_source(source, torch.randn(6, 3))


def test_it_is_saved_with_the_heads_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source, p = gaussian(), quick(1 + torch.randn(100, 2))
    prior = trained(rebase(source, p))
    prior.save_pretrained(tmp_path)
    assert inspect(tmp_path)["base"] == {
        "kind": "Flow",
        "config": {"event_shape": [2], "spline": {"transforms": 4, "width": 128, "bins": 8}},
    }
    loaded = NCPrior.from_pretrained(source, tmp_path)
    z = torch.randn(5, 2)
    assert torch.equal(loaded.source.prior.log_prob(z), p.log_prob(z))
    assert equal_draws(prior.eval(), loaded)
    assert not any(w.requires_grad for w in loaded.source.prior.flow.parameters())


@pytest.mark.parametrize("features", [3, 8])
def test_the_order_of_a_saved_flows_latents_comes_back(features: int) -> None:
    """Coupling layers split the latents at random: another split would be another law."""
    p = quick(torch.randn(50, features))
    again = Flow.rebuild({n: t.clone() for n, t in p.tensors().items()}, p.config() or {})
    z = torch.randn(5, features)
    assert torch.equal(again.log_prob(z), p.log_prob(z))
    draws = []
    for each in (p, again):
        torch.manual_seed(0)
        draws.append(each.sample((5,)))
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t, c: t.pop("base.scale"),
        lambda t, c: t.pop("base.flow.base.loc"),
        lambda t, c: c["base"]["config"].pop("spline"),
        lambda t, c: c["base"]["config"].update(spline=None),
        lambda t, c: c["base"]["config"]["spline"].update(bins=3),
        lambda t, c: c["base"]["config"]["spline"].update(univariate=1),
    ],
)
def test_a_file_that_makes_no_flow_is_refused(edit: Any, tmp_path: Path) -> None:
    source = gaussian()
    trained(rebase(source, quick(torch.randn(100, 2)))).save_pretrained(tmp_path)
    tensors, config = load_tensors(tmp_path / FILE)
    edit(tensors, config)
    save_tensors(tmp_path / FILE, tensors, config)
    with pytest.raises(ValueError, match="its base cannot be built as a Flow"):
        NCPrior.from_pretrained(source, tmp_path)


def test_a_flow_of_ones_own_is_not_saved_but_compared(tmp_path: Path) -> None:
    source, p = gaussian(), quick(torch.randn(100, 2), bent())
    trained(rebase(source, p)).save_pretrained(tmp_path)
    assert inspect(tmp_path)["base"] is None
    assert NCPrior.from_pretrained(rebase(source, p), tmp_path).active == [True]
    other = quick(torch.randn(100, 2), bent())
    both = f"{base_fingerprint(p)}.*{base_fingerprint(other)}"
    with pytest.raises(ValueError, match=f"on the base prior {both}"):
        NCPrior.from_pretrained(rebase(source, other), tmp_path)


def test_a_copy_on_a_device_is_the_same() -> None:
    p = Flow(bent(), torch.zeros(2), torch.ones(2)).expand((3,))
    copy = p.to("cpu")
    z = torch.randn(3, 2)
    assert torch.equal(copy.log_prob(z), p.log_prob(z)) and copy.batch_shape == (3,)
    assert copy.flow is not p.flow and base_fingerprint(copy) == base_fingerprint(p)


def test_its_numbers_are_weights_and_units_without_masks() -> None:
    p = Flow(Affine(3), torch.zeros(3), torch.ones(3))
    assert stored_numbers(p) == 12
    spline = bent()  # its noise has a mean and a scale
    weights = sum(w.numel() for w in spline.parameters())
    assert stored_numbers(Flow(spline, torch.zeros(2), torch.ones(2))) == weights + 8


class Wrong(Affine):
    def log_prob(self, z: Tensor) -> Tensor:
        return super().log_prob(z)[:, None]


@pytest.mark.parametrize(
    ("z", "flow", "error", "match"),
    [
        (torch.randn(10), None, ValueError, "shape"),
        (torch.full((10, 2), math.inf), None, ValueError, "must be finite"),
        (torch.randn(50, 2, 2), bent(3), ValueError, "must take z of 4 numbers"),
        (torch.randn(50, 2), zuko.flows.MAF(2, context=3), ValueError, "without context"),
        (torch.randn(50, 2), nn.Linear(2, 2), TypeError, "A flow is a module of zuko.*got Linear"),
        (torch.randn(50, 2), nn.Identity(), TypeError, "trainable parameters; got Identity"),
        (torch.randn(50, 2), "NSF", TypeError, "is an nn.Module.*got str"),
        (torch.randn(50, 2), Wrong(2), ValueError, r"\(50,\) for z of \(50, 2\); got \(50, 1\)"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    z: Tensor, flow: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        quick(z, flow)


@pytest.mark.parametrize(
    "shapes", [((3,), (4,), None), ((2, 2), (2, 2), None), ((4,), (4,), (3,))]
)
def test_shapes_that_do_not_fit_are_refused(shapes: Any) -> None:
    loc, scale, event = shapes
    with pytest.raises(ValueError, match=r"loc and scale of shape \(D,\)"):
        Flow(Affine(4), torch.zeros(loc), torch.ones(scale), event_shape=event)


def test_without_zuko_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ImportError, match=r"extra 'flows' \(pip install '\.\[flows\]'"):
        quick(torch.randn(50, 2))
    quick(torch.randn(50, 2), Affine(2))


def test_contexts_of_sorted_rows_have_the_scale_of_all() -> None:
    """The first 4,096 rows had one value, whose standard deviation was of rounding."""
    c = torch.full((6000, 1), 0.7)
    c[4096:, 0] = torch.rand(6000 - 4096)
    flow: Any = fit_flow(torch.randn(6000, 2), context=c, steps=1, progress=False).flow
    torch.testing.assert_close(flow.context_scale, c.std(0), atol=0.02, rtol=0)
    same: Any = fit_flow(
        torch.randn(99, 2), context=0.7 * torch.ones(99, 1), steps=1, progress=False
    ).flow
    assert same.context_scale == 1


def test_contexts_of_sorted_codes_have_the_scale_of_all() -> None:
    c = torch.full((3000, 1), 0.7)
    c[1500:, 0] = torch.rand(1500)
    codes = torch.zeros(3000, 2).long()
    base = fit_code_network(codes, context=c, steps=1, width=8, progress=False)
    torch.testing.assert_close(base.network.context.scale.sd, c.std(0), atol=0.03, rtol=0)
