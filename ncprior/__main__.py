"""Command line of the package: ``ncprior demo``, ``ncprior diagnose`` and ``ncprior inspect``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import ncprior
from ncprior.source import require_source
from ncprior.utils.require import described, real_tensor, require_counts

_IMPORTED = time.time()

_EXPECTED = (ArithmeticError, ImportError, LookupError, OSError, TypeError, ValueError)

_DESCRIPTION = """\
Better priors for pretrained VAEs by noise contrastive estimation.

Examples:
  ncprior demo                            train and improve a small VAE of digits, about a minute
  ncprior demo --data mnist               the same on MNIST, some minutes
  ncprior inspect user/my-prior           show the configuration of a saved prior
  ncprior diagnose my-prior --source my_vae.py:source --data my_vae.py:held_out
                                          measure the quality of the heads of a saved prior

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
        line = _line_of_the_user(error)
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
        source, data = _load_object(options.source), _load_data(options.data)
        require_source(source)
        train = None if options.train is None else _load_data(options.train)
        prior = ncprior.NCPrior.from_pretrained(
            source, options.path_or_repo, revision=options.revision
        )
        with seeded(options.seed):
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
        help="train a small VAE on digits and close its prior hole",
        description="Trains a small VAE on real digits, measures its prior hole, and trains a "
        "ratio head on the frozen VAE. Writes pictures of samples, a report and the trained head.",
        epilog=_DEMO,
        formatter_class=raw,
    )
    demo.add_argument(
        "--data",
        choices=("digits", "mnist"),
        default="digits",
        help="scikit-learn's 8×8 digits, or MNIST from $NCPRIOR_DATA or the Hub; "
        "default: %(default)s",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("ncprior-demo"),
        help="output folder; default: %(default)s",
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="seed of all random numbers; default: %(default)s"
    )
    demo.add_argument("--json", action="store_true", help="print only one JSON object")
    demo.set_defaults(run=_demo)

    diagnose = commands.add_parser(
        "diagnose",
        help="report on the heads of a saved prior, for your VAE and held-out data",
        description="Prints a report on the heads of a saved prior: one line per group of "
        "latents, with loss, calibration, effective sample size and a verdict.",
        epilog=_DIAGNOSE,
        formatter_class=raw,
    )
    _add_prior(diagnose)
    diagnose.add_argument(
        "--source", required=True, metavar="WHERE:NAME", help="the VAE, a source"
    )
    diagnose.add_argument("--data", required=True, metavar="WHERE:NAME", help="held-out data")
    diagnose.add_argument(
        "--train", metavar="WHERE:NAME", help="training data, to detect memorisation"
    )
    diagnose.add_argument(
        "--proposals",
        type=int,
        nargs=2,
        default=(50, 500),
        metavar="M",
        help="two numbers of proposals for the ESS",
    )
    diagnose.add_argument(
        "--seed", type=int, default=0, help="seed of the samples; default: %(default)s"
    )
    diagnose.add_argument(
        "--plot", type=Path, metavar="FILE", help="also write the report as a picture"
    )
    diagnose.add_argument("--json", action="store_true", help="print the report as JSON")
    diagnose.set_defaults(run=_diagnose)

    inspect = commands.add_parser(
        "inspect",
        help="show the configuration of a saved prior, without running code from it",
        description="Prints the configuration of a saved prior as JSON: groups, kinds of heads, "
        "strength and fingerprint. It reads the header of one safetensors file and runs no code.",
        epilog=_INSPECT,
        formatter_class=raw,
    )
    _add_prior(inspect)
    inspect.set_defaults(run=_inspect)
    return parser


def _add_prior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path_or_repo", help="a folder, a file, or a repository of the Hugging Face Hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository")


def _load_object(where: str) -> Any:  # noqa: ANN401
    """Returns the object ``FILE.py:NAME`` or ``MODULE:NAME``; a plain function is called first."""
    place, _, name = where.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"Expected FILE.py:NAME or MODULE:NAME; got {where}.")
    if place.endswith(".py"):
        module = _import_file(place)
    else:
        _add_to_path(Path.cwd())
        module = importlib.import_module(place)
    if not hasattr(module, name):
        raise LookupError(f"{place} has no {name}. Give a name that it defines.")
    found = getattr(module, name)
    return found() if hasattr(found, "__code__") else found


def _load_data(where: str) -> Any:  # noqa: ANN401
    """Returns data as :func:`_load_object` does; arrays and tables become tensors of float32."""
    data = _load_object(where)
    if isinstance(data, np.ndarray) or hasattr(data, "to_numpy"):
        return real_tensor(where, data).float()
    if isinstance(data, type) or not (hasattr(data, "__getitem__") or hasattr(data, "__iter__")):
        raise TypeError(
            f"{where} must be data: a tensor, an array, a table, a dataset or a DataLoader; got "
            f"{described(data)}."
        )
    return data


def _import_file(place: str) -> Any:  # noqa: ANN401
    path = Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {place}. Give the path of a Python file.")
    _add_to_path(path.parent)
    module = sys.modules.get(path.stem)
    if module is None or getattr(module, "__file__", None) != str(path):
        spec: Any = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # imported once, also for several names
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            raise
    return module


def _add_to_path(folder: Path) -> None:
    """Lets the user's files import their neighbours, as ``python FILE.py`` does."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _line_of_the_user(error: BaseException) -> str | None:
    """Returns ``"FILE:LINE: "`` of the last line of the user's own code that led to an error."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}: "
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _is_the_users(frame):
            return f"{frame.f_code.co_filename}:{line}: "
    return None


def _is_the_users(frame: FrameType) -> bool:
    """Returns whether a frame is of no code of Python, of an installed package or of this one."""
    path = Path(frame.f_code.co_filename)
    others = (Path(os.__file__).parent, Path(ncprior.__file__).parent)
    return (
        path.is_file()
        and frame.f_globals.get("__name__", "").partition(".")[0] != "ncprior"
        and not any(path.is_relative_to(folder) for folder in others)
        and not {"site-packages", "dist-packages"} & set(path.parts)
    )


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
