"""What :func:`ncprior.diagnostics.diagnose` finds, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from ncprior.calibration import Reliability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GroupReport", "Report", "Verdict"]

_WIDTH = 100  # columns of the table
_UNRELIABLE_K = 0.7  # Vehtari et al. (2024): above it, averages of weights do not settle


class Verdict(str, Enum):
    """What is to be said of one group, in plain words.

    Example:
        >>> print(Verdict.GOOD)
        head is good
        >>> Verdict.TOO_FEW.advice[:29]
        'Give sir as many proposals as'
    """

    GOOD = "head is good"
    MATCHES = "base already matches"
    CONSTANT = "base already matches, or the head is untrained"
    TOO_FEW = "too few proposals"
    OVER_CONFIDENT = "head over-confident"
    TOO_FLAT = "head too flat"
    MEMORISES = "head memorises"
    TOO_WIDE = "gap too wide, use a closer base"
    OFF = "off"

    def __str__(self) -> str:
        return str(self.value)

    @property
    def advice(self) -> str:
        """What to do about it, in one sentence."""
        return _ADVICE[self]


_ADVICE = {
    Verdict.GOOD: "Sample with sir, with at least the proposals needed.",
    Verdict.MATCHES: (
        "The head finds no difference that is worth correcting: leave the group to the base "
        "(prior.active[k] = False)."
    ),
    Verdict.CONSTANT: (
        "log r is constant, which cannot tell the two apart: train the head, then diagnose again."
    ),
    Verdict.TOO_FEW: (
        "Give sir as many proposals as the table says are needed, or let recommend_sampler pick "
        "another sampler."
    ),
    Verdict.OVER_CONFIDENT: (
        "Its log r is larger than held-out data bear out: train with early stopping, dropout or "
        "more data, or rescale it: fit(..., calibrate=True)."
    ),
    Verdict.TOO_FLAT: (
        "Its log r is smaller than held-out data bear out: train longer or with a larger head, "
        "or rescale it: fit(..., calibrate=True)."
    ),
    Verdict.MEMORISES: (
        "It tells its training data from the prior, new data less so: train with more data, a "
        "smaller head, dropout or weight decay, and stop by held-out data."
    ),
    Verdict.TOO_WIDE: (
        "No practical number of proposals bridges it: fit a base to the aggregate posterior, such "
        "as a Gaussian mixture, and train the head on that."
    ),
    Verdict.OFF: (
        "The head is not used: the group is not active, the strength is 0, or the prior is "
        "disabled."
    ),
}


class GroupReport(NamedTuple):
    """One group's report. What was not measured is NaN; ``_error`` is one standard error.

    Attributes:
        group: k, from 0.
        verdict: What is to be said of it; ``verdict.advice`` says what to do.
        nce_loss: L*, the plain NCE loss on held-out data, in nats.
        nce_loss_error: Its standard error.
        jsd: log 2 - L*/2 in nats: the Jensen-Shannon divergence of posterior and prior if log r is
            exact, a lower bound of it otherwise; from 0 to 0.693, negative for a harmful head.
        jsd_error: Its standard error.
        kl: E_q[log r] in nats: KL(q || p) if log r is exact.
        kl_error: Its standard error.
        identity: E_q[D] + E_p[D] with D = σ(log r), a pure number: 1 if log r is exact.
        identity_error: Its standard error.
        slope: a of the recalibration a·log r + b: 1 calibrated, below over-confident, above flat.
        slope_error: Its standard error.
        offset: b in nats; no sampler sees it.
        offset_error: Its standard error.
        mean_r: E_p[r], a pure number: 1 if log r is exact and ``mean_r_k`` below 0.7.
        mean_r_k: Pareto k̂ of r under p.
        mean_inverse_r: E_q[1/r], a pure number: 1 if log r is exact, ``mean_inverse_r_k`` is below
            0.7 and q is nowhere zero.
        mean_inverse_r_k: Pareto k̂ of 1/r under q.
        ess: Mean effective sample size of SIR, in proposals, for each number of proposals
            M; from 1 to M.
        log_z: Mean log (1/M) Σ r at the larger M, in nats: log Z, from below.
        log_z_error: Its standard error.
        proposals_needed: exp(KL + sd_q[log r]) of the recalibrated log r: the order of M from which
            SIR is close to q. At most 10⁹.
        train_loss: The plain NCE loss on training data, in nats.
        train_gap: Held-out less training loss, in nats.
        train_gap_error: Its standard error.
        has_context: Whether the group has a context: rows then have targets of their own.
        has_gradient: Whether Langevin dynamics can walk in the group's prior.
        num_components: Components of the base where it is a Gaussian mixture, else 1.
        num_factors: Heads that are multiplied, each of which an evaluation of log r costs.
        reliability: The reliability curve, ``None`` for a head that is off.

    Example:
        >>> GroupReport(0, Verdict.OFF).proposals_needed  # the base's own draw
        1
    """

    group: int
    verdict: Verdict
    nce_loss: float = math.nan
    nce_loss_error: float = math.nan
    jsd: float = math.nan
    jsd_error: float = math.nan
    kl: float = math.nan
    kl_error: float = math.nan
    identity: float = math.nan
    identity_error: float = math.nan
    slope: float = math.nan
    slope_error: float = math.nan
    offset: float = math.nan
    offset_error: float = math.nan
    mean_r: float = math.nan
    mean_r_k: float = math.nan
    mean_inverse_r: float = math.nan
    mean_inverse_r_k: float = math.nan
    ess: Mapping[int, float] = {}
    log_z: float = math.nan
    log_z_error: float = math.nan
    proposals_needed: int = 1
    train_loss: float = math.nan
    train_gap: float = math.nan
    train_gap_error: float = math.nan
    has_context: bool = False
    has_gradient: bool = False
    num_components: int = 1
    num_factors: int = 1
    reliability: Reliability | None = None


class Report(NamedTuple):
    """The report of all groups; ``print(report)`` shows it as a table.

    Attributes:
        groups: One report per group.
        num_rows: Rows of held-out data.
        num_draws: Draws of z per group, from the posterior and from the prior each.
        num_proposals: The two M of the effective sample sizes.

    Example:
        >>> print(Report((GroupReport(0, Verdict.OFF),), 100, 8200, (50, 500)).groups[0].verdict)
        off
    """

    groups: tuple[GroupReport, ...]
    num_rows: int
    num_draws: int
    num_proposals: tuple[int, int]

    def __str__(self) -> str:
        low, high = self.num_proposals
        columns = [c for c in _columns(low, high) if c.wanted(self.groups)]
        cells = [[c.cell(g) for c in columns] for g in self.groups]
        table = [[c.title for c in columns], [c.unit for c in columns], *cells]
        widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
        space = "  " if sum(widths) + 2 * len(widths) <= _WIDTH else " "
        lines = [
            space.join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True))
            for row in table
        ]
        count = f"{self.num_draws:,} draws of z per group from {self.num_rows:,} held-out rows"
        notes = [f"{count}, ± one standard error. {_LEGEND}", *self._verdicts()]
        return "\n".join([*lines, "", *(_wrap(note) for note in notes)])

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON-able values; what is not finite is ``None``.

        Example:
            >>> report = Report((GroupReport(0, Verdict.OFF),), 100, 8200, (50, 500))
            >>> report.to_dict()["groups"][0]["kl"] is None
            True
        """
        plain = _plain(self)
        for group, record in zip(self.groups, plain["groups"], strict=True):
            record["advice"] = group.verdict.advice
        result: dict[str, Any] = plain
        return result

    def to_json(self) -> str:
        """Returns :meth:`to_dict` as JSON.

        Example:
            >>> json = Report((GroupReport(0, Verdict.OFF),), 100, 8200, (50, 500)).to_json()
            >>> '"verdict": "off"' in json
            True
        """
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def plot(self) -> Figure:
        """Draws JSD, KL and ESS per group as bars, and the reliability curves.

        Returns:
            A figure, to show or save: ``report.plot().savefig("report.png")``.

        Raises:
            ImportError: If matplotlib is not installed.

        Example:
            >>> report = Report((GroupReport(0, Verdict.OFF),), 100, 8200, (50, 500))
            >>> len(report.plot().axes)
            4
        """
        from ncprior.report_plot import plot_report

        return plot_report(self)

    def _verdicts(self) -> list[str]:
        lines = []
        for verdict in Verdict:
            groups = [g.group for g in self.groups if g.verdict is verdict]
            if groups:
                name = "group" if len(groups) == 1 else "groups"
                lines.append(f"{name} {_ranges(groups)}: {verdict}. {verdict.advice}")
        return lines


