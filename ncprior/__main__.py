"""Command line of the package: ``ncprior demo``, ``improve``, ``sample`` and others.

Only functions that run a command import torch: ``--help`` and errors in options answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import ncprior
from ncprior import _help_texts

_IMPORTED = time.time()

_EXPECTED = (ArithmeticError, ImportError, LookupError, OSError, TypeError, ValueError)

_New: TypeAlias = Callable[..., argparse.ArgumentParser]  # makes the parser of a command


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
    options = _parser().parse_args(arguments)
    path = sys.path.copy()
    try:
        status: int = options.run(options)
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
    return status


def _goes_on(options: argparse.Namespace) -> bool:
    """Whether an interrupted command has left work that the same command takes up again."""
    if not hasattr(options, "kept"):
        return False
    from ncprior.saving.folders import folder_at

    return folder_at(options.out).has(options.kept)


def _demo(options: argparse.Namespace) -> int:
    from ncprior.demo.run import run_demo

    result = run_demo(options.data, out=options.out, seed=options.seed, started=_started())
    if options.json:
        print(json.dumps(result))
    else:
        print(result["summary"])
    return 0


def _improve(options: argparse.Namespace) -> int:
    from ncprior.utils.random_state import seeded
    from ncprior.utils.user_code import load_object

    with seeded(options.seed):
        prior = ncprior.improve(
            load_object(options.source),
            _data(options.data),
            held_out=_data(options.held_out),
            budget=options.budget,
            max_seconds=options.max_seconds,
            seed=options.seed,
            checkpoint=options.out / options.kept,
        )
    prior.save_pretrained(options.out)
    prior.report.save_html(options.out / "report.html")
    shutil.rmtree(options.out / options.kept, ignore_errors=True)
    print(f"{prior.report.verdict} {options.out}, {prior.report.seconds:.0f} s")
    return 0


def _report(options: argparse.Namespace) -> int:
    from ncprior.recipe.measure import report_on

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

    started, number = time.monotonic(), -(-options.num_samples // max(1, options.part_size))
    first, step = options.parts
    condition = _data(options.condition)
    condition = condition.to_numpy() if hasattr(condition, "to_numpy") else condition
    with _loaded(options) as prior:
        if options.proposals is not None:
            prior.sampler = partial(ncprior.sir, num_proposals=options.proposals)
        if prior.sampler is None:
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
        )
    ends = ((k + 1) * options.part_size for k in range(first, number, step))
    drawn = sum(options.part_size - max(0, end - options.num_samples) for end in ends)
    samples, files = _counted(drawn, "sample"), _counted(number, "part")
    files = files if step == 1 else f"{len(parts):,} of {files}"
    print(f"{samples} in {options.out}, {files}, {time.monotonic() - started:.0f} s")
    return 0


def _share(text: str) -> tuple[int, int]:
    """The number of this process and of all processes, such as ``3/100``."""
    first, _, step = text.partition("/")
    if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"must be I/N with I < N, such as 0/100; got {text!r}")
    return int(first), int(step)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def _loaded(options: argparse.Namespace) -> Iterator[ncprior.NCPrior]:
    """The saved prior on the user's VAE; random generators are put back at the end."""
    import torch

    from ncprior.source import require_source
    from ncprior.utils.require import require_counts
    from ncprior.utils.user_code import load_object

    require_counts("(-1e18, 1e18)", seed=options.seed)
    with torch.random.fork_rng():
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


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "ncprior", description=_help_texts.DESCRIPTION, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"ncprior {ncprior.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_improve, _add_diagnose, _add_sample, _add_report, _add_inspect):
        add(partial(commands.add_parser, formatter_class=raw))
    return parser


def _add_demo(new: _New) -> None:
    demo = new(
        "demo",
        help="train a small VAE on digits and close its prior hole",
        description="Trains a small VAE on real digits, measures its prior hole, and improves its "
        "prior. Writes pictures of samples, a report, the VAE and the new prior.",
        epilog=_help_texts.DEMO,
    )
    demo.add_argument(
        "--data",
        choices=("digits", "mnist"),
        default="digits",
        help="scikit-learn's 8×8 digits, or MNIST from $NCPRIOR_DATA or the Hub; "
        "default: %(default)s",
    )
    _add_out(demo, "ncprior-demo")
    _add_seed(demo, "all random numbers")
    demo.add_argument("--json", action="store_true", help="print only one JSON object")
    demo.set_defaults(run=_demo)


def _add_improve(new: _New) -> None:
    improve = new(
        "improve",
        help="find a better prior for your VAE, with a report",
        description="Chooses a base, trains heads on it, chooses a sampler, and measures how much "
        "better the new prior is. Every choice is printed with its numbers.",
        epilog=_help_texts.IMPROVE,
    )
    improve.add_argument("source", metavar="WHERE:NAME", help="the VAE, a source")
    _add_object(improve, "--data", "training data of the VAE", required=True)
    _add_object(improve, "--held-out", "data that the VAE was not trained on")
    words = "evaluations of each head per sample, 2 or more; default: %(default)s"
    improve.add_argument("--budget", type=int, default=50, metavar="N", help=words)
    words = "time for all of it; default: until nothing improves"
    improve.add_argument("--max-seconds", type=float, metavar="S", help=words)
    _add_out(improve, "my-prior")
    _add_seed(improve, "all random numbers")
    improve.set_defaults(run=_improve, kept="checkpoints")


