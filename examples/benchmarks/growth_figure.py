"""Draws how the time of SIR grows with M, B, D, K, the samples of a job and the processes.

    python examples/benchmarks/growth_figure.py examples/images/growth.png

The rows are those of results/sampling_speed.json, or of --json. Not a benchmark itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hole_figure import INK, NEW, RULE, SOFT, write

if TYPE_CHECKING:
    from bench import Row
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "sampling_speed.json"

# What grows: the names of the rows, and a title.
PANELS = {
    "proposals": "proposals M",
    "batch": "rows of a batch B",
    "latents": "latents D",
    "groups": "groups K",
    "samples": "samples of a job",
    "processes": "processes",
}


Points = list[tuple[int, float, float | None]]  # size, seconds, and MiB if they were measured


def curve(rows: list[Row], kind: str) -> Points:
    """What was measured of one thing that grows, such as the proposals, in ascending order."""
    found = []
    for row in rows:
        name, _, size = row["name"].rpartition("-")
        if name == kind and size.isdigit():
            found.append((int(size), row["ms"] / 1000, row.get("peak_mib")))
    return sorted(found)


def draw(rows: list[Row]) -> Figure:
    """The figure: a panel for each size that grows, with a dotted line of proportional growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.08)
    for axes, (kind, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        _panel(axes, curve(rows, kind), title, falls=kind == "processes")
    return figure


def _panel(axes: Axes, points: Points, title: str, *, falls: bool) -> None:
    sizes, seconds, memory = zip(*points, strict=True)
    last, end = (sizes[0], seconds[0]) if falls else (sizes[-1], seconds[-1])
    line = [end * (last / size if falls else size / last) for size in sizes]
    axes.plot(sizes, line, color=SOFT, linewidth=1, linestyle=":")
    axes.plot(sizes, seconds, "o-", color=NEW, markersize=6, linewidth=1.5, mec="white")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    side, offset = ("left", (6, 5)) if falls else ("right", (-6, 5))
    for size, spent in zip(sizes, seconds, strict=True):
        text = f"{spent:.2g} s" if spent < 100 else f"{spent:.0f} s"
        axes.annotate(text, (size, spent), offset, textcoords="offset points", ha=side, color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=11, weight="bold")
    axes.set_title(_memory(memory), loc="right", color=SOFT, fontsize=10)
    axes.set_yticks([])
    axes.margins(x=0.2, y=0.2)
    axes.tick_params(colors=SOFT, length=0, labelsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def _memory(measured: tuple[float | None, ...]) -> str:
    """The least and the largest memory in words; empty if there is none."""
    known = sorted(round(mib) for mib in measured if mib is not None)
    if not known:
        return ""
    low, high = known[0], known[-1]
    return f"{low} MiB" if low == high else f"{low} to {high} MiB"


if __name__ == "__main__":
    write(__doc__, RESULTS, draw)
