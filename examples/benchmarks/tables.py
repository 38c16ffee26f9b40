"""Writes the results of full runs, stored in results/*.json, into the tables of the pages.

    python examples/benchmarks/tables.py            # rewrites the tables of all pages
    python examples/benchmarks/tables.py --check    # exit status 1 if a table is out of date

A table stands between `<!-- table NAME -->` and `<!-- end -->`, where NAME.json is a file of results.
`<!-- table NAME: METHOD; METHOD -->` shows only the rows of these methods. The table `summary` shows
rows of several files: `<!-- table summary: NAME/METHOD; NAME/METHOD -->`.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
PAGES = [
    FOLDER.parents[1] / "README.md",
    FOLDER / "RESULTS.md",
    *sorted((FOLDER.parents[1] / "docs").glob("*.md")),
]
Row = dict[str, Any]

PAPER = {
    "VAE + LARS": 84.82 - 83.03,
    "VAE + SNIS": 84.82 - 82.52,
    "NCP, paper's head": 84.82 - 82.82,
}
PAPER_HIERARCHICAL = {"NCP": 78.67 - 78.10}


def label(row: Row) -> str:
    """Name of a row: its method, or its own name."""
    return str(next(row[key] for key in ("method", "name", "sampler") if key in row))


def by_method(rows: list[Row], kind: str = "model") -> list[list[Row]]:
    """Rows grouped by method and by the key `kind`, in order of appearance; a group holds all seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row.get(kind, "")), []).append(row)
    return list(groups.values())


