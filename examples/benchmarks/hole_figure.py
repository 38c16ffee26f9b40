"""Draws how much of the prior hole each prior closes, against the time to fit it.

    python examples/benchmarks/hole_figure.py examples/images/prior-hole.png

The rows are those of results/hole_mnist.json, or of --json; means over seeds. Not a benchmark itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench import Row
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "hole_mnist.json"

# The light colours of the page of a report, ncprior/recipe/style.py.
INK, SOFT, RULE, OLD, NEW = "#1b2127", "#56616b", "#dde2e7", "#b8430a", "#0a5fa8"

# Points with a name: the method, its label, and where the label stands, in points from the mark.
NAMED = {
    "mixture of 10": ("mixture of 10", (0, -18), "center"),
    "mixture of 100": ("mixture of 100", (-4, -17), "center"),
    "flow": ("normalising flow", (-12, 0), "right"),
    "flow matching": ("flow matching", (-12, 0), "right"),
    "VampPrior": ("VampPrior", (-12, 0), "right"),
    "pythae IAF": ("pythae's IAF", (-12, 0), "right"),
    "NCP on N(0, I), SIR(50)": ("classifier on N(0, I),\n50 proposals", (13, -2), "left"),
    "improve(50)": ("improve(): classifier on a mixture", (6, 16), "center"),
}


class Point(NamedTuple):
    """A prior: seconds to fit it, and the part of the hole that it closes, with its interval."""

    method: str
    ours: bool
    seconds: float
    gap: float
    low: float
    high: float


def points(rows: list[Row]) -> list[Point]:
    """Means over seeds of all fitted priors; what needs no fit, such as the base prior, is left out."""
    keys = ("fit_seconds", "gap_closed", "gap_low", "gap_high")
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        means = [float(np.mean([row[key] for row in own])) for key in keys]
        if means[0] > 0.05:
            ours = own[0]["family"] == "ours" or method.startswith("improve")
            found.append(Point(method, ours, *means))
    return found


def draw(rows: list[Row]) -> Figure:
    """The figure: few points with names, the rest faint, and dotted lines at both ends of the scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlim=(0.8, 6000), ylim=(-0.03, 1.13))
    _levels(axes)
    for it in points(rows):
        colour, mark = (NEW, "o") if it.ours else (OLD, "s")
        if it.method not in NAMED:
            axes.plot(it.seconds, it.gap, mark, color=colour, markersize=5, alpha=0.25, mew=0)
            continue
        label, offset, side = NAMED[it.method]
        axes.plot([it.seconds] * 2, [it.low, it.high], color=colour, linewidth=1.5, zorder=1)
        axes.plot(it.seconds, it.gap, mark, color=colour, markersize=8, mec="white", zorder=3)
        axes.annotate(
            *(label, (it.seconds, it.gap), offset),
            textcoords="offset points",
            color=colour,
            ha=side,
            va="center",
            fontsize=11,
            weight="bold" if it.method.startswith("improve") else "normal",
        )
    for text, colour, mark in (("with a classifier", NEW, "o"), ("without one", OLD, "s")):
        axes.plot([], [], mark, color=colour, label=text, markersize=7)
    axes.legend(loc=(0.03, 0.14), frameon=False, fontsize=11, labelcolor=INK)
    return figure


def _levels(axes: Axes) -> None:
    times = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h"}
    axes.set_xticks(list(times), list(times.values()))
    axes.minorticks_off()
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("time to fit the prior, on one core", color=SOFT, fontsize=11)
    axes.set_ylabel("prior hole closed", color=SOFT, fontsize=11)
    axes.tick_params(colors=SOFT, length=0, labelsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    for height, text in ((0, "the VAE's own prior"), (1, "decoded posterior samples")):
        axes.axhline(height, color=SOFT, linewidth=1, linestyle=":", zorder=0)
        axes.text(0.85, height + 0.02, text, color=SOFT, fontsize=11)


def write(doc: str | None, results: Path, draw: Callable[[list[Row]], Figure]) -> None:
    """Draws the rows of a file of results into a PNG, as the command line says."""
    options = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    options.add_argument("out", type=Path, help="the PNG")
    options.add_argument("--json", type=Path, default=results, help="the rows (%(default)s)")
    chosen = options.parse_args()
    rows = json.loads(chosen.json.read_text(encoding="utf-8"))["rows"]
    draw(rows).savefig(chosen.out, dpi=150)


if __name__ == "__main__":
    write(__doc__, RESULTS, draw)
