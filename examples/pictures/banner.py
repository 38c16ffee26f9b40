"""Draws the banner of the README: an old prior, times the ratio of a classifier, is a new prior.

    python examples/pictures/banner.py examples/images/banner.png

The encodings are points of a pinwheel in the plane, so that densities can be shown. All else is computed:
`ncprior.fit` trains a head, and the third panel is r(z) p(z) on a grid. A minute on one core.
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup, fit
from ncprior.distributions import PointMass

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The dark colours of the page of a report, ncprior/recipe/style.py.
PAPER, INK, RULE = "#13171b", "#e9ecef", "#323940"
OLD, RATIO, NEW, POSTERIOR = "#ff9a62", "#e9ecef", "#67b7f7", "#52c9a5"

LIMIT = 3.3  # both axes reach from -LIMIT to LIMIT
DOTS = 1200  # encodings that are drawn


class Planes(NamedTuple):
    """Log densities and the log ratio on a grid, with shape ``(H, W)``, and encodings ``(N, 2)``."""

    old: Tensor
    log_r: Tensor
    new: Tensor
    encodings: Tensor


def pinwheel(count: int, arms: int = 5) -> Tensor:
    """Encodings: curved arms, about as wide as N(0, I), with nothing between them."""
    radius = 1.75 + 0.55 * torch.randn(count)
    arm = torch.arange(count) % arms
    angle = 2 * math.pi * arm / arms + 0.65 * radius
    across = 0.13 * torch.randn(count)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return x + across[:, None] * torch.stack([-angle.sin(), angle.cos()], 1)


def compute(*, count: int = 20_000, steps: int = 3000, cells: int = 280) -> Planes:
    """Trains a head on the encodings, and evaluates prior, ratio and product on a grid."""
    z = pinwheel(count)
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    source = SingleGroup(base, lambda z: PointMass(z), torch.nn.Identity().eval())
    prior = NCPrior.for_source(source, z[:256])
    fit(prior, z, steps=steps, progress=False)
    axis = torch.linspace(-LIMIT, LIMIT, cells)
    points = torch.cartesian_prod(axis, axis).flip(1)  # row by row, from below
    old = base.log_prob(points)
    with torch.no_grad():
        log_r = prior.heads[0](points)
    planes = (rearrange(it, "(h w) -> h w", h=cells) for it in (old, log_r, old + log_r))
    return Planes(*planes, z[:DOTS])


def draw(planes: Planes) -> Figure:
    """The four panels, with signs between them, on paper of their own: legible on any page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), facecolor=PAPER)
    size, gap = 0.21, 0.04
    left = (1 - 4 * size - 3 * gap) / 2
    titles = (
        ("the VAE's prior", "p(z)", OLD),
        ("a classifier's ratio", "r(z)", RATIO),
        ("the new prior", "p$_{\\mathrm{NCP}}$(z)", NEW),
        ("encodings of data", "q(z)", POSTERIOR),
    )
    for i, (title, formula, colour) in enumerate(titles):
        axes = figure.add_axes((left + i * (size + gap), 0.14, size, 0.7))
        _frame(axes)
        axes.set_title(title, color=colour, fontsize=15, weight="bold", pad=8)
        axes.text(
            0.5, -0.13, formula, color=INK, fontsize=14, ha="center", transform=axes.transAxes
        )
        if i < 3:
            place = left + (i + 1) * size + (i + 0.5) * gap
            figure.text(place, 0.49, "×=≈"[i], color=INK, fontsize=26, ha="center", va="center")
        if i == 3:
            axes.scatter(*planes.encodings.T, s=3.2, color=colour, alpha=0.75, linewidths=0)
        else:
            _glow(axes, _shown(planes, i), colour)
    return figure


def _shown(planes: Planes, panel: int) -> Tensor:
    """Brightness of a panel: a density over its maximum, or a ratio between 1/20 and 20."""
    if panel == 1:
        return ((planes.log_r / math.log(20)).clamp(-1, 1) + 1) / 2
    density = (planes.old, planes.new)[panel // 2].exp()
    return (density / density.quantile(0.999)).clamp(max=1).sqrt()


def _glow(axes: Axes, brightness: Tensor, colour: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("glow", [PAPER, colour])
    extent = (-LIMIT, LIMIT, -LIMIT, LIMIT)
    axes.imshow(brightness, origin="lower", extent=extent, cmap=ramp, vmin=0, vmax=1)


def _frame(axes: Axes) -> None:
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], facecolor=PAPER)
    axes.set_aspect("equal")
    axes.spines[:].set_color(RULE)


def save(figure: Figure, path: Path) -> None:
    from PIL import Image
    from small import save_small

    with io.BytesIO() as file:
        figure.savefig(file, dpi=130, format="png")
        save_small(Image.open(file), path)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("out", type=Path, help="the PNG")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    torch.manual_seed(chosen.seed)
    save(draw(compute()), chosen.out)


if __name__ == "__main__":
    main()