def over_seeds(values: list[float], digits: int = 2) -> str:
    """Mean over seeds, followed by ± and the standard deviation if there are several."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def likelihood(rows: list[Row], paper: dict[str, float]) -> list[str]:
    """Table of the likelihood benchmarks: one line per method and model."""
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


def interval(group: list[Row], value: str, low: str, high: str) -> str:
    """Mean over seeds with its standard deviation, and in parentheses the mean interval of one seed."""
    ends = " to ".join(f"{mean(row[end] for row in group):.3f}" for end in (low, high))
    return f"{over_seeds([row[value] for row in group], 3)} ({ends})"


def hole(rows: list[Row]) -> list[str]:
    """Table of prior_hole.py: one line per method, with means over seeds."""
    shown = [key for key in COSTS if all(key in row for row in rows)]
    titles = [
        "prior",
        "family",
        "seeds",
        "gap closed",
        "gain over the best without heads",
        *(COSTS[key] for key in shown),
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for group in by_method(rows):
        first, over = group[0], ""
        if all("over_rival" in row for row in group):  # in files of several runs, not of all seeds
            over = interval(group, "over_rival", "over_low", "over_high")
        costs = {key: mean(row[key] for row in group) for key in shown}
        lines.append(
            f"| {first['method']} | {first['family']} | {len(group)} | "
            f"{interval(group, 'gap_closed', 'gap_low', 'gap_high')} | {over} | "
            + " | ".join(f"{cost:{decimals(key, cost)}}" for key, cost in costs.items())
            + " |"
        )
    return lines


def decimals(cost: str, value: float) -> str:
    """Format of a cost: counts are whole, and small numbers have two decimals."""
    return ".2f" if 0 < value < 2 and cost not in COUNTS else ",.0f"


def energies(rows: list[Row]) -> list[str]:
    """Tables of vaebm.py: one line per method and number of steps, then the AUROC of each method."""
    titles = ["model", "steps", "seeds", "D", "D removed", "gap closed", "gain over either alone"]
    titles += ["precision", "recall", "s to fit", "s per 1,000"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for group in by_method(rows, "steps"):
        first = group[0]
        over = (
            interval(group, "over_alone", "over_low", "over_high") if "over_alone" in first else ""
        )
        known = {key: mean(row[key] for row in group) for key in ("fd_cut", *JUDGED)}
        cells = [
            *(first["method"], first["steps"] or "", len(group)),
            over_seeds([row["fd"] for row in group]),
            f"{known['fd_cut']:.0%}",
            interval(group, "gap_closed", "gap_low", "gap_high"),
            over,
            *(f"{known[key]:{form}}" for key, form in JUDGED.items()),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, "", *areas([row for row in rows if row.get("auroc")])]


JUDGED = {"precision": ".2f", "recall": ".2f", "fit_seconds": ",.0f", "seconds_per_1k": ",.1f"}


def areas(rows: list[Row]) -> list[str]:
    """Table of AUROC: one column per out-of-distribution set, with the mean interval of one seed."""
    sets = list(rows[0]["auroc"])
    titles = ["model", *sets, "mean", "gain over the VAE"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for group in by_method(rows, "steps"):
        found = [
            [mean(v) for v in zip(*areas, strict=True)]
            for areas in (
                *([row["auroc"][name] for row in group] for name in sets),
                [row["auroc_gain"] for row in group],
            )
        ]
        cells = [f"{area:.3f} ({low:.3f} to {high:.3f})" for area, low, high in found]
        cells.insert(-1, f"{mean(area for area, *_ in found[:-1]):.3f}")
        lines.append(f"| {group[0]['method']} | {' | '.join(cells)} |")
    return lines


COSTS = {
    "precision": "precision",
    "recall": "recall",
    "head_evaluations": "head evaluations",
    "sample_seconds_per_10k": "s to sample",
    "fit_seconds": "s to fit",
    "stored_numbers": "stored numbers",
    "latent_nn_copy": "copy ratio",
    "near_copies": "near copies",  # in files of newer runs
}
COUNTS = ("head_evaluations", "stored_numbers")


def columns(rows: list[Row], titles: dict[str, tuple[str, str]]) -> list[str]:
    """Table with one line per row and one column per key of `titles`, its title and its format."""
    lines = [
        "| " + " | ".join(title for title, _ in titles.values()) + " |",
        "|---" * len(titles) + "|",
    ]
    for row in rows:
        cells = [
            "" if row.get(key) is None else f"{row[key]:{form}}"
            for key, (_, form) in titles.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


SAMPLING = {
    "name": ("row", ""),
    "proposals": ("M", ",.0f"),
    "batch": ("B", ",.0f"),
    "ms": ("ms", ",.1f"),
    "ratio": ("speed-up", ".2f"),
    "roofline_fraction": ("share of the roofline", ".0%"),
    "peak_mib": ("MiB", ".1f"),
    "baseline_peak_mib": ("MiB, baseline", ".0f"),
    "kl_nats": ("KL of bfloat16, nats", ".0e"),
}
TRAINING = {
    "name": ("row", ""),
    "seconds": ("s", ",.1f"),
    "baseline_seconds": ("s, baseline", ",.1f"),
    "ratio": ("speed-up", ".2f"),
    "loss_cost": ("added loss, nats", ".4f"),
    "ms_per_step": ("ms per step", ",.2f"),
    "peak_mib": ("MiB", ".0f"),
    "baseline_peak_mib": ("MiB, baseline", ".0f"),
}


VAES = {
    "hole_mnist": "MNIST, 16 latents",
    "hole_cifar10": "CIFAR-10, 128 latents",
    "hole_hierarchical": "MNIST, ten groups of 32",
}


def domain(rows: list[Row]) -> list[str]:
    """Table of a domain: one line for all seeds of the same words, one column per number.

    Words are the method and, if there are several, the data or the condition. A number such as
    `auc` whose row has `auc_low` and `auc_high` has its interval in parentheses. The last column, if
    there is one, has the verdicts of the seeds.
    """
    known = {key: row[key] for row in rows for key in row if row[key] is not None}
    words = [key for key, value in known.items() if isinstance(value, str | int)]
    words = [key for key in words if key not in ("seed", "verdict")]
    numbers = [key.removesuffix("_low") for key, value in known.items() if type(value) is float]
    numbers = [key for key in dict.fromkeys(numbers) if not key.endswith("_high")]
    last = [key for key in ("verdict",) if key in known]
    titles = [key.replace("_", " ") for key in (*words, "seeds", *numbers, *last)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(
            tuple("" if row.get(key) is None else str(row[key]) for key in words), []
        ).append(row)
    for labels, group in groups.items():
        cells = [*labels, str(len(group)), *(number(group, key) for key in numbers)]
        cells += [counted([row[key] for row in group]) for key in last]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def equal(rows: list[Row]) -> list[str]:
    """Table of equal_budget.py: every method at its best, without the choices."""
    kept = [row for row in rows if row["kind"] == "method"]
    return domain([{key: row[key] for key in row if key not in ("kind", "name")} for row in kept])


def judged(rows: list[Row]) -> list[str]:
    """Table of judges.py: every method with one reference, then with the other."""
    return domain(sorted(rows, key=lambda row: row["reference"], reverse=True))


def counted(words: list[str]) -> str:
    """Different words, each with how often it occurs if there are several."""
    counts = Counter(words)
    return "; ".join(word if len(counts) == 1 else f"{n} × {word}" for word, n in counts.items())


def number(group: list[Row], key: str) -> str:
    """Mean over seeds of a number, with its interval if the rows have one; empty if unknown."""
    ends = f"{key}_low", f"{key}_high"
    has_ends = all(row.get(end) is not None for row in group for end in ends)
    if any(row.get(key) is None for row in group):  # at most an interval is known
        return (
            " to ".join(f"{mean(row[e] for row in group):.3f}" for e in ends) if has_ends else ""
        )
    if has_ends:
        return interval(group, key, *ends)
    values = [row[key] for row in group]
    return f"{mean(values):,.0f}" if key == "seconds" else over_seeds(values, 3)


def paper_times(rows: list[Row]) -> list[str]:
    """Table of table8.py: times and memory of a sampler beside those of the paper."""
    titles = ["sampler", "images", "how", "s", "s in the paper", "times faster", "GiB"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["sampler"], row["images"], row["how"], f"{row['seconds']:.2f}"]
        cells += [f"{row['paper_seconds']:.2f}", f"{row['times_faster']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['peak_gib']:.2f} |")
    return lines


class Table(NamedTuple):
    """Function from rows to the lines of a table, and the command that measured the rows."""

    lines: Callable[[list[Row]], list[str]]
    command: str


TABLES = {
    "mnist_nll": Table(lambda rows: likelihood(rows, PAPER), "mnist_nll.py"),
    "hierarchical_nll": Table(
        lambda rows: likelihood(rows, PAPER_HIERARCHICAL), "hierarchical_nll.py"
    ),
    "sampling_speed": Table(lambda rows: columns(rows, SAMPLING), "sampling_speed.py"),
    "training_speed": Table(lambda rows: columns(rows, TRAINING), "training_speed.py"),
    "table8": Table(paper_times, "table8.py --device cuda --langevin 5 50"),
    "hole_mnist": Table(hole, "prior_hole.py --data mnist"),
    "hole_digits": Table(hole, "prior_hole.py --data digits"),
    "hole_cifar10": Table(hole, "prior_hole.py --data cifar10"),
    "hole_cifar10_z": Table(hole, "prior_hole.py --data cifar10 --methods 'heads on z'"),
    "vaebm_mnist": Table(energies, "vaebm.py --data mnist"),
    "vaebm_mnist_50": Table(energies, "vaebm.py --data mnist --proposals 50"),
    "vaebm_cifar10": Table(energies, "vaebm.py --data cifar10"),
    "hole_hierarchical": Table(hole, "prior_hole.py --data mnist --model hierarchical"),
    "equal_mnist": Table(equal, "equal_budget.py --data mnist --budget 120"),
    "equal_cifar10": Table(equal, "equal_budget.py --data cifar10 --budget 120"),
    "judges_cifar10": Table(judged, "judges.py --hole equal.json"),
    "equal_hierarchical": Table(
        equal, "equal_budget.py --data mnist --model hierarchical --budget 240"
    ),
    "any_vae": Table(domain, "any_vae.py"),
    "wide_gaps": Table(domain, "wide_gaps.py"),
    "best_prior": Table(domain, "best_prior.py"),
    "domain_cells": Table(domain, "examples/scvi_cells.py"),
    "domain_molecules": Table(domain, "examples/molecules_moses.py"),
    "domain_tables": Table(domain, "examples/tables_adult.py"),
    "domain_codes": Table(domain, "examples/codes_vqvae.py"),
    "domain_trajectories": Table(domain, "examples/trajectories.py"),
}


def results(name: str) -> dict[str, Any]:
    """Content of one file of results: its rows, and the settings and machine of its run."""
    found: dict[str, Any] = json.loads((FOLDER / "results" / f"{name}.json").read_text("utf-8"))
    if found["meta"]["settings"]["quick"]:
        raise SystemExit(f"results/{name}.json is of a --quick run. Make a full one.")
    return found


def selected(name: str, rows: list[Row], shown: list[str]) -> list[Row]:
    """Rows of the methods in `shown`, in the order of the file; all rows if it is empty."""
    missing = set(shown) - {label(row) for row in rows}
    if missing:
        raise SystemExit(f"results/{name}.json has no rows {sorted(missing)}.")
    return [row for row in rows if not shown or label(row) in shown]


def summary(shown: list[str]) -> str:
    """Table of the gap closed by methods of several files, given as NAME/METHOD."""
    titles = ["VAE", "prior", "gap closed", "precision", "recall", "s to fit"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    machines: list[str] = []
    for file, methods in groupby((item.split("/", 1) for item in shown), key=lambda item: item[0]):
        found = results(file)
        machines += found["meta"]["machine"].split("; ")
        for _, method in methods:
            group = selected(file, found["rows"], [method])
            gap = interval(group, "gap_closed", "gap_low", "gap_high")
            precision, recall, seconds = (
                mean(row[key] for row in group) for key in ("precision", "recall", "fit_seconds")
            )
            lines.append(
                f"| {VAES[file]} | {method} | {gap} | {precision:.2f} | {recall:.2f} | "
                f"{seconds:,.0f} |"
            )
    return "\n".join([*lines, "", f"`prior_hole.py`, on {'; '.join(dict.fromkeys(machines))}."])


def render(name: str, words: str) -> str:
    """Table in Markdown of a mark's name and words, with the command and the machine below it."""
    shown = [word.strip() for word in words.lstrip(":").split(";") if word.strip()]
    if name == "summary":
        return summary(shown)
    found = results(name)
    lines = TABLES[name].lines(selected(name, found["rows"], shown))
    return "\n".join([*lines, "", f"`{TABLES[name].command}`, on {found['meta']['machine']}."])


def filled(text: str) -> str:
    """Text of a page with its tables filled in from the current results."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{render(match[2], match[3])}\n{match[4]}"

    marks = r"(<!-- table (\w+)([^>]*?) -->)\n.*?(<!-- end -->)"
    return re.sub(marks, table, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit status 1 if a table is out of date",
    )
    options = parser.parse_args()
    status = 0
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before and options.check:
            print(f"{page} is out of date: python examples/benchmarks/tables.py", file=sys.stderr)
            status = 1
        elif after != before:
            page.write_text(after, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