_LEGEND = (
    "Calibrated: slope 1, and E_q[D] + E_p[D] = 1. E_p[r] and E_q[1/r] stand beside the shape k of "
    "their Pareto tail; in parentheses, where k is above 0.7, they mean nothing."
)


class _Column(NamedTuple):
    title: str
    unit: str
    cell: Callable[[GroupReport], str]
    optional: bool = False  # shown only where some group has a value

    def wanted(self, groups: tuple[GroupReport, ...]) -> bool:
        return not self.optional or any(self.cell(g) != "-" for g in groups)


def _columns(low: int, high: int) -> list[_Column]:
    return [
        _Column("group", "", lambda g: str(g.group)),
        _Column("NCE loss", "nats", lambda g: _with_error(g.nce_loss, g.nce_loss_error, 3)),
        _Column("JSD", "nats", lambda g: _number(g.jsd, 3)),
        _Column("KL", "nats", lambda g: _number(g.kl, 2)),
        _Column("slope", "", lambda g: _with_error(g.slope, g.slope_error, 2)),
        _Column("E[D]", "q + p", lambda g: _number(g.identity, 2)),
        _Column("E_p[r]", "k", lambda g: _with_tail(g.mean_r, g.mean_r_k)),
        _Column("E_q[1/r]", "k", lambda g: _with_tail(g.mean_inverse_r, g.mean_inverse_r_k)),
        _Column("ESS of", f"{low}/{high}", lambda g: _per(g.ess)),
        _Column("log Z", "nats", lambda g: _number(g.log_z, 2)),
        _Column("needed", "M", lambda g: _number(g.proposals_needed, 0)),
        _Column("train", "gap", lambda g: _number(g.train_gap, 3), optional=True),
    ]


def _number(value: float, digits: int) -> str:
    """A number in at most 6 characters, 7 with a sign."""
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
    return f"({number}) {shape}" if k > _UNRELIABLE_K else f"{number} {shape:>3}"


def _per(ess: Mapping[int, float]) -> str:
    return (
        "-" if any(map(math.isnan, ess.values())) else "/".join(f"{v:.0f}" for v in ess.values())
    )


def _ranges(groups: list[int]) -> str:
    """Ascending numbers in words: 0-3, 7."""
    words: list[list[int]] = []
    for k in groups:
        if words and words[-1][-1] == k - 1:
            words[-1] = [words[-1][0], k]
        else:
            words.append([k])
    return ", ".join("-".join(map(str, word)) for word in words)


def _wrap(text: str) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ")


def _plain(value: Any) -> Any:  # noqa: ANN401
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Verdict) else value
