"""The picture of prior_hole.py: what every prior closes, against what its samples cost.

Not a benchmark itself.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from bench import Row

MARKS = {"ours": ("o", "tab:blue"), "peer": ("s", "tab:orange"), "reference": ("^", "tab:grey")}


def save_figure(rows: list[Row], path: Path, title: str) -> None:
    """Gap closed against the seconds of 10,000 samples, a number per method: means over seeds.

    The base prior, 0 by definition, is left out, and so is what is worse than it by far; beside it
    the upper end on a scale of its own.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, (whole, upper) = plt.subplots(
        1, 2, figsize=(13, 6.5), width_ratios=[1, 2.2], layout="constrained"
    )
    names = list(dict.fromkeys(row["method"] for row in rows))[1:]
    keys = ("sample_seconds_per_10k", "gap_closed", "gap_low", "gap_high")
    found = [
        [float(np.mean([row[key] for row in rows if row["method"] == name])) for key in keys]
        for name in names
    ]
    families = [next(row["family"] for row in rows if row["method"] == name) for name in names]
    top = 1.05 * max(1.0, *(high for *_, high in found))
    ends = ((whole, -0.1), (upper, max(0.5, 1 - 2.5 * (top - 1))))
    for axes, bottom in ends:
        axes.set(xscale="log", xlabel="seconds per 10,000 samples", ylim=(bottom, top))
        for (x, y, low, high), family in zip(found, families, strict=True):
            mark, colour = MARKS[family]
            axes.plot([x, x], [low, high], color=colour, linewidth=0.8, alpha=0.5)
            axes.plot(x, y, mark, color=colour, markersize=5)
        shown = (bottom, ends[1][1] if axes is whole else top)
        _number(
            axes, {i: (x, y) for i, (x, y, *_) in enumerate(found, 1) if shown[0] < y < shown[1]}
        )
        axes.axhline(1.0, color="tab:grey", linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    for number, name in enumerate(names, start=1):
        place = (1.02, 1 - (number - 1) / (len(names) + 2))
        upper.text(*place, f"{number}  {name}", transform=upper.transAxes, fontsize=7, va="top")
    for family, (mark, colour) in MARKS.items():
        whole.plot([], [], mark, color=colour, label=family)
    whole.set(ylabel="share of the prior hole closed")
    whole.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _number(axes: Any, points: dict[int, tuple[float, float]]) -> None:  # noqa: ANN401
    """Numbers beside points, pushed apart where they would cover each other."""
    bottom, top = axes.get_ylim()
    line, place = (top - bottom) / 36, {i: y for i, (_, y) in points.items()}
    pairs = [
        (i, j)
        for i in points
        for j in points
        if i < j and abs(math.log(points[i][0] / points[j][0])) < math.log(1.15)
    ]
    for _ in range(500):
        for i, j in pairs:
            overlap = line - abs(place[i] - place[j])
            if overlap > 0:
                push = math.copysign(overlap / 4, place[i] - place[j])
                place[i], place[j] = place[i] + push, place[j] - push
    for i, (x, y) in points.items():
        axes.annotate(
            *(str(i), (x, y), (x * 1.12, place[i])),
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "tab:grey"},
        )
