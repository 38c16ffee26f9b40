"""Options of the command line, and the texts of its help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from ncprior._version import __version__

_New: TypeAlias = Callable[..., argparse.ArgumentParser]  # makes the parser of a command

_DESCRIPTION = """\
Better priors for pretrained VAEs by noise contrastive estimation.

Examples:
  ncprior demo                            train and improve a small VAE of digits, a minute or two
  ncprior demo --data mnist               the same on MNIST, some minutes
  ncprior improve my_vae.py:source --data my_vae.py:x_train
                                          find a better prior for your VAE
  ncprior diagnose my-prior --source my_vae.py:source --data my_vae.py:x_test
                                          measure the quality of the heads of a saved prior
  ncprior sample my-prior --source my_vae.py:source -n 1000 --out samples
                                          draw samples into files; run it again to go on
  ncprior report my-prior --source my_vae.py:source --data my_vae.py:x_test
                                          write a page with pictures and measurements
  ncprior inspect user/my-prior           show the configuration of a saved prior

`ncprior COMMAND --help` explains the options of a command.
"""

_DEMO = """\
Examples:
  ncprior demo
  ncprior demo --data mnist --seed 1 --out mnist-demo
"""

_IMPROVE = """\
The VAE and the data are your Python objects, given as FILE.py:NAME or MODULE:NAME. The VAE is a
LatentSource. The data are a tensor, an array or table of numbers, a dataset or a DataLoader. Both
can also be functions without arguments that return the object.

Example my_vae.py, with vae, base and posterior as in the README:

    source = SingleGroup(base, posterior, vae.decode, module=vae)
    x_train = torch.load("train.pt", weights_only=True)

The folder gets the heads with their base and sampler, a model card, and report.html. If the command
was interrupted, run it again: it goes on.

Examples:
  ncprior improve my_vae.py:source --data my_vae.py:x_train
  ncprior improve my_vae.py:source --data my_vae.py:x_train --budget 500 --max-seconds 600 --out best
  ncprior sample my-prior --source my_vae.py:source -n 1000
"""

_REPORT = """\
The VAE and the data are your Python objects, as for `ncprior diagnose`.

Examples:
  ncprior report my-prior --source my_vae.py:source --data my_vae.py:x_test
  ncprior report my-prior --source my_vae.py:source --data my_vae.py:x_test --train my_vae.py:x_train
  ncprior report user/my-prior --source my_vae.py:source --data my_vae.py:x_test --out page.html
"""

_DIAGNOSE = """\
The VAE and the data are your Python objects, given as FILE.py:NAME or MODULE:NAME. For --source,
NAME is a LatentSource. For --data and --train, NAME is a tensor, an array or table of numbers, a
dataset or a DataLoader. NAME can also be a function without arguments that returns the object. The
file is imported, so its code runs as with `python FILE.py`; a module is also looked for in the
working folder. No code from PATH_OR_REPO is run.

Example my_vae.py, with vae, base and posterior as in the README:

    source = SingleGroup(base, posterior, vae.decode, module=vae)
    x_test = torch.load("test.pt", weights_only=True)

Examples:
  ncprior diagnose my-prior --source my_vae.py:source --data my_vae.py:x_test
  ncprior diagnose user/my-prior --source my_vae.py:source --data my_vae.py:x_test \\
      --plot report.png
"""

_SAMPLE = """\
The VAE is your Python object, given as FILE.py:NAME or MODULE:NAME: a LatentSource, or a function
without arguments that returns one. The file is imported, so its code runs as with `python FILE.py`.
No code from PATH_OR_REPO is run.

Samples are drawn by the sampler that was saved with the prior:

    prior.sampler = recommend_sampler(diagnose(prior, x_test), budget=50).sampler
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
  ncprior sample my-prior --source my_vae.py:source --out s3://bucket/samples
  ncprior sample my-prior --source my_vae.py:source -n 100000 --parts $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
"""

_INSPECT = """\
Examples:
  ncprior inspect my-prior
  ncprior inspect user/my-prior --revision v1
"""


def parser() -> argparse.ArgumentParser:
    """Parser of the command line; ``command`` of its options is the name of a command."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser("ncprior", description=_DESCRIPTION, formatter_class=raw)
    whole.add_argument("--version", action="version", version=f"ncprior {__version__}")
    commands = whole.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for add in (_add_demo, _add_improve, _add_diagnose, _add_sample, _add_report, _add_inspect):
        add(partial(commands.add_parser, formatter_class=raw))
    return whole


def _add_demo(new: _New) -> None:
    demo = new(
        "demo",
        help="train a small VAE on digits and close its prior hole",
        description="Trains a small VAE on real digits, measures its prior hole, and improves its "
        "prior. Writes pictures of samples, a report, the VAE and the new prior.",
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
    _add_quiet(demo)
    demo.add_argument("--json", action="store_true", help="print only one JSON object")


def _add_improve(new: _New) -> None:
    improve = new(
        "improve",
        help="find a better prior for your VAE, with a report",
        description="Chooses a base, trains heads on it, chooses a sampler, and measures how much "
        "better the new prior is. Every choice is printed with its numbers.",
        epilog=_IMPROVE,
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
    _add_quiet(improve)


def _add_report(new: _New) -> None:
    report = new(
        "report",
        help="write a page with pictures and measurements of a saved prior",
        description="Measures a saved prior on held-out data, and writes one HTML page.",
        epilog=_REPORT,
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
    _add_quiet(sample)


def _add_inspect(new: _New) -> None:
    inspect = new(
        "inspect",
        help="show the configuration of a saved prior, without running code from it",
        description="Prints the configuration of a saved prior as JSON: groups, kinds of heads, "
        "strength, sampler and fingerprint. It reads the header of one safetensors file and runs no code.",
        epilog=_INSPECT,
    )
    _add_prior(inspect)


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


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    words = "show no progress and no choices, only the last line"
    parser.add_argument("--quiet", action="store_true", help=words)


def _share(text: str) -> tuple[int, int]:
    """The number of this process and of all processes, such as ``3/100``."""
    first, _, step = text.partition("/")
    if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"must be I/N with I < N, such as 0/100; got {text!r}")
    return int(first), int(step)
