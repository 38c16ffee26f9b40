"""The example of Ray on a cluster of two workers: a worker that dies costs its part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ray_job import GROUPS, JOB, PARTS, made

from ncprior.jobs import sample_parts

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_part(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    paths = [str(ROOT / "tests"), str(ROOT / "examples" / "loops"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "ray_job.py"), str(tmp_path)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().split()
    assert PARTS * GROUPS < len(calls) <= (PARTS + 1) * GROUPS  # no more than one part drawn twice
    assert len(set(calls)) == 3  # two workers, and the one that takes the place of the killed
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "job").iterdir()}
    (tmp_path / "whole").mkdir()
    sample_parts(made(tmp_path), tmp_path / "whole", progress=False, **JOB)
    assert drawn == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
