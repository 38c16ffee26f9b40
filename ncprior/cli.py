"""The ``ncprior`` command: a demonstration, a report on a saved prior, a look into a saved prior."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ncprior

_IMPORTED = time.time()

_DESCRIPTION = """\
Better priors for pretrained VAEs by noise contrastive estimation.

  ncprior demo                            see it work on real digits, in about a minute
  ncprior demo --data mnist               the same on MNIST, in some minutes
  ncprior inspect user/my-prior           what is in a saved prior, without running code from it
  ncprior diagnose my-prior --source my_vae.py:source --data my_vae.py:held_out
                                          is the head good, and how many proposals does it need?
"""

_DIAGNOSE = """\
The VAE and the data are yours: point at them as FILE.py:NAME or MODULE:NAME. NAME is a
LatentSource and what `diagnose` takes as data, or a function without arguments that returns it.
Importing runs that code, as `python FILE.py` would; nothing from PATH_OR_REPO is ever run.

Example my_vae.py:

    source = SingleGroup(prior, posterior, vae.decode, module=vae)
    def held_out():
        return torch.load("held_out.pt", weights_only=True)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Arguments:
        arguments: The command line without the program's name; ``sys.argv`` if ``None``.

    Returns:
        The exit status: 0, or 1 after an error that the user can mend, or 130 when interrupted.

    Example:
        >>> main(["inspect", "no-such-file.safetensors"])  # says why on standard error
        1
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print("ncprior: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except (ArithmeticError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        print(f"ncprior: {error}", file=sys.stderr)
        return 1
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

    with torch.random.fork_rng():
        source, data = _load_object(options.source), _load_object(options.data)
        train = None if options.train is None else _load_object(options.train)
        prior = ncprior.NCPrior.from_pretrained(
            source, options.path_or_repo, revision=options.revision
        )
        torch.manual_seed(options.seed)
        report = diagnose(prior, data, train=train, num_proposals=tuple(options.proposals))
    if options.plot is not None:
        report.plot().savefig(options.plot)
    print(report.to_json() if options.json else report)
    return 0


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

    demo = commands.add_parser(
        "demo",
        help="close the prior hole of a small VAE, trained here on real digits",
        description="Trains a small VAE on real digits, shows its prior hole, trains a ratio head "
        "on the frozen VAE, samples, and writes pictures, a report and the head.",
    )
    demo.add_argument(
        "--data",
        choices=("digits", "mnist"),
        default="digits",
        help="scikit-learn's 8×8 digits (default), or MNIST from $NCPRIOR_DATA or the Hub",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("ncprior-demo"), help="folder to write to: %(default)s"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of everything: %(default)s")
    demo.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    demo.set_defaults(run=_demo)

    diagnose = commands.add_parser(
        "diagnose",
        help="report on the heads of a saved prior, on your VAE and held-out data",
        description="Reports, group by group, how good the heads of a saved prior are.",
        epilog=_DIAGNOSE,
        formatter_class=raw,
    )
    _add_prior(diagnose)
    diagnose.add_argument("--source", required=True, metavar="WHERE:NAME", help="the VAE")
    diagnose.add_argument("--data", required=True, metavar="WHERE:NAME", help="held-out data")
    diagnose.add_argument("--train", metavar="WHERE:NAME", help="training data: is it memorised?")
    diagnose.add_argument(
        "--proposals", type=int, nargs=2, default=(50, 500), metavar="M", help="for the ESS"
    )
    diagnose.add_argument("--seed", type=int, default=0, help="seed of the draws: %(default)s")
    diagnose.add_argument("--plot", type=Path, metavar="FILE", help="draw the report as a picture")
    diagnose.add_argument("--json", action="store_true", help="print the report as JSON")
    diagnose.set_defaults(run=_diagnose)

    inspect = commands.add_parser(
        "inspect",
        help="show what is in a saved prior, without running any code from it",
        description="Shows the configuration of a saved prior: groups, kinds of heads, strength, "
        "fingerprint. Reads the header of one safetensors file and runs nothing from it.",
    )
    _add_prior(inspect)
    inspect.set_defaults(run=_inspect)
    return parser


def _add_prior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path_or_repo", help="a folder, a file, or a Hugging Face Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")


def _load_object(where: str) -> Any:  # noqa: ANN401
    """Imports ``FILE.py:NAME`` or ``MODULE:NAME``, and calls it if it is a plain function."""
    place, _, name = where.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"Expected FILE.py:NAME or MODULE:NAME; got {where}.")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise FileNotFoundError(f"There is no file {place}.")
        module = sys.modules.get(spec.name)
        if module is None or getattr(module, "__file__", None) != spec.origin:
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # one import, whatever number of names is asked for
            spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    if not hasattr(module, name):
        raise LookupError(f"{place} has no {name}.")
    found = getattr(module, name)
    return found() if hasattr(found, "__code__") else found


def _started() -> float:
    """Returns when this process began, in seconds since the epoch, imports included."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):  # not Linux: since the import of this module
        return _IMPORTED


if __name__ == "__main__":
    sys.exit(main())
