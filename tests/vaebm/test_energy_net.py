"""Energy networks, spectral regularisation against exact singular values, the replay buffer."""

from __future__ import annotations

import pytest
import torch
from helpers.toys import everything
from torch import nn

from ncprior.vaebm.energy_net import EnergyNet
from ncprior.vaebm.replay import ReplayBuffer
from ncprior.vaebm.spectral import SpectralPenalty


def stirred(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 9, 17)])
def test_an_energy_of_every_size_is_0_when_new_and_a_function_of_x_alone(
    shape: tuple[int, ...],
) -> None:
    net, x = EnergyNet(shape, width=4), torch.rand(5, *shape)
    assert torch.equal(net(x), torch.zeros(5))
    stirred(net)
    assert net(x).std() > 0
    assert torch.allclose(net(x)[2:3], net(x[2:3]), atol=1e-5)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_energy_with_weights_of_low_precision_is_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = stirred(EnergyNet((1, 8, 8), width=4)), torch.rand(6, 1, 8, 8)
    expected = net(x).detach()
    low = net.to(dtype)(x)
    assert low.dtype == torch.float32
    assert torch.allclose(low, expected, atol=0.05 * float(expected.abs().max()))


def test_an_energy_is_smooth() -> None:
    """Along a line, second differences are those of a second derivative: none jumps."""
    net = stirred(EnergyNet((1, 28, 28), width=4)).double()
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    x = t[:, None, None, None] * torch.rand(1, 1, 28, 28, dtype=torch.float64)
    curvature = net(x).detach().diff(n=2) * 400**2
    assert curvature.diff().abs().max() < 0.05 * curvature.abs().max()


def test_an_energy_under_autocast_is_a_number_of_float32() -> None:
    """Features carry 8 bits; their sum does not: images that are close differ in E as they do."""
    torch.manual_seed(0)
    net, x = stirred(EnergyNet((3, 32, 32), width=8)), torch.rand(64, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        energy = net(x)
    assert energy.dtype == torch.float32
    off = (energy - net(x)).detach()
    assert 0 < off.abs().mean() < 0.05 * net(x).detach().std()
    assert (energy.detach().bfloat16().float() != energy.detach()).any()


def test_an_energy_is_made_again_from_its_configuration() -> None:
    net = stirred(EnergyNet((3, 32, 32), width=6))
    again = EnergyNet(**net.config())  # type: ignore[operator]
    again.load_state_dict(net.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(net(x), again(x))


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 1, 28, 28\); got a tensor .* \(2, 1, 32, 32\)"):
        EnergyNet((1, 28, 28))(torch.rand(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"shape \(C, H, W\); got \(784,\)"):
        EnergyNet((784,))
    with pytest.raises(ValueError, match="width must be a whole number"):
        EnergyNet((1, 8, 8), width=0)


# --- spectral regularisation ---


def singular_values(net: nn.Module) -> torch.Tensor:
    weights = (p.detach().flatten(1) for p in net.parameters() if p.ndim > 1)
    return torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights])


def test_the_penalty_is_the_sum_of_the_largest_singular_values() -> None:
    net = stirred(EnergyNet((1, 8, 8), width=4))
    penalty = SpectralPenalty(net, num_iterations=5)
    for _ in range(100):
        value = penalty()
    assert value.item() == pytest.approx(singular_values(net).sum().item(), rel=1e-4)
    with torch.no_grad():
        net.stem.weight.mul_(3.0)  # type: ignore[union-attr, operator]
    assert penalty().item() == pytest.approx(singular_values(net).sum().item(), rel=1e-4)


def test_its_gradient_is_the_outer_product_of_the_singular_vectors() -> None:
    net = nn.Linear(4, 3).double()
    penalty = SpectralPenalty(net)
    for _ in range(300):
        value = penalty()
    value.backward()
    left, _, right = torch.linalg.svd(net.weight.detach())
    assert torch.allclose(net.weight.grad, torch.outer(left[:, 0], right[0]), atol=1e-6)
    assert net.bias.grad is None


def test_vectors_go_on_from_call_to_call() -> None:
    """One iteration a call follows a slow drift that one iteration from scratch would not."""
    torch.manual_seed(3)
    net = nn.Linear(40, 40, bias=False)
    penalty = SpectralPenalty(net, num_iterations=1)
    for _ in range(200):
        with torch.no_grad():
            net.weight.add_(1e-3 * torch.randn(40, 40))
        penalty()
    exact = singular_values(net).sum().item()
    assert penalty().item() == pytest.approx(exact, rel=5e-3)
    assert not list(penalty.parameters()) and set(penalty.state_dict()) == {"u0"}


def test_a_weight_of_zeros_and_a_net_without_weights() -> None:
    net = EnergyNet((1, 8, 8), width=2)  # whose last layer starts at 0
    penalty = SpectralPenalty(net)
    penalty()
    with torch.no_grad():
        net.out.weight.fill_(2.0)
    assert penalty().item() == pytest.approx(singular_values(net).sum().item(), rel=1e-2)
    assert SpectralPenalty(nn.Identity())().item() == 0
    before = everything(net)
    SpectralPenalty(net)()
    assert everything(net) == before


# --- replay ---


def test_a_share_of_the_chains_goes_on_from_kept_ones() -> None:
    buffer = ReplayBuffer(50, fraction=0.3)
    fresh = (torch.zeros(4000, 2), torch.zeros(4000, 1, 3))
    assert torch.equal(buffer.mix(fresh)[0], fresh[0])  # none is kept yet
    ones = torch.arange(1.0, 51)
    buffer.push((ones[:, None].expand(50, 2), ones[:, None, None].expand(50, 1, 3)))
    z, x = buffer.mix(fresh)
    replayed = z[:, 0] > 0
    assert abs(replayed.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert torch.equal(z[:, 0], x[:, 0, 1])  # of one chain all parts
    assert len(z[replayed].unique()) == 50


def test_the_oldest_chains_are_replaced_first() -> None:
    buffer = ReplayBuffer(5, fraction=1.0)
    for i in range(4):
        buffer.push((torch.full((2, 1), float(i)),))
    assert sorted(buffer.kept[0].flatten().tolist()) == [1.0, 2.0, 2.0, 3.0, 3.0]
    buffer.push((torch.arange(10.0, 22.0)[:, None],))  # more than fit
    assert len(buffer.kept[0]) == 5 and buffer.kept[0].min() >= 10


def test_what_was_pushed_may_be_changed_afterwards() -> None:
    buffer, noise = ReplayBuffer(5, fraction=1.0), torch.ones(5, 1, requires_grad=True)
    buffer.push((noise,))
    with torch.no_grad():
        noise.zero_()
    assert buffer.kept[0].sum() == 5 and not buffer.kept[0].requires_grad


@pytest.mark.parametrize(("size", "fraction"), [(0, 0.5), (5, -0.1), (5, 1.1), (5, float("nan"))])
def test_a_buffer_that_makes_no_sense_is_refused(size: int, fraction: float) -> None:
    with pytest.raises(ValueError, match="(size|fraction) must be"):
        ReplayBuffer(size, fraction)


def test_a_penalty_of_no_matrices_is_on_the_device_of_the_energy() -> None:
    net = nn.LayerNorm(3, device="meta")
    assert SpectralPenalty(net)().device.type == "meta"
