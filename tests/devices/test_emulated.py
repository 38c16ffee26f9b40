"""The checks of devices on emulated ones, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.emulated_device.build import built, why_not

HERE = Path(__file__).parent

ONE_GROUP = ("test_training", "test_sampling", "test_measures", "test_vaebm", "test_recipe")

RUNS: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "cuda:1": ("cuda:1", (), (*ONE_GROUP, "test_bases")),
    "cuda:1, other VAEs": ("cuda:1", (), ("test_kinds",)),
    "cuda, data there": ("cuda", ("--data-on-device",), ("test_training", "test_measures")),
    "cuda, waits": ("cuda", (), ("test_waits",)),
    "mps": ("mps", (), (*ONE_GROUP, "test_bases")),
    "mps, other VAEs": ("mps", (), ("test_kinds",)),
}


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("run", RUNS)
def test_the_checks_of_devices_pass_on_an_emulated_one(run: str) -> None:
    device, options, files = RUNS[run]
    built(device.split(":")[0])
    paths = [str(HERE / f"{name}.py") for name in files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short"]
        + ["--emulated", "--device", device, *options, *paths],
        check=False,
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4000:]