def _add_report(new: _New) -> None:
    report = new(
        "report",
        help="write a page with pictures and measurements of a saved prior",
        description="Measures a saved prior on held-out data, and writes one HTML page.",
        epilog=_help_texts.REPORT,
    )
    _add_prior(report)
    _add_object(report, "--source", "the VAE, a source", required=True)
    _add_object(report, "--data", "held-out data", required=True)
    _add_object(report, "--train", "training data, to measure more of the gap")
    words = "proposals in the diagnosis, and of SIR if no sampler was saved; default: %(default)s"
    report.add_argument("--budget", type=int, default=500, metavar="N", help=words)
    words = "the page; default: %(default)s"
    report.add_argument("--out", type=Path, default=Path("report.html"), help=words)
    _add_seed(report, "the draws")
    report.set_defaults(run=_report)


def _add_diagnose(new: _New) -> None:
    diagnose = new(
        "diagnose",
        help="report on the heads of a saved prior, for your VAE and held-out data",
        description="Prints a report on the heads of a saved prior: one line per group of "
        "latents, with loss, calibration, effective sample size and a verdict.",
        epilog=_help_texts.DIAGNOSE,
    )
    _add_prior(diagnose)
    _add_object(diagnose, "--source", "the VAE, a source", required=True)
    _add_object(diagnose, "--data", "held-out data", required=True)
    _add_object(diagnose, "--train", "training data, to detect memorisation")
    diagnose.add_argument(
        "--proposals",
        type=int,
        nargs=2,
        default=(50, 500),
        metavar="M",
        help="two numbers of proposals for the ESS",
    )
    _add_seed(diagnose, "the samples")
    diagnose.add_argument(
        "--plot", type=Path, metavar="FILE", help="also write the report as a picture"
    )
    diagnose.add_argument("--json", action="store_true", help="print the report as JSON")
    diagnose.set_defaults(run=_diagnose)


def _add_sample(new: _New) -> None:
    sample = new(
        "sample",
        help="draw samples of a saved prior into files",
        description="Draws samples of a saved prior, decoded by your VAE, into a folder.",
        epilog=_help_texts.SAMPLE,
    )
    _add_prior(sample)
    _add_object(sample, "--source", "the VAE, a source", required=True)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    words = "number of samples; default: %(default)s"
    sample.add_argument("-n", "--num-samples", default=1000, help=words, **number)
    words = "output folder, or a URL such as s3://bucket/samples; default: %(default)s"
    sample.add_argument("--out", default="samples", help=words)
    _add_seed(sample, "the samples")
    words = "draw by SIR with M proposals instead of the saved sampler"
    sample.add_argument("--proposals", type=int, metavar="M", help=words)
    words = "draw x from p(x | z) instead of its mean, as for tables and counts"
    sample.add_argument("--draw-x", action="store_true", help=words)
    _add_object(sample, "--condition", "condition of a conditional VAE, one row per sample")
    words = "samples per file; default: %(default)s"
    sample.add_argument("--part-size", default=1000, help=words, **number)
    words = "samples drawn at once, which bounds the memory; default: a whole file"
    sample.add_argument("--batch-size", help=words, **number)
    words = "draw part I and every Nth after it, in one of N processes; I is 0, 1, … N - 1"
    sample.add_argument("--parts", type=_share, default=(0, 1), metavar="I/N", help=words)
    sample.set_defaults(run=_sample, kept="job.json")


def _add_inspect(new: _New) -> None:
    inspect = new(
        "inspect",
        help="show the configuration of a saved prior, without running code from it",
        description="Prints the configuration of a saved prior as JSON: groups, kinds of heads, "
        "strength, sampler and fingerprint. It reads the header of one safetensors file and runs no code.",
        epilog=_help_texts.INSPECT,
    )
    _add_prior(inspect)
    inspect.set_defaults(run=_inspect)


def _add_prior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path_or_repo", help="a folder, a file, or a repository of the Hugging Face Hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository")


def _add_object(
    parser: argparse.ArgumentParser, name: str, words: str, *, required: bool = False
) -> None:
    parser.add_argument(name, required=required, metavar="WHERE:NAME", help=words)


def _add_out(parser: argparse.ArgumentParser, folder: str) -> None:
    words = "output folder; default: %(default)s"
    parser.add_argument("--out", type=Path, default=Path(folder), help=words)


def _add_seed(parser: argparse.ArgumentParser, whose: str) -> None:
    words = f"seed of {whose}; default: %(default)s"
    parser.add_argument("--seed", type=int, default=0, help=words)


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
