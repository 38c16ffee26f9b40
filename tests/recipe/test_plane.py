"""The two directions in which samples differ most, where they are known."""

import pytest
import torch
from torch import Tensor

from ncprior.recipe.plane import separating_plane


def ring(count: int, dim: int) -> Tensor:
    """N(0, I), but on a ring with the same covariance in the plane of two random directions."""
    z = torch.randn(count, dim)
    angle = 2 * torch.pi * torch.rand(count)
    z[:, :2] = 2**0.5 * torch.stack([angle.cos(), angle.sin()], 1)
    return z


@pytest.mark.parametrize("dim", [2, 10])
def test_finds_a_ring_of_the_same_covariance(dim: int) -> None:
    """Principal components are blind to it: only fourth moments differ."""
    turn = torch.linalg.qr(torch.randn(dim, dim)).Q
    plane = separating_plane(torch.randn(4000, dim) @ turn.T, ring(4000, dim) @ turn.T)
    torch.testing.assert_close(plane.T @ plane, torch.eye(2), atol=1e-5, rtol=0)
    inside = (turn[:, :2].T @ plane).square().sum()  # 2 if the planes agree
    assert inside > 1.8


def test_finds_one_coordinate_among_many() -> None:
    first, second = torch.randn(2, 500, 300)
    second[:, 123] += 2
    plane = separating_plane(first, second)
    assert plane[:, 0].abs().argmax() == 123
    assert plane[123, 0].abs() > 0.99


def test_leaves_generators_alone_and_repeats() -> None:
    first, second = torch.randn(2, 50, 5)
    before = torch.get_rng_state()
    assert torch.equal(separating_plane(first, second), separating_plane(first, second))
    assert torch.equal(torch.get_rng_state(), before)


def test_of_one_number_the_second_direction_is_zero() -> None:
    assert separating_plane(torch.randn(30, 1), torch.randn(30, 1) + 3).abs().tolist() == [[1, 0]]


def test_equal_and_constant_samples_have_a_plane() -> None:
    same = torch.ones(20, 4)
    assert separating_plane(same, same).isfinite().all()
