"""Command line of the package: ``ncprior demo``, ``diagnose``, ``sample`` and ``inspect``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

import ncprior
from ncprior.source import require_source
from ncprior.utils.require import require_counts
from ncprior.utils.user_code import line_of_the_user, load_data, load_object

_IMPORTED = time.time()

_EXPECTED = (ArithmeticError, ImportError, LookupError, OSError, TypeError, ValueError)

_New: TypeAlias = Callable[..., argparse.ArgumentParser]  # makes the parser of a command

_DESCRIPTION = """\
Better priors for pretrained VAEs by noise contrastive estimation.

Examples:
  ncprior demo                            train and improve a small VAE of digits, about a minute
  ncprior demo --data mnist               the same on MNIST, some minutes
  ncprior diagnose my-prior --source my_vae.py:source --data my_vae.py:held_out
                                          measure the quality of the heads of a saved prior
  ncprior sample my-prior --source my_vae.py:source -n 1000 --out samples
                                          draw samples into files; run it again to go on
  ncprior inspect user/my-prior           show the configuration of a saved prior

`ncprior COMMAND --help` explains the options of a command.
"""

_DEMO = """\
Examples:
  ncprior demo
  ncprior demo --data mnist --seed 1 --out mnist-demo
"""

_DIAGNOSE = """\
The VAE and the data are your Python objects, given as FILE.py:NAME or MODULE:NAME. For --source,
NAME is a LatentSource. For --data and --train, NAME is a tensor, an array or table of numbers, a
dataset or a DataLoader. NAME can also be a function without arguments that returns the object. The
file is imported, so its code runs as with `python FILE.py`; a module is also looked for in the
working folder. No code from PATH_OR_REPO is run.

Example my_vae.py:

    source = SingleGroup(prior, posterior, vae.decode, module=vae)
    def held_out():
        return torch.load("held_out.pt", weights_only=True)

Examples:
  ncprior diagnose my-prior --source my_vae.py:source --data my_vae.py:held_out
  ncprior diagnose user/my-prior --source my_vae.py:source --data my_vae.py:held_out \\
      --plot report.png
"""

_SAMPLE = """\
The VAE is your Python object, given as FILE.py:NAME or MODULE:NAME: a LatentSource, or a function
without arguments that returns one. The file is imported, so its code runs as with `python FILE.py`.
No code from PATH_OR_REPO is run.

Samples are drawn by the sampler that was saved with the prior:

    prior.sampler = recommend_sampler(diagnose(prior, held_out), budget=50).sampler
    prior.save_pretrained("my-prior")

The folder has one safetensors file per part, with the samples x and their latents z_0, z_1, …
If the command was interrupted, run it again: it draws the missing parts only. Read the samples by

    from ncprior.jobs import read_parts
    x = torch.cat([part["x"] for part in read_parts("samples")])

Examples:
  ncprior sample my-prior --source my_vae.py:source
  ncprior sample user/my-prior --source my_vae.py:source -n 50000 --out fid-samples --seed 1
  ncprior sample my-prior --source my_vae.py:source --proposals 500 --batch-size 100
  ncprior sample my-prior --source my_vae.py:source -n 64 --condition my_vae.py:labels
"""

_INSPECT = """\
Examples:
  ncprior inspect my-prior
  ncprior inspect user/my-prior --revision v1
"""


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
        print("ncprior: interrupted; no incomplete file is left", file=sys.stderr)
        return 130
    except (Exception, SystemExit) as error:
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


def _demo(options: argparse.Namespace) -> int:
    from ncprior.demo.run import run_demo

    result = run_demo(options.data, out=options.out, seed=options.seed, started=_started())
    if options.json:
        print(json.dumps(result))
    else:
        print(result["summary"])
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    from ncprior.diagnostics.diagnose import diagnose
    from ncprior.utils.random_state import seeded

    require_counts("(-1e18, 1e18)", seed=options.seed)
    with torch.random.fork_rng():
        source, data = load_object(options.source), load_data(options.data)
        require_source(source)
        train = None if options.train is None else load_data(options.train)
        prior = _loaded(options, source)
        with seeded(options.seed):
            report = diagnose(prior, data, train=train, num_proposals=tuple(options.proposals))
    if options.plot is not None:
        report.plot().savefig(options.plot)
    print(report.to_json() if options.json else report)
    return 0


def _sample(options: argparse.Namespace) -> int:
    from ncprior.jobs import sample_parts

    started = time.monotonic()
    with torch.random.fork_rng():
        source = load_object(options.source)
        require_source(source)
        condition = None if options.condition is None else load_data(options.condition)
        prior = _loaded(options, source)
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
        )
    samples, files = _counted(options.num_samples, "sample"), _counted(len(parts), "part")
    print(f"{samples} in {options.out}, {files}, {time.monotonic() - started:.0f} s")
    return 0


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _loaded(options: argparse.Namespace, source: Any) -> ncprior.NCPrior:  # noqa: ANN401
    path, revision = options.path_or_repo, options.revision
    return ncprior.NCPrior.from_pretrained(source, path, revision=revision)


def _inspect(options: argparse.Namespace) -> int:
    from ncprior.saving.heads import inspect

    configuration = inspect(options.path_or_repo, revision=options.revision)
    print(json.dumps(configuration, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ncprior", description=_DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"ncprior {ncprior.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_diagnose, _add_sample, _add_inspect):
        add(partial(commands.add_parser, formatter_class=raw))
    return parser


def _add_demo(new: _New) -> None:
    demo = new(
        "demo",
        help="train a small VAE on digits and close its prior hole",
        description="Trains a small VAE on real digits, measures its prior hole, and trains a "
        "ratio head on the frozen VAE. Writes pictures of samples, a report and the trained head.",
        epilog=_DEMO,
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


def _add_diagnose(new: _New) -> None:
    diagnose = new(
        "diagnose",
        help="report on the heads of a saved prior, for your VAE and held-out data",
        description="Prints a report on the heads of a saved prior: one line per group of "
        "latents, with loss, calibration, effective sample size and a verdict.",
        epilog=_DIAGNOSE,
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
        epilog=_SAMPLE,
    )
    _add_prior(sample)
    _add_object(sample, "--source", "the VAE, a source", required=True)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    words = "number of samples; default: %(default)s"
    sample.add_argument("-n", "--num-samples", default=1000, help=words, **number)
    _add_out(sample, "samples")
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
    sample.set_defaults(run=_sample)


def _add_inspect(new: _New) -> None:
    inspect = new(
        "inspect",
        help="show the configuration of a saved prior, without running code from it",
        description="Prints the configuration of a saved prior as JSON: groups, kinds of heads, "
        "strength, sampler and fingerprint. It reads the header of one safetensors file and runs no code.",
        epilog=_INSPECT,
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
