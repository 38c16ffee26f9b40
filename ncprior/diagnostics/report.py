"""What :func:`ncprior.diagnostics.diagnose` finds, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.plot import plot_groups
from ncprior.diagnostics.table import _LEGEND, _WIDTH, _columns, _ranges, _wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        return plot_groups(self.groups, self.num_proposals)

    def _verdicts(self) -> list[str]:
        lines = []
        for verdict in Verdict:
            groups = [g.group for g in self.groups if g.verdict is verdict]
            if groups:
                name = "group" if len(groups) == 1 else "groups"
                lines.append(f"{name} {_ranges(groups)}: {verdict}. {verdict.advice}")
        return lines


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
