"""The report of the fuzz suite: the counts, and with ``--slow`` all findings in groups."""

from __future__ import annotations

import sys
from typing import Any

# Without examples: a search for doctests would fill the table of calls a second time.
collect_ignore_glob = ["calls*.py", "files.py", "kinds.py", "rule.py", "values.py", "world.py"]
if sys.platform != "linux":  # limits of memory and forked processes
    collect_ignore_glob.append("test_*.py")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what was called, how it ended and what was found, most severe first."""
    rule: Any = sys.modules.get("fuzz.rule")
    if rule is None or not rule.TALLY:
        return
    terminalreporter.section("fuzz")
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(rule.TALLY.items()))
    terminalreporter.write_line(counts)
    terminalreporter.write_line(f"{len(rule.FOUND)} findings")
    for finding in sorted(rule.FOUND, key=lambda found: rule.SEVERITY.index(found.kind)):
        terminalreporter.write_line(f"- {finding}")
