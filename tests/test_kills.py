"""Jobs killed by SIGKILL and SIGTERM: nothing is lost, nothing half written, nothing left over.

``pytest tests/test_kills.py --slow`` kills 340 processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.kills import left_over, wrong_files

from ncprior.saving.tensors import save_tensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch")

KILLS = {"fit": 50, "ending": 40, "stages": 40, "proposals": 30, "disk": 40, "vaebm": 40}
KILLS |= {"parts": 40, "save": 40, "demo": 20}

SEED = 0


def killed(kills: int, *modes: str) -> None:
    """Kills jobs of each mode so many times, and asserts that they did not suffer."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests"), *sys.path])
    done = subprocess.run(
        [sys.executable, root / "tests/helpers/kills.py", str(SEED), str(kills), *modes],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {mode: part["wrong"] for mode, part in report.items()} == {mode: [] for mode in modes}
    assert all(part["kills"] >= kills for part in report.values())


def test_jobs_do_not_suffer_from_a_kill() -> None:
    killed(1, "disk", "vaebm", "parts", "save")


@pytest.mark.slow
@pytest.mark.parametrize("mode", KILLS)
def test_jobs_do_not_suffer_from_many_kills(mode: str) -> None:
    killed(KILLS[mode], mode)


def test_what_a_kill_could_leave_behind_is_seen(tmp_path: Path) -> None:
    files, temporary = tmp_path / "files", tmp_path / "temporary" / "ncprior-rows-1"
    save_tensors(files / "a.safetensors", {"x": torch.ones(9)}, {})
    (files / "job.json").write_text("{}")
    assert not [*wrong_files(files), *left_over(tmp_path)]
    for name in ("b.safetensors", "c.json", "d.png", "README.md", "fit.safetensors.stage2"):
        (files / name).write_bytes((files / "a.safetensors").read_bytes()[:-1])
    assert len(list(wrong_files(files))) == 5
    (files / ".job.json.0badcafe.tmp").touch()
    temporary.mkdir(parents=True)
    assert len(list(left_over(tmp_path))) == 2
