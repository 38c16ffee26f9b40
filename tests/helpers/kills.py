"""Long jobs whose process is killed at random points, and then started again.

``python tests/helpers/kills.py SEED KILLS MODE...`` prints a report as JSON: for each mode, the kills
and what went wrong. A process is forked for every attempt, so that torch is imported only once. It is killed by SIGKILL or SIGTERM at a random time, before a random operation on a file, or in the
midst of writing one. Each job is killed several times in a row and then completed. After a kill
every file must be whole; in the end the outcome must be bit for bit that of a job that was never
killed, and no temporary file may be left.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers.equality import identical
from helpers.toys import VAE, flat, ladder_prior, stir
from PIL import Image
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import NCPrior, fit, sir
from ncprior.demo import run as demo
from ncprior.heads import MLPHead
from ncprior.jobs import read_parts, sample_parts
from ncprior.saving.tensors import load_tensors
from ncprior.training import FitSettings
from ncprior.vaebm import VAEBM, EnergySettings, fit_vaebm

MOST_IN_A_ROW = 4  # kills of one job before it is completed

SAMPLER = partial(sir, num_proposals=20)

QUICK: dict[str, Any] = {"steps": 24, "batch_size": 256, "eval_every": 12, "checkpoint_every": 3}

FEW = {
    "vae_steps": 5,
    "classifier_steps": 5,
    "head": {"width": 8},
    "num_proposals": 20,
    "fit": {"steps": 4, "eval_every": 2},
    "num_samples": 40,
    "num_features": 4,
    "generations": 5,
    "log_z_draws": 10,
}


# Modes: each takes a folder and the number of the attempt, and returns the outcome.


def training(folder: Path, attempt: int, prior: NCPrior, **options: Any) -> dict[str, Any]:
    """`fit` to the end, from a checkpoint if there is one."""
    path = folder / "fit.safetensors"
    x, held_out = torch.randn(600, 3), torch.randn(512, 3)
    if path.exists():
        torch.manual_seed(attempt)  # the state of the generators is in the checkpoint
    options = {"held_out": held_out, "checkpoint": path, "progress": False, **QUICK, **options}
    history = fit(prior, x, **options)
    rows = [
        tuple(row[:4]) for row in (*history.rows, *(r for h in history.stages for r in h.rows))
    ]
    return {"heads": dict(prior.state_dict()), "rows": rows, "generator": torch.get_rng_state()}


def flat_prior() -> NCPrior:
    """A prior of one group, with small heads."""
    return NCPrior(flat(VAE()), MLPHead((2,), width=8))


def fit_plainly(folder: Path, attempt: int) -> Any:
    """Two groups, encoded at every step."""
    return training(folder, attempt, ladder_prior(2), settings=FitSettings(cache_epochs=None))


def fit_to_the_end(folder: Path, attempt: int) -> Any:
    """Without a number of steps, through warm-up, stable phase and decay."""
    options = {"steps": None, "eval_every": 3, "patience": 3, "learning_rate": 3e-2}
    return training(folder, attempt, flat_prior(), **options)


def fit_in_stages(folder: Path, attempt: int) -> Any:
    """Two heads, one after the other, each with a checkpoint."""
    return training(folder, attempt, flat_prior(), stages=2)


def fit_with_proposals(folder: Path, attempt: int) -> Any:
    """With cached draws of the base."""
    return training(folder, attempt, flat_prior(), settings=FitSettings(num_cached_proposals=300))


def fit_from_disk(folder: Path, attempt: int) -> Any:
    """With encodings that do not fit in memory."""
    settings = FitSettings(cache_memory=0.0, cache_epochs=2)
    return training(folder, attempt, ladder_prior(2), settings=settings)


def fit_energy(folder: Path, attempt: int) -> Any:
    """`fit_vaebm`, with a buffer of chains."""
    vae = VAE()

    def likelihood(z: Tensor) -> Independent:
        return Independent(Normal(vae.decode(z), 0.5, validate_args=False), 1)

    model = VAEBM(flat(vae, likelihood=likelihood), MLPHead((3,), width=8), num_steps=3)
    path, x = folder / "energy.safetensors", torch.randn(600, 3)
    if path.exists():
        torch.manual_seed(attempt)
    settings = EnergySettings(buffer_size=40)
    history = fit_vaebm(model, x, checkpoint=path, settings=settings, progress=False, **QUICK)
    rows = [tuple(row[:5]) for row in history.rows]
    return {"energy": dict(model.energy.state_dict()), "rows": rows}


def sample(folder: Path, attempt: int) -> Any:
    """`sample_parts`, of which every process draws the parts in another order."""
    order = list(range(12))
    random.Random(attempt).shuffle(order)
    prior = stir(ladder_prior(2))
    sample_parts(prior, folder, sampler=SAMPLER, num_samples=36, part_size=3, parts=order)
    assert len(list(read_parts(folder))) == len(order)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def save(folder: Path, attempt: int) -> Any:
    """`save_pretrained` over another prior: at any time, one of the two can be loaded."""
    source, versions = flat(VAE()), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        versions.append(stir(NCPrior(source, MLPHead((2,), width=8))))
    if (folder / "ncprior.safetensors").exists():
        found = NCPrior.from_pretrained(source, folder).state_dict()
        assert any(identical(dict(found), dict(prior.state_dict())) for prior in versions)
    for prior in 4 * versions:
        prior.save_pretrained(folder)
    return dict(NCPrior.from_pretrained(source, folder).state_dict())


def show(folder: Path, attempt: int) -> Any:
    """The demonstration, which starts anew and replaces what is there."""
    demo._SETTINGS["digits"] = replace(demo._SETTINGS["digits"], **FEW)
    result = demo.run_demo(out=folder, progress=False)
    assert json.loads((folder / "report.json").read_text()) == result
    return {name: result[name] for name in ("gap_closed", "log_z", "negative_elbo", "diagnosis")}


MODES: dict[str, Callable[[Path, int], Any]] = {
    "fit": fit_plainly,
    "ending": fit_to_the_end,
    "stages": fit_in_stages,
    "proposals": fit_with_proposals,
    "disk": fit_from_disk,
    "vaebm": fit_energy,
    "parts": sample,
    "save": save,
    "demo": show,
}


# Processes


@dataclass
class Kill:
    """A kill: after some seconds, at an operation on a file, or a moment after it."""

    number: int  # the signal
    seconds: float | None = None
    operation: int | None = None
    moment: float = 0.0


_OPERATIONS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")


class Attempt:
    """One process that runs a job in ``root/files``, with ``root/temporary`` for temporary files."""

    def __init__(self, mode: str, root: Path, number: int, kill: Kill | None = None) -> None:
        self.root, self.kill, self.operations = root, kill, 0
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            self._be_the_child(mode, number)
        if kill is not None and kill.seconds is not None:
            time.sleep(kill.seconds)
            os.kill(process, kill.number)  # it is not reaped yet: the number is no other process's
        self.status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self.seconds = time.monotonic() - start

    @property
    def outcome(self) -> tuple[Any, int]:
        """The outcome, and the number of operations on files."""
        saved: tuple[Any, int] = torch.load(self.root / "outcome", weights_only=False)
        return saved

    def _be_the_child(self, mode: str, number: int) -> None:
        status = 1
        try:
            tempfile.tempdir = str(self.root / "temporary")
            (self.root / "temporary").mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            sys.addaudithook(self._count)
            outcome = MODES[mode](self.root / "files", number)
            operations, self.kill = self.operations, None
            torch.save((outcome, operations), self.root / "outcome")
            atexit._run_exitfuncs()
            status = 0
        except BaseException:  # noqa: BLE001 (reported by the parent)
            (self.root / "error").write_text(traceback.format_exc())
        finally:
            os._exit(status)

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Counts operations on the job's files, and kills this process where it is to die."""
        if event not in _OPERATIONS or not any(str(self.root) in str(a) for a in arguments[:2]):
            return
        self.operations += 1
        if self.kill is None or self.operations != self.kill.operation:
            return
        if self.kill.moment == 0.0:
            os.kill(os.getpid(), self.kill.number)
        signal.setitimer(signal.ITIMER_REAL, self.kill.moment)  # its default action is to die


