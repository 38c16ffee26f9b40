"""Report of :func:`ncprior.diagnostics.diagnose`: as a table, as JSON and as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.plot import plot_groups
from ncprior.diagnostics.table import LEGEND, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report(NamedTuple):
    """Diagnostic report on all groups; ``print(report)`` shows it as a table.

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
        count = f"{self.num_draws:,} draws of z per group from {self.num_rows:,} held-out rows"
        note = f"{count}, ± one standard error. {LEGEND}"
        return render(self.groups, self.num_proposals, [note])

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values ready for JSON; non-finite numbers become ``None``.

        Example:
            >>> report = Report((GroupReport(0, Verdict.OFF),), 100, 8200, (50, 500))
            >>> report.to_dict()["groups"][0]["kl"] is None
            True
        """
        values = plain(self)
        for group, record in zip(self.groups, values["groups"], strict=True):
            record["advice"] = group.verdict.advice
        result: dict[str, Any] = values
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
        """Figure of JSD, KL and ESS per group, and of the reliability curves.

        Returns:
            A figure, to show or to save: ``report.plot().savefig("report.png")``.

        Raises:
            ImportError: If matplotlib is not installed.

        Example:
            >>> report = Report((GroupReport(0, Verdict.OFF),), 100, 8200, (50, 500))
            >>> len(report.plot().axes)
            4
        """
        return plot_groups(self.groups, self.num_proposals)


def plain(value: Any) -> Any:  # noqa: ANN401
    """Values ready for JSON: named tuples as dicts, non-finite numbers as ``None``."""
    if hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Verdict) else value
