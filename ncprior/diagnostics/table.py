"""The groups of a report as a table of text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ncprior.diagnostics.group_report import UNRELIABLE_K, GroupReport, Verdict

_WIDTH = 100  # columns of the table

_KL_DIFFERS = 0.5  # nats

LEGEND = (
    "Calibrated: slope 1, and E_q[D] + E_p[D] = 1. E_p[r] and E_q[1/r] are followed by the shape k "
    "of their Pareto tail; in parentheses, where k is above 0.7, they are unreliable. KL is E_q[log r], "
    "or with ≥ a lower bound; needed with > is one too. JSD and KL measure what the head knows, so "
    "JSD is a lower bound: missing is the part of the JSD that a fresh head still finds."
)


class _Column(NamedTuple):
    title: str
    unit: str
    cell: Callable[[GroupReport], str]
    optional: bool = False  # shown only if some group has a value

    def wanted(self, groups: tuple[GroupReport, ...]) -> bool:
        return not self.optional or any(self.cell(g) != "-" for g in groups)


def render(
    groups: tuple[GroupReport, ...], num_proposals: tuple[int, int], notes: Sequence[str]
) -> str:
    """Renders groups as a table of at most 100 characters per line, with notes below.

    Arguments:
        groups: The groups of a report.
        num_proposals: The two M of the effective sample sizes.
        notes: Paragraphs between the table and the verdicts.

    Returns:
        One line per group, the notes, and the verdicts with their advice.
    """
    columns = [c for c in _columns(*num_proposals) if c.wanted(groups)]
    cells = [[c.cell(g) for c in columns] for g in groups]
    table = [[c.title for c in columns], [c.unit for c in columns], *cells]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    space = "  " if sum(widths) + 2 * len(widths) <= _WIDTH else " "
    lines = [
        space.join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True))
        for line in table
    ]
    paragraphs = [*notes, *_activity(groups), *verdict_lines(groups)]
    return "\n".join([*lines, "", *(_wrap(text) for text in paragraphs)])


def verdict_lines(groups: Sequence[GroupReport]) -> list[str]:
    """One line per verdict: the numbers of its groups, and the advice."""
    lines = []
    for verdict in Verdict:
        found = [g.group for g in groups if g.verdict is verdict]
        if found:
            lines.append(f"{_named(found)}: {verdict}. {verdict.advice}")
    return lines


def _activity(groups: Sequence[GroupReport]) -> list[str]:
    """A paragraph with the number of active latents in every group, if there is one."""
    found: dict[tuple[int, int], list[int]] = {}
    for g in groups:
        if g.num_latents > 0:
            found.setdefault((g.num_active, g.num_latents), []).append(g.group)
    counts = [f"{_named(of)}: {_active(*numbers)}" for numbers, of in found.items()]
    return ["; ".join(counts) + "."] if counts else []


def _active(active: int, latents: int) -> str:
    if active == latents:
        return f"all {latents} latents are active"
    if active > 0:
        return f"{active} of {latents} latents are active"
    return f"none of {latents} latents is active, which means that the latents are not used"


def _named(groups: list[int]) -> str:
    return f"{'group' if len(groups) == 1 else 'groups'} {_ranges(groups)}"


def _columns(low: int, high: int) -> list[_Column]:
    return [
        _Column("group", "", lambda g: str(g.group)),
        _Column("NCE loss", "nats", lambda g: _with_error(g.nce_loss, g.nce_loss_error, 3)),
        _Column("JSD", "nats", lambda g: _number(g.jsd, 3)),
        _Column("KL", "nats", _kl),
        _Column("slope", "", lambda g: _with_error(g.slope, g.slope_error, 2)),
        _Column("E[D]", "q + p", lambda g: _number(g.identity, 2)),
        _Column("E_p[r]", "k", lambda g: _with_tail(g.mean_r, g.mean_r_k)),
        _Column("E_q[1/r]", "k", lambda g: _with_tail(g.mean_inverse_r, g.mean_inverse_r_k)),
        _Column("ESS of", f"{low}/{high}", lambda g: _per(g.ess)),
        _Column("log Z", "nats", lambda g: _number(g.log_z, 2)),
        _Column("needed", "M", lambda g: ">" * g.needs_more + _number(g.proposals_needed, 0)),
        _Column("missing", "JSD", lambda g: _number(g.missing, 3), optional=True),
        _Column("train", "gap", lambda g: _number(g.train_gap, 3), optional=True),
    ]


def _kl(group: GroupReport) -> str:
    """E_q[log r], or the bound that no scale of log r can change where that is higher."""
    if group.kl_bound > group.kl + _KL_DIFFERS:
        return f"≥{_number(group.kl_bound, 1)}"
    return _number(group.kl, 2)


def _number(value: float, digits: int) -> str:
    """Formats a number in at most 6 characters, 7 with a sign."""
    if math.isnan(value):
        return "-"
    if not abs(value) < 99_999.5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.{max(0, min(digits, 4 - len(f'{abs(value):.0f}')))}f}"


def _with_error(value: float, error: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return (
        f"{_number(value, digits)}±{_number(error, digits if error < 1 else 1).removeprefix('0')}"
    )


def _with_tail(mean: float, k: float) -> str:
    if math.isnan(mean):
        return "-"
    number = _number(mean, 2)
    shape = _number(k, 1 if abs(k) < 10 else 0)
    return f"({number}) {shape}" if k > UNRELIABLE_K else f"{number} {shape:>3}"


def _per(ess: Mapping[int, float]) -> str:
    return (
        "-" if any(map(math.isnan, ess.values())) else "/".join(f"{v:.0f}" for v in ess.values())
    )


def _ranges(groups: list[int]) -> str:
    """Formats ascending numbers as ranges, such as 0-3, 7."""
    ranges: list[list[int]] = []
    for k in groups:
        if ranges and ranges[-1][-1] == k - 1:
            ranges[-1] = [ranges[-1][0], k]
        else:
            ranges.append([k])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)


def _wrap(text: str) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ")
