"""The mixture of logistics is a law of whole images: masses add to 1, draws and means follow them."""

import math

import pytest
import torch
from torch import Tensor

from ncprior.adapters.logistics import LogisticMixture


def one_pixel(components: int = 3, *, num_bits: int = 2, seed: int = 0) -> LogisticMixture:
    """A law of a single pixel, wide enough to reach every level and both ends."""
    torch.manual_seed(seed)
    parameters = torch.randn(1, 10 * components, 1, 1, dtype=torch.float64)
    parameters[:, components:] *= 0.7
    return LogisticMixture(parameters, num_bits=num_bits)


def every_image(num_bits: int = 2) -> Tensor:
    """All colours of one pixel, (L³, 1, 3, 1, 1)."""
    levels = torch.linspace(0, 1, 2**num_bits, dtype=torch.float64)
    return torch.cartesian_prod(levels, levels, levels).view(-1, 1, 3, 1, 1)


@pytest.mark.parametrize("num_bits", [1, 2, 4])
def test_the_masses_of_all_colours_add_to_one(num_bits: int) -> None:
    law = one_pixel(num_bits=num_bits)
    log_mass = law.log_prob(every_image(num_bits))
    assert log_mass.shape == (2 ** (3 * num_bits), 1)
    assert math.isclose(log_mass.exp().sum().item(), 1.0, abs_tol=1e-12)


def test_the_mass_of_a_level_is_the_difference_of_the_distribution_function_at_its_edges() -> None:
    """One component, one channel after the other, written out."""
    law = one_pixel(components=1)
    (loc, scale, c) = (t.flatten().tolist() for t in (law.loc, law.scale, law.coefficient))

    def mass(y: float, m: float, s: float) -> float:
        below = 0.0 if y == -1 else 1 / (1 + math.exp(-(y - 1 / 3 - m) / s))
        return (1.0 if y == 1 else 1 / (1 + math.exp(-(y + 1 / 3 - m) / s))) - below

    for x in every_image():
        r, g, b = (2 * x - 1).flatten().tolist()
        r, g, b = (round(3 * y) / 3 for y in (r, g, b))
        expected = mass(r, loc[0], scale[0]) * mass(g, loc[1] + c[0] * r, scale[1])
        expected *= mass(b, loc[2] + c[1] * r + c[2] * g, scale[2])
        assert math.isclose(law.log_prob(x).item(), math.log(expected), abs_tol=1e-9)


def test_draws_have_the_masses() -> None:
    law, count = one_pixel(), 40_000
    draws = law.sample((count,))
    assert draws.shape == (count, 1, 3, 1, 1)
    index = ((3 * draws).round().view(-1, 3) * torch.tensor([16.0, 4.0, 1.0])).sum(1).long()
    seen = torch.bincount(index, minlength=64)
    expected = count * law.log_prob(every_image()).exp().flatten()
    chi_square = ((seen - expected) ** 2 / expected).sum().item()
    assert chi_square < 63 + 4 * math.sqrt(
        2 * 63
    )  # chi-square of 63 degrees: mean 63, variance 126


def test_the_mean_is_that_of_draws() -> None:
    """Far from the ends, where nothing is clipped, all three colours; at an end, red."""
    torch.manual_seed(0)
    parameters = 0.3 * torch.randn(1, 20, 2, 2)
    parameters[:, 2:].view(1, 3, 3, 2, 2, 2)[:, :, 1] -= 3.5  # narrow
    draws = 20_000
    law = LogisticMixture(parameters)
    x = law.sample((draws,))
    error = x.std(0) / math.sqrt(draws)
    assert law.mean.shape == (1, 3, 2, 2)
    assert ((x.mean(0) - law.mean).abs() < 5 * error).all()
    parameters[:, 2:].view(1, 3, 3, 2, 2, 2)[:, 0, 0] += 1.0  # red at its upper end, wide
    parameters[:, 2:].view(1, 3, 3, 2, 2, 2)[:, 0, 1] += 3.0
    law = LogisticMixture(parameters)
    x = law.sample((draws,))
    error = x.std(0) / math.sqrt(draws)
    assert ((x.mean(0) - law.mean).abs() < 5 * error)[:, 0].all()
    assert (law.mean[:, 0] < 0.99).all() and (law.mean <= 1).all()


def test_draws_lie_on_the_levels_and_inside() -> None:
    law = LogisticMixture(3 * torch.randn(2, 20, 4, 4), num_bits=5)
    x = law.sample((7,))
    assert x.shape == (7, 2, 3, 4, 4)
    assert torch.allclose(31 * x, (31 * x).round(), atol=1e-4)
    assert x.min() == 0 and x.max() == 1


def test_a_far_level_keeps_its_logarithm_and_its_gradient() -> None:
    """Narrow logistics 400 scales away: the difference of two sigmoids is 0 in float32."""
    parameters = torch.zeros(1, 10, 1, 1)
    parameters[:, [4, 5, 6]] = 0.0
    parameters.view(1, 10)[0, [2, 5, 8]] = -6.0
    parameters.requires_grad_()
    law = LogisticMixture(parameters)
    x = torch.full((1, 3, 1, 1), 250 / 255)
    log_prob = law.log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
    s, y = math.exp(-6), 2 * 250 / 255 - 1
    expected = 3 * (-(y - 1 / 255) / s + math.log1p(-math.exp(-2 / 255 / s)))
    assert math.isclose(log_prob.item(), expected, rel_tol=1e-5)
    assert torch.isfinite(gradient).all() and (gradient != 0).any()


def test_rows_and_pixels_are_independent() -> None:
    parameters = torch.randn(4, 20, 3, 5)
    law, x = LogisticMixture(parameters), torch.rand(4, 3, 3, 5)
    alone = torch.stack(
        [
            LogisticMixture(parameters[b : b + 1, :, h : h + 1, w : w + 1])
            .log_prob(x[b : b + 1, :, h : h + 1, w : w + 1])
            .sum()
            for b in range(4)
            for h in range(3)
            for w in range(5)
        ]
    )
    assert torch.allclose(law.log_prob(x), alone.view(4, 15).sum(1), rtol=1e-5)


def test_ten_parameters_per_component_are_needed() -> None:
    with pytest.raises(ValueError, match=r"10 parameters per component .* \(1, 12, 4, 4\)"):
        LogisticMixture(torch.zeros(1, 12, 4, 4))


def test_F26_parameters_and_bits() -> None:
    for shape in ((20,), (1, 20, 4), (1, 0, 4, 4)):
        with pytest.raises(ValueError, match="10 parameters per component"):
            LogisticMixture(torch.zeros(shape))
    with pytest.raises(TypeError, match="parameters must be of type Tensor"):
        LogisticMixture([1.0])
    with pytest.raises(TypeError, match="num_bits must be a whole number"):
        LogisticMixture(torch.zeros(1, 20, 4, 4), num_bits=8.0)
    with pytest.raises(ValueError, match="num_bits must be a whole number"):
        LogisticMixture(torch.zeros(1, 20, 4, 4), num_bits=0)


@pytest.mark.parametrize("num_bits", [8, 10, 11, 14])
def test_the_masses_of_all_levels_add_to_one_with_many_bits(num_bits: int) -> None:
    """Levels near the ends were given the tails from 11 bits on."""
    levels = torch.linspace(0, 1, 2**num_bits, dtype=torch.float64)
    parameters = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    law = LogisticMixture(parameters, num_bits=num_bits)
    grey = levels.view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 1, 1)  # all channels have one law
    masses = (law.log_prob(grey) / 3).exp()
    assert math.isclose(masses.sum().item(), 1.0, abs_tol=1e-9)