def wrong_files(folder: Path) -> Iterator[str]:
    """What cannot be read of the files that have their final names."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".png": lambda path: Image.open(path).load(),
        ".md": lambda path: path.read_text().index("---", 4),
    }
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            try:
                readers.get(path.suffix, load_tensors)(path)
            except Exception as error:  # noqa: BLE001 (whatever it is, the file is not whole)
                yield f"{path.name} is not whole: {error}"


def left_over(root: Path) -> Iterator[str]:
    """Temporary files after the end of a job."""
    for path in sorted(root.rglob("*")):
        if path.parent == root / "temporary" or path.name.startswith("."):
            yield f"left over: {path.relative_to(root)}"


def random_kill(generator: random.Random, seconds: float, operations: int) -> Kill:
    """A kill within the time, or the operations, of an undisturbed job."""
    number = generator.choice([signal.SIGKILL, signal.SIGTERM])
    kind = generator.choice(["time", "operation", "moment"])
    if kind == "time":
        return Kill(number, seconds=generator.uniform(0, seconds))
    moment = generator.uniform(1e-6, 1e-3) if kind == "moment" else 0.0
    return Kill(number, operation=generator.randint(1, operations), moment=moment)


def killed_and_completed(
    mode: str, root: Path, generator: random.Random, undisturbed: Attempt, most: int
) -> tuple[int, list[str]]:
    """Kills of one job, and what was wrong afterwards."""
    expected, operations = undisturbed.outcome
    kills, wrong = 0, []
    for number in range(1, generator.randint(1, most) + 1):
        kill = random_kill(generator, undisturbed.seconds, operations)
        attempt = Attempt(mode, root, number, kill)
        kills += attempt.status < 0
        wrong += [f"after {kill}: {fault}" for fault in wrong_files(root / "files")]
        if attempt.status >= 0:
            break
    last = Attempt(mode, root, MOST_IN_A_ROW + 1)
    if last.status != 0:
        return kills, [*wrong, (root / "error").read_text()]
    if not identical(last.outcome[0], expected):
        wrong.append(f"after {kill}: the outcome is another one")
    return kills, [*wrong, *wrong_files(root / "files"), *left_over(root)]


def exercise(mode: str, kills: int, seed: int, root: Path) -> dict[str, Any]:
    """Kills jobs of one mode until there have been so many kills; returns kills and faults."""
    generator, done, wrong, jobs = random.Random(f"{mode} {seed}"), 0, [], 0
    MODES[mode](root / "before", 0)  # what it imports is imported for all children
    undisturbed = Attempt(mode, root / "undisturbed", 0)
    if undisturbed.status != 0:
        return {"kills": 0, "wrong": [(root / "undisturbed" / "error").read_text()]}
    wrong += [*wrong_files(root / "undisturbed" / "files"), *left_over(root / "undisturbed")]
    while done < kills:
        jobs += 1
        most = min(MOST_IN_A_ROW, kills - done)
        more, faults = killed_and_completed(mode, root / "job", generator, undisturbed, most)
        done, wrong = done + more, wrong + faults
        shutil.rmtree(root / "job")
    return {"kills": done, "jobs": jobs, "seconds": undisturbed.seconds, "wrong": wrong}


def main(seed: int, kills: int, modes: list[str]) -> dict[str, Any]:
    """The report on some modes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # no threads, which a fork would not copy
    folder = Path(tempfile.mkdtemp())  # no TemporaryDirectory, which every child would remove
    try:
        return {mode: exercise(mode, kills, seed, folder / mode) for mode in modes}
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(MODES))))
