"""The scripts that draw pictures of the pages: they run, show what was computed, and stay small."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "examples" / "images"


@pytest.fixture
def banner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "pictures"))
    return importlib.import_module("banner")


def test_the_banner_shows_a_ratio_times_a_density(banner: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    planes = banner.compute(count=500, steps=5, cells=30)
    assert torch.allclose(planes.new, planes.old + planes.log_r)
    area = (2 * banner.LIMIT / 29) ** 2
    assert abs(planes.old.exp().sum() * area - 1) < 0.02  # the mass of N(0, I) in the panel
    figure = banner.draw(planes)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "the VAE's prior",
        "a classifier's ratio",
        "the new prior",
        "encodings of data",
    ]
    for panel in range(3):
        shown = banner._shown(planes, panel)
        assert shown.shape == (30, 30) and shown.min() >= 0 and shown.max() <= 1
    banner.save(figure, tmp_path / "banner.png")
    assert (tmp_path / "banner.png").stat().st_size < 150_000


def test_the_arms_leave_much_of_the_prior_empty(banner: ModuleType) -> None:
    torch.manual_seed(0)
    z, others = banner.pinwheel(2000), torch.randn(2000, 2)
    near = [torch.cdist(points, banner.pinwheel(2000)).amin(1) < 0.15 for points in (z, others)]
    assert near[0].double().mean() > 0.95 and near[1].double().mean() < 0.7


def test_pictures_of_pages_are_small() -> None:
    assert (IMAGES / "banner.png").stat().st_size < 150_000
