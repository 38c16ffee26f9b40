"""Plot of a report: bars per group and the reliability curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from ncprior.diagnostics.group_report import GroupReport, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

Groups: TypeAlias = Sequence[GroupReport]

_COLORS = {
    Verdict.GOOD: "C0",
    Verdict.MATCHES: "C9",
    Verdict.CONSTANT: "0.6",
    Verdict.TOO_FEW: "C1",
    Verdict.OVER_CONFIDENT: "C3",
    Verdict.TOO_FLAT: "C4",
    Verdict.INCOMPLETE: "C8",
    Verdict.MEMORISES: "C5",
    Verdict.TOO_WIDE: "C6",
    Verdict.OFF: "0.85",
}


def plot_groups(groups: Sequence[GroupReport], num_proposals: tuple[int, int]) -> Figure:
    """Figure of JSD, KL and ESS per group, coloured by verdict, and of the reliability curves.

    Arguments:
        groups: The groups of a report.
        num_proposals: Numbers of proposals at which the ESS was measured.

    Returns:
        A figure without a window, to show in a notebook or to save.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would choose a backend
    except ImportError as error:
        raise ImportError(
            "Plotting a report needs matplotlib: install ncprior's extra 'plot' "
            "(pip install '.[plot]' in the clone)."
        ) from error
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (jsd, kl), (ess, curve) = figure.subplots(2, 2)
    handles = _plot_bars(jsd, groups, "jsd", "JSD (nats)")
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    jsd.axhline(math.log(2), color="0.2", linestyle=":", linewidth=1)
    jsd.text(0.01, math.log(2), "log 2", va="bottom", transform=jsd.get_yaxis_transform())
    _plot_bars(kl, groups, "kl", "KL estimate E_q[log r] (nats)")
    _plot_ess(ess, groups, num_proposals)
    _plot_reliability(curve, groups)
    return figure


def _plot_bars(axes: Axes, groups: Groups, name: str, label: str) -> list[BarContainer]:
    """Draws one bar per group; returns the bars of each verdict, for a legend."""
    handles = []
    for verdict, color in _COLORS.items():
        some = [g for g in groups if g.verdict is verdict]
        if some:
            heights = [getattr(g, name) for g in some]
            errors = [getattr(g, f"{name}_error") for g in some]
            bars = axes.bar(
                [g.group for g in some], heights, yerr=errors, color=color, ecolor="0.2"
            )
            bars.set_label(str(verdict))
            handles.append(bars)
    axes.axhline(0, color="0.2", linewidth=0.8)
    axes.margins(y=0.12)
    _number_groups(axes, groups, label)
    return handles


def _plot_ess(axes: Axes, groups: Groups, num_proposals: tuple[int, int]) -> None:
    for m, offset, color in zip(num_proposals, (-0.2, 0.2), ("0.75", "0.4"), strict=True):
        places = [g.group + offset for g in groups]
        heights = [g.ess.get(m, math.nan) for g in groups]
        axes.bar(places, heights, 0.4, color=color, label=f"M = {m:,}")
    axes.set_yscale("log")
    axes.set_ylim(0.8, 4 * max(num_proposals))  # space for the legend
    axes.legend(frameon=False, ncols=2, loc="upper left")
    _number_groups(axes, groups, "effective sample size of M proposals")


def _plot_reliability(axes: Axes, groups: Groups) -> None:
    axes.plot([0, 1], [0, 1], color="0.2", linestyle=":", linewidth=1)
    for g in groups:
        if g.reliability is not None:
            curve = g.reliability.predicted, g.reliability.observed
            axes.plot(*curve, ".-", color=_COLORS[g.verdict], alpha=0.7)
    axes.set(
        xlabel="D = σ(log r)", ylabel="fraction of posterior samples", xlim=(0, 1), ylim=(0, 1)
    )
    axes.set_title("reliability: over-confident heads are flatter than the diagonal", fontsize=10)


def _number_groups(axes: Axes, groups: Groups, label: str) -> None:
    first, last = groups[0].group, groups[-1].group
    margin = max(0.8, 2 - 0.5 * (last - first))  # so that the bars of few groups stay slim
    axes.set(xlabel="group", ylabel=label, xlim=(first - margin, last + margin))
    axes.set_xticks([g.group for g in groups][:: -(-len(groups) // 12)])
