"""Flow matching: the integrator against exact solutions, the fit against known laws."""

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_problems import equal_draws, gaussian, trained
from helpers.problems import GaussianPair
from helpers.toys import flat
from torch import Tensor, nn

from ncprior import NCPrior, langevin, sir
from ncprior.bases.empirical import stored_numbers
from ncprior.bases.flow_matching import FlowMatching, VelocityNet, _Lines, fit_flow_matching
from ncprior.bases.rebase import rebase
from ncprior.saving.heads import FILE, inspect
from ncprior.saving.tensors import load_tensors, save_tensors
from ncprior.testing import check_source


class Exact(nn.Module):
    """The mean velocity from N(0, 1) to N(m, s²), whose solution is z(1) = m + s z(0)."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.features, self.mean, self.std = 2, mean, std
        self.calls = 0

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        variance = (1 - t) ** 2 + (t * self.std) ** 2
        gain = (t * self.std**2 - (1 - t)) / variance  # Cov(z_1 - z_0, z_t) / Var(z_t)
        return self.mean + gain * (z - t * self.mean)


def exact(num_steps: int) -> FlowMatching:
    network: Any = Exact(0.5, 0.2)
    return FlowMatching(network, torch.tensor([1.0, 2.0]), torch.ones(2), num_steps=num_steps)


def small(z: Tensor, **options: Any) -> FlowMatching:
    settings = {"width": 16, "depth": 1, "steps": 5, "progress": False, **options}
    return fit_flow_matching(z, **settings)


class Growing(nn.Module):
    """dz/dt = (2 - 3 t²) z, whose solution is z(1) = e z(0)."""

    features = 2

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return (2 - 3 * t.square()) * z


def carried(p: FlowMatching) -> tuple[Tensor, Tensor]:
    """The noise that a draw starts from, and the draw."""
    torch.manual_seed(0)
    noise = torch.randn(500, 2)
    torch.manual_seed(0)
    return noise, p.sample(torch.Size((500,)))


def test_noise_is_carried_to_the_law() -> None:
    noise, z = carried(exact(40))
    assert torch.allclose(z, torch.tensor([1.5, 2.5]) + 0.2 * noise, atol=1e-3)


def test_the_integrator_is_of_second_order() -> None:
    network: Any = Growing()
    errors = []
    for num_steps in (20, 40, 80):
        p = FlowMatching(network, torch.zeros(2), torch.ones(2), num_steps=num_steps)
        noise, z = carried(p)
        errors.append((z - math.e * noise).abs().max().item())
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([2.0, 2.0], abs=0.2)


def test_evaluations_are_counted() -> None:
    p = exact(7)
    p.sample((5,))
    assert p.num_evaluations == 14 == p.network.calls  # type: ignore[comparison-overlap]


def test_the_loss_is_least_at_the_exact_velocity() -> None:
    """Per latent it is the variance of z_1 - z_0 given z_t: s² / ((1 - t)² + t² s²), averaged."""
    std, n = 0.5, 200_000
    lines = _Lines(0.3 + std * torch.randn(n, 2))
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    least = (std**2 / ((1 - t) ** 2 + (t * std) ** 2)).mean().item()
    losses = [lines.loss(Exact(0.3 + shift, std)).item() for shift in (0.0, 0.2, -0.2)]
    assert losses[0] == pytest.approx(least, abs=4 * 2 / math.sqrt(2 * n))
    assert min(losses) == losses[0]


def test_a_correlated_gaussian_is_reproduced() -> None:
    """In units that are far from standard; 0.06 is left to the network, 4 sd to the samples."""
    factor = torch.tensor([[2.0, 0.0], [1.2, 0.8]])
    z = 10 + torch.randn(4000, 2) @ factor.mT
    p = fit_flow_matching(z, width=64, depth=2, steps=600, progress=False)
    draws = p.sample((10_000,))
    std = factor.square().sum(1).sqrt()
    assert ((draws.mean(0) - z.mean(0)).abs() < (4 / 100 + 0.06) * std).all()
    error = (draws.T.cov() - z.T.cov()).abs() / (std[:, None] * std)
    assert (error < 4 * math.sqrt(2) / 100 + 0.06).all()


def test_two_bumps_stay_apart() -> None:
    z = 0.1 * torch.randn(2000, 1) + 2 * torch.randint(2, (2000, 1)) - 1
    p = fit_flow_matching(z, width=64, depth=2, steps=600, progress=False)
    draws = p.sample((4000,))
    assert ((draws.abs() - 1).abs() < 0.4).float().mean() > 0.95
    assert (draws > 0).float().mean().item() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_latents_of_any_shape_and_dtype(dtype: torch.dtype) -> None:
    p = small(torch.randn(60, 2, 3, 4).to(dtype))
    assert p.event_shape == (2, 3, 4)
    for shape in ((), (5,), (0,), (3, 5)):
        z = p.sample(torch.Size(shape))
        assert (z.shape, z.dtype) == ((*shape, 2, 3, 4), torch.float32)


def test_draws_of_one_call_are_independent() -> None:
    z = small(torch.randn(100, 1)).sample((20_000,))[:, 0]
    z = (z - z.mean()) / z.std()
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(20_000)


def test_it_is_a_base_that_only_samples() -> None:
    p = small(torch.randn(100, 2))
    source = rebase(flat(), p)
    check_source(source, torch.randn(6, 3))
    prior = source.group(source.start(3)).prior
    with pytest.raises(TypeError, match="FlowMatching can only be sampled. Use sir"):
        langevin(prior, lambda z: z.sum(-1), num_steps=1, step_size=0.1)
    with pytest.raises(ValueError, match=r"shape \(5,\).*\(2,\)"):
        wrong = rebase(flat(), small(torch.randn(100, 5)))
        wrong.group(wrong.start(3, wrong.encode(torch.randn(3, 3))))


def test_sir_corrects_it() -> None:
    """r = exp(w z) shifts the Gaussian that it draws, N(1.5, 0.2²), by w 0.2²."""
    problem = GaussianPair()
    source = rebase(problem.source(), exact(20))
    p: Any = source.group(source.start(4000)).prior
    z = sir(p, lambda z: 5 * z[..., 0], num_proposals=50).z
    assert z[:, 0].mean().item() == pytest.approx(1.7, abs=0.02)
    assert z[:, 1].mean().item() == pytest.approx(2.5, abs=0.02)


def test_fitting_is_deterministic_and_frees_the_network_of_gradients() -> None:
    fits = []
    for _ in range(2):
        torch.manual_seed(3)
        fits.append(small(torch.linspace(-1, 1, 100)[:, None]))
    assert torch.equal(
        fits[0].tensors()["network.out.bias"], fits[1].tensors()["network.out.bias"]
    )
    assert not any(t.requires_grad for t in fits[0].network.parameters())
    assert not fits[0].network.training


def test_it_is_saved_with_the_heads_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source = gaussian()
    prior = trained(rebase(source, small(torch.randn(100, 2), num_steps=3)))
    prior.save_pretrained(tmp_path)
    assert inspect(tmp_path)["base"] == {
        "kind": "FlowMatching",
        "config": {"event_shape": [2], "num_steps": 3, "width": 16, "depth": 1},
    }
    before = torch.get_rng_state()
    loaded = NCPrior.from_pretrained(source, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal_draws(prior.eval(), loaded)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t, c: t.pop("base.loc"),
        lambda t, c: t.pop("base.network.out.bias"),
        lambda t, c: c["base"]["config"].pop("width"),
        lambda t, c: c["base"]["config"].update(width="wide"),
        lambda t, c: c["base"]["config"].update(num_steps=0),
        lambda t, c: c["base"]["config"].update(colour="red"),
    ],
)
def test_a_file_that_makes_no_base_is_refused(edit: Any, tmp_path: Path) -> None:
    source = gaussian()
    trained(rebase(source, small(torch.randn(100, 2)))).save_pretrained(tmp_path)
    tensors, config = load_tensors(tmp_path / FILE)
    edit(tensors, config)
    save_tensors(tmp_path / FILE, tensors, config)
    with pytest.raises(ValueError, match="its base cannot be built as a FlowMatching"):
        NCPrior.from_pretrained(source, tmp_path)


def test_a_copy_on_a_device_is_the_same() -> None:
    p = small(torch.randn(100, 2, 2), num_steps=3)
    draws = []
    for each in (p, p.to("cpu")):
        torch.manual_seed(0)
        draws.append(each.sample((5,)))
    assert torch.equal(*draws) and p.to("cpu").network is not p.network


def test_its_numbers_are_the_networks_weights_and_the_units() -> None:
    p = small(torch.randn(100, 2))
    network = sum(w.numel() for w in p.network.parameters())
    assert stored_numbers(p) == network + 4


@pytest.mark.parametrize(
    ("z", "options", "match"),
    [
        (torch.randn(10), {}, "shape"),
        (torch.randn(1, 2), {}, "at least 2"),
        (torch.full((10, 2), math.nan), {}, "not finite"),
        (torch.randn(10, 2), {"num_steps": 0}, "num_steps must be at least 1"),
        (torch.randn(10, 2), {"learning_rate": -1.0}, r"learning_rate must be .* got -1\.0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(z: Tensor, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(z, **options)


def test_shapes_that_do_not_fit_are_refused() -> None:
    network = VelocityNet(4)
    for loc, scale, event in ((3, 4, None), (4, 3, None), (4, 4, (3,))):
        with pytest.raises(ValueError, match="A velocity of 4 latents takes"):
            FlowMatching(network, torch.zeros(loc), torch.ones(scale), event_shape=event)


def test_ncp_samples_on_it() -> None:
    prior = trained(rebase(gaussian(), small(torch.randn(100, 2), num_steps=2)))
    assert prior.eval().sample(5, partial(sir, num_proposals=4)).x.shape == (5, 3)
