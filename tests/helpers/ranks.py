"""Two processes on gloo: a script is run as each rank, and what it saved is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ncprior.saving.tensors import load_tensors

Ranks = list[tuple[dict[str, torch.Tensor], dict[str, Any]]]


def launch(script: str, folder: Path) -> Ranks:
    """Runs a script as two ranks, and returns what they have saved."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    commands = [[sys.executable, script, str(rank), str(folder)] for rank in range(2)]
    processes = [
        subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands
    ]
    try:
        outputs = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [load_tensors(folder / f"rank{rank}") for rank in range(2)]


def named(rank: tuple[dict[str, torch.Tensor], Any], prefix: str) -> dict[str, torch.Tensor]:
    start = f"{prefix}/"
    return {name[len(start) :]: t for name, t in rank[0].items() if name.startswith(start)}
