"""The scripts that draw pictures of the pages: they run, show what was computed, and stay small."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.browser import BROWSER
from helpers.reports import improvement
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "examples" / "images"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script by its name, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "pictures"))
    yield importlib.import_module
    for name in ("badges", "banner", "report", "small"):
        sys.modules.pop(name, None)


@pytest.fixture
def banner(scripts: Callable[[str], ModuleType]) -> ModuleType:
    return scripts("banner")


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


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_picture_of_a_report_has_its_colours(
    scripts: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    page, out = tmp_path / "report.html", tmp_path / "report.png"
    improvement().save_html(page)
    scripts("report").take(page, out, width=800, height=900)
    image = Image.open(out)
    assert image.size == (800, 900)
    colours = [colour for _, colour in image.convert("RGB").getcolors() or []]
    for wanted in (0xFF, 0xFF, 0xFF), (0x0A, 0x5F, 0xA8), (0xB8, 0x43, 0x0A):  # paper, new, old
        assert min(max(abs(a - b) for a, b in zip(wanted, it, strict=True)) for it in colours) < 8


@pytest.mark.parametrize(("name", "most"), [("banner", 150_000), ("report", 200_000)])
def test_pictures_of_pages_are_small(name: str, most: int) -> None:
    assert (IMAGES / f"{name}.png").stat().st_size < most


def test_badges_are_true(scripts: Callable[[str], ModuleType]) -> None:
    made = scripts("badges").badges((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(made) == {path.name for path in IMAGES.glob("badge-*.svg")}
    for name, text in made.items():
        assert (IMAGES / name).read_text(encoding="utf-8") == text, "run badges.py again"
    assert "Apache-2.0" in made["badge-licence.svg"] and "3.10–3.13" in made["badge-python.svg"]
