"""The example on tables: its parts on a small table, and the way it decodes against ctgan's own."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a tenth of the rows of a quick run."""
    for name in ("ctgan", "sdmetrics", "sklearn"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("tables_adult", FOLDER / "tables_adult.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "QUICK", (200, 60, 100, 1))
    return module


def census(count: int = 480) -> Any:
    """A table with some columns of the census, one country of which occurs once."""
    import pandas as pd

    rng = np.random.default_rng(0)
    age = rng.integers(17, 90, count)
    rich = rng.random(count) < (age - 10) / 100
    country = rng.choice(["A", "B"], count)
    country[5] = "C"
    columns = {"age": age, "native-country": country}
    return pd.DataFrame({**columns, "income": np.where(rich, ">50K", "<=50K")})


@pytest.fixture
def case(script: ModuleType, tmp_path: Path) -> Any:
    census().to_csv(tmp_path / "adult.csv", index=False)
    names = {"json": tmp_path / "rows.json", "cache": tmp_path, "quick": True}
    bench = script.Bench(argparse.Namespace(**names), {})
    return script.Case(bench, script.adult(tmp_path / "adult.csv"), 0)


def test_parts_share_no_row_and_have_known_categories(script: ModuleType, case: Any) -> None:
    sizes = [len(part) for part in (case.train, case.choices, case.reference, case.fresh)]
    assert sizes == [200, 60, 100, 100]
    assert set(case.train["native-country"]) == {"A", "B"}
    assert case.categories == ["native-country", "income"]


def test_arms_have_their_columns_and_a_second_run_reads_them(
    script: ModuleType, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arm in (script.OWN, "N(0, I)", script.POSTERIOR, "real"):
        (row,) = case.bench.add(lambda arm=arm: case.arm(arm), method=arm, seed=0)
        assert 0 <= row["quality"] <= 1 and 0 <= row["copies"] <= row["near"] + 1
        for name in ("real", "tstr"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    by_arm = {row["method"]: row for row in case.bench.rows}
    assert "decoded" in by_arm["N(0, I)"] and "decoded" not in by_arm[script.OWN]
    assert "elbo" in by_arm[script.POSTERIOR]
    monkeypatch.setattr(script, "TVAE", None)  # nothing is trained again
    again = script.Case(case.bench, census(), 0)
    assert case.bench.add(lambda: again.arm(script.OWN), method=script.OWN, seed=0)
    assert len(json.loads(case.bench.path.read_text())["rows"]) == 4


def test_networks_are_kept_and_decode_as_those_of_ctgan(script: ModuleType, case: Any) -> None:
    again = script.Case(case.bench, census(), 0)
    again.train = case.train
    x = torch.randn(3, 128)
    assert torch.equal(case.source.module(x)[0], again.source.module(x)[0])
    torch.manual_seed(0)
    with torch.no_grad():
        case.model.decoder.seq[-1].weight.mul_(100)  # logits above 9
    z = torch.normal(torch.zeros(500, 128), 1.0)[:50]
    ours = case.own_way(z, 5)
    torch.manual_seed(0)
    np.random.seed(5)
    assert ours.equals(case.model.sample(50))


def test_copies_are_rows_of_the_training_set(script: ModuleType, case: Any) -> None:
    assert case.measured(case.train)["copies"] == 1.0
