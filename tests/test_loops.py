"""The examples of loops, each with the real package: they run, and the heads learn."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "loops"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
UNTRAINED = 1.386  # nats: 2 log 2

COMMANDS = {
    "lightning": [str(FOLDER / "with_lightning.py")],
    "accelerate": [str(FOLDER / "with_accelerate.py")],
    "accelerate in two processes": [*TORCHRUN, str(FOLDER / "with_accelerate.py")],
    "torchrun": [*TORCHRUN, str(FOLDER / "with_torchrun.py")],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_loop_trains_heads(name: str, tmp_path: Path) -> None:
    package = name.split()[0]
    if package != "torchrun" and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    pytest.importorskip("sklearn")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *COMMANDS[name], "--epochs", "3"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^held-out NCE loss ([\d.]+) after 3 epochs$", done.stdout, re.MULTILINE)
    assert len(found) == 1 and float(found[0]) < UNTRAINED - 0.1, done.stdout
    assert not list(tmp_path.iterdir())
