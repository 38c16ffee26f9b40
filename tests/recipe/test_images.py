"""Grids of images as PNG: read back by another library, and scaled as one reads them."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from ncprior.recipe.images import as_images, grid


def pixels(uri: str) -> np.ndarray:
    """The bytes of a picture in a URI, as (H, W, RGBA)."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_the_images_row_by_row_with_transparent_gaps(channels: int) -> None:
    images = torch.rand(11, channels, 48, 40)
    uri, count = grid(images)
    found, gap = pixels(uri), 3
    assert count == 11
    assert found.shape == (2 * 48 + gap, 8 * 40 + 7 * gap, 4)
    for i, image in enumerate(images):
        top, left = i // 8 * (48 + gap), i % 8 * (40 + gap)
        tile = found[top : top + 48, left : left + 40]
        expected = (255 * image.expand(3, -1, -1)).round().byte().permute(1, 2, 0).numpy()
        assert (tile[..., :3] == expected).all()
        assert (tile[..., 3] == 255).all()
    assert (found[48 : 48 + gap, :, 3] == 0).all()
    assert (found[48 + gap :, 3 * (40 + gap) :, 3] == 0).all()  # where no image is


def test_small_pixels_are_repeated_and_large_images_reduced() -> None:
    uri, count = grid(torch.rand(99, 1, 8, 8))
    found = pixels(uri)
    assert count == 64
    assert (found[:7, :7] == found[0, 0]).all()
    ramp = torch.linspace(0, 1, 512).expand(20, 3, 256, 512)
    uri, count = grid(ramp)
    assert count == 16
    assert pixels(uri).shape == (4 * 64 + 3 * 10, 4 * 128 + 3 * 10, 4)
    assert pixels(uri)[0, 0, 0] == round(255 * 1.5 / 511)  # the mean of four pixels


@pytest.mark.parametrize(
    ("low", "high", "black", "white"),
    [
        (0.2, 0.9, 0.0, 1.0),
        (-0.7, 1.0, -1.0, 1.0),
        (0.0, 200.0, 0.0, 255.0),
        (-3.0, 5.0, -3.0, 5.0),
    ],
)
def test_all_arms_have_the_scale_of_the_data(
    low: float, high: float, black: float, white: float
) -> None:
    data = torch.linspace(low, high, 2 * 4 * 4).reshape(2, 1, 4, 4)
    others = torch.full((1, 1, 4, 4), 9e9)
    found = as_images({"new prior": others, "held-out data": data})
    assert found is not None
    torch.testing.assert_close(found["held-out data"], (data - black) / (white - black))
    assert (found["new prior"] == 1).all()


def test_rows_of_a_square_number_in_the_unit_interval_are_images() -> None:
    rows = {"held-out data": torch.rand(5, 784), "new prior": torch.rand(5, 784)}
    found = as_images(rows)
    assert found is not None
    assert torch.equal(found["new prior"][0, 0, 1], rows["new prior"][0, 28:56])
    for other in (
        torch.rand(5, 49),
        torch.rand(5, 783),
        2 * torch.rand(5, 784),
        torch.rand(5, 2, 8, 8),
    ):
        assert as_images({"held-out data": other}) is None
    assert as_images({"held-out data": torch.zeros(5, 1, 8, 8)}) is None
    assert as_images({}) is None


def test_what_is_not_finite_is_black() -> None:
    bad = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.5]).reshape(1, 1, 2, 2)
    found = as_images({"held-out data": torch.rand(3, 1, 2, 2), "new prior": bad})
    assert found is not None
    assert found["new prior"].flatten().tolist() == [0.0, 0.0, 1.0, 0.5]
