"""Command line of the package: ``ncprior demo``, ``improve``, ``sample`` and others.

Only functions that run a command import torch: ``--help`` and errors in options answer at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ncprior
from ncprior._commands import parser

_IMPORTED = time.time()

_EXPECTED = (ArithmeticError, ImportError, LookupError, OSError, TypeError, ValueError)

_KEPT = {"improve": ".ncprior-improve", "sample": "job.json"}  # in --out, for the next attempt


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Arguments:
        arguments: The command line without the program's name; ``sys.argv`` if ``None``.

    Returns:
        Exit status: 0 after success, 1 after an error in the arguments or files, 2 after an error in
        the user's own Python code, 130 after an interruption.

    Example:
        >>> main(["inspect", "no-such-file.safetensors"])  # the reason is on standard error
        1
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that it cannot show is no error
            stream.reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    path = sys.path.copy()
    try:
        with _progress_bars(not getattr(options, "quiet", False)):
            return _RUN[options.command](options)
    except KeyboardInterrupt:
        again = ". Run the same command again to go on" if _goes_on(options) else ""
        print(f"ncprior: interrupted; no incomplete file is left{again}", file=sys.stderr)
        return 130
    except (Exception, SystemExit) as error:
        from ncprior.utils.user_code import line_of_the_user

        line = line_of_the_user(error)
        if line is None and not isinstance(error, _EXPECTED):
            raise
        message = " ".join(str(error).split())
        if line is not None or isinstance(error, KeyError) or not message:
            message = f"{line or ''}{type(error).__name__}: {message}"
        print(f"ncprior: {message}", file=sys.stderr)
        return 1 if line is None else 2
    finally:
        sys.path[:] = path


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Context without progress bars, also of downloads, if they are not shown."""
    if shown:
        yield
        return
    from huggingface_hub import utils

    hidden = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            utils.enable_progress_bars()


def _goes_on(options: argparse.Namespace) -> bool:
    """Whether an interrupted command has left work that the same command takes up again."""
    if options.command not in _KEPT:
        return False
    from ncprior.saving.folders import folder_at

    return folder_at(options.out).has(_KEPT[options.command])


def _demo(options: argparse.Namespace) -> int:
    from ncprior.demo.run import run_demo

    given = {"out": options.out, "seed": options.seed, "progress": not options.quiet}
    result = run_demo(options.data, **given, started=_started())
    if options.json:
        print(json.dumps(result))
    else:
        print(result["summary"])
    return 0


def _improve(options: argparse.Namespace) -> int:
    from ncprior.recipe.files import OWN_FILES
    from ncprior.recipe.page import require_replaceable
    from ncprior.saving.folders import WorkFolder
    from ncprior.utils.random_state import seeded
    from ncprior.utils.user_code import load_object

    work = WorkFolder(options.out / _KEPT["improve"], OWN_FILES)
    work.require_own()
    page = options.out / "report.html"
    require_replaceable(page)
    with seeded(options.seed):
        prior = ncprior.improve(
            load_object(options.source),
            _data(options.data),
            held_out=_data(options.held_out),
            budget=options.budget,
            max_seconds=options.max_seconds,
            seed=options.seed,
            checkpoint=work.path,
            progress=not options.quiet,
        )
    prior.save_pretrained(options.out)
    prior.report.save_html(page)
    work.remove()
    print(f"{prior.report.verdict} {options.out}, {prior.report.seconds:.0f} s")
    return 0


def _report(options: argparse.Namespace) -> int:
    from ncprior.recipe.measure import report_on
    from ncprior.recipe.page import require_replaceable

    require_replaceable(options.out)
    with _loaded(options) as prior:
        if prior.sampler is None:
            prior.sampler = partial(ncprior.sir, num_proposals=options.budget)
        data, train = _data(options.data), _data(options.train)
        report = report_on(prior, data, train=train, budget=options.budget, seed=options.seed)
    report.save_html(options.out)
    print(f"{report.verdict} {options.out}, {report.seconds:.0f} s")
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    from ncprior.diagnostics.diagnose import diagnose
    from ncprior.utils.random_state import seeded

    with _loaded(options) as prior:
        data, train = _data(options.data), _data(options.train)
        with seeded(options.seed):
            report = diagnose(prior, data, train=train, num_proposals=tuple(options.proposals))
    if options.plot is not None:
        report.plot().savefig(options.plot)
    print(report.to_json() if options.json else report)
    return 0


def _sample(options: argparse.Namespace) -> int:
    from ncprior.jobs import sample_parts
    from ncprior.saving.identity import heads_on

    started, number = time.monotonic(), -(-options.num_samples // max(1, options.part_size))
    first, step = options.parts
    condition = _data(options.condition)
    condition = condition.to_numpy() if hasattr(condition, "to_numpy") else condition
    with _loaded(options) as prior:
        if options.proposals is not None:
            prior.sampler = partial(ncprior.sir, num_proposals=options.proposals)
        if prior.sampler is None and any(heads_on(prior)):
            raise ValueError(
                f"{options.path_or_repo} was saved without a sampler. Pass --proposals 500, or set "
                f"prior.sampler in Python and save the prior again."
            )
        parts = sample_parts(
            prior,
            options.out,
            num_samples=options.num_samples,
            part_size=options.part_size,
            batch_size=options.batch_size,
            draw_x=options.draw_x,
            seed=options.seed,
            condition=condition,
            parts=range(first, number, step),
            progress=not options.quiet,
        )
    ends = ((k + 1) * options.part_size for k in range(first, number, step))
    drawn = sum(options.part_size - max(0, end - options.num_samples) for end in ends)
    samples, files = _counted(drawn, "sample"), _counted(number, "part")
    files = files if step == 1 else f"{len(parts):,} of {files}"
    print(f"{samples} in {options.out}, {files}, {time.monotonic() - started:.0f} s")
    return 0


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def _loaded(options: argparse.Namespace) -> Iterator[ncprior.NCPrior]:
    """The saved prior on the user's VAE; random generators are put back at the end."""
    from ncprior.source import require_source
    from ncprior.utils.random_state import seeded
    from ncprior.utils.require import require_counts
    from ncprior.utils.user_code import load_object

    require_counts("(-1e18, 1e18)", seed=options.seed)
    with seeded(options.seed):
        source = load_object(options.source)
        require_source(source)
        path, revision = options.path_or_repo, options.revision
        yield ncprior.NCPrior.from_pretrained(source, path, revision=revision)


def _data(where: str | None) -> Any:  # noqa: ANN401
    from ncprior.utils.user_code import load_data

    return None if where is None else load_data(where)


def _inspect(options: argparse.Namespace) -> int:
    from ncprior.saving.heads import inspect

    configuration = inspect(options.path_or_repo, revision=options.revision)
    print(json.dumps(configuration, indent=2))
    return 0


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "improve": _improve,
    "report": _report,
    "diagnose": _diagnose,
    "sample": _sample,
    "inspect": _inspect,
}


def _started() -> float:
    """Start of this process in seconds since the epoch, before all imports."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):  # not Linux: since the import of this module
        return _IMPORTED


if __name__ == "__main__":
    sys.exit(main())
