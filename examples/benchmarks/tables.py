"""Writes the results of full runs, kept in results/*.json, into the README's tables.

    python examples/benchmarks/tables.py            # rewrites README.md
    python examples/benchmarks/tables.py --check    # exit status 1 if that would change it

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is that of a file of results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parents[1] / "README.md"
Row = dict[str, Any]

PAPER = {
    "VAE + LARS": 84.82 - 83.03,
    "VAE + SNIS": 84.82 - 82.52,
    "NCP, paper's head": 84.82 - 82.82,
}
PAPER_HIERARCHICAL = {"NCP": 78.67 - 78.10}


def by_method(rows: list[Row]) -> list[list[Row]]:
    """Rows of one method and model, over seeds, in order of appearance."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["model"]), []).append(row)
    return list(groups.values())


def over_seeds(values: list[float], digits: int = 2) -> str:
    """The mean, and behind ± the standard deviation over seeds."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def likelihood(rows: list[Row], paper: dict[str, float]) -> list[str]:
    """Of the likelihood benchmarks."""
    lines = [
        "| method | measured | seeds | −log p(x), nats | gain, nats | ± images | in the paper | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in by_method(rows):
        first = group[0]
        low, high = (mean(row[end] for row in group) for end in ("nll_lower", "nll_upper"))
        gain = over_seeds([row["gain"] for row in group]) if first["gain"] else ""
        error = f"{mean(row['gain_se'] for row in group):.2f}" if first["gain"] else ""
        theirs = f"{paper[first['method']]:.2f}" if first["method"] in paper else ""
        seconds = f"{mean(row['fit_seconds'] for row in group):.0f}"
        lines.append(
            f"| {first['method']} | {first['model']} | {len(group)} | {low:.2f} to {high:.2f} | "
            f"{gain} | {error} | {theirs} | {seconds} |"
        )
    return lines


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "mnist_nll": lambda rows: likelihood(rows, PAPER),
    "hierarchical_nll": lambda rows: likelihood(rows, PAPER_HIERARCHICAL),
}


def render(name: str) -> str:
    """The table of one file of results, in Markdown, with the machine that made them."""
    found = json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))
    if found["meta"]["settings"]["quick"]:
        raise SystemExit(f"results/{name}.json is of a --quick run. Make a full one.")
    lines = TABLES[name](found["rows"])
    return "\n".join([*lines, "", f"`{name}.py`, on {found['meta']['machine']}."])


def filled(text: str) -> str:
    """A page with its tables as they are now."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{render(match[2])}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, only tell")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if after == before:
        return 0
    if options.check:
        print("README.md is out of date: python examples/benchmarks/tables.py", file=sys.stderr)
        return 1
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
