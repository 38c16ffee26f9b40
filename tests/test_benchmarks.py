"""What the benchmarks share: rows and networks that survive an interruption, tables, options."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"
SCRIPTS = ["mnist_nll.py", "hierarchical_nll.py", "loss_ess.py", "sampler_cost.py"]


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", FOLDER / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    values = {"json": folder / "rows.json", "cache": folder, "quick": False, **changes}
    return argparse.Namespace(**values)


def test_finished_rows_are_not_made_again(bench: ModuleType, tmp_path: Path) -> None:
    calls = []

    def make() -> list[dict[str, Any]]:
        calls.append(1)
        return [{"model": "SIR(4)", "gain": 1.5}, {"model": "NCP", "gain": 2.0}]

    for _ in range(2):  # the second stands for the run after an interruption
        rows = bench.Bench(options(tmp_path), {"steps": 3}).add(make, method="NCP", seed=1)
        assert [row["model"] for row in rows] == ["SIR(4)", "NCP"]
        assert {(row["method"], row["seed"]) for row in rows} == {("NCP", 1)}
    assert len(calls) == 1
    again = bench.Bench(options(tmp_path), {"steps": 3})
    again.add(make, method="NCP", seed=2)
    assert len(calls) == 2
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["seed"] for row in written["rows"]] == [1, 1, 2, 2]
    assert written["meta"]["settings"] == {"quick": False, "steps": 3}
    assert "torch" in written["meta"]["machine"]


def test_rows_of_other_settings_are_not_mixed_in(bench: ModuleType, tmp_path: Path) -> None:
    bench.Bench(options(tmp_path), {"steps": 3}).add(lambda: [{}], method="NCP", seed=0)
    with pytest.raises(SystemExit, match="other settings"):
        bench.Bench(options(tmp_path), {"steps": 4})
    with pytest.raises(SystemExit, match="other settings"):
        bench.Bench(options(tmp_path, quick=True), {"steps": 3})


def test_networks_are_trained_once_per_key(bench: ModuleType, tmp_path: Path) -> None:
    trained, weights = [], []
    for steps in (1, 1, 2):
        net = nn.Linear(2, 2)
        seconds = bench.Bench(options(tmp_path, json=None), {}).network(
            "net", net, lambda: trained.append(1), steps=steps
        )
        assert seconds >= 0
        assert not net.training
        weights.append(net.weight)
    assert len(trained) == 2
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_table_leaves_gaps_where_a_row_knows_nothing(bench: ModuleType) -> None:
    rows = [{"method": "VAE", "nll": 87.123, "n": 3}, {"method": "NCP", "nll": None}]
    assert bench.table(rows, {"method": "<8", "nll": ">7.2f", "n": ">3"}).splitlines() == [
        "method       nll   n",
        "VAE        87.12   3",
        "NCP",
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), "--help"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for word in ("--quick", "--seed", "--json", "--cache"):
        assert word in done.stdout
