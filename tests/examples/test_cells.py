"""The example of single cells runs at a toy size, and its measures are what they say."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("scvi")
pytest.importorskip("scanpy")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    import scvi_cells

    yield scvi_cells
    sys.modules.pop("scvi_cells")


def test_the_counts_of_scanpys_cells_are_recovered(example: Any) -> None:
    data = example.pbmc68k()
    assert data.cells.shape == (700, 765)
    assert (data.cells.X.data >= 1).all() and data.cells.obs["label"].nunique() == 10


def test_every_prior_is_measured_and_rows_survive(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = example.Settings(genes=20, updates=2, splits=1, steps=2, compared=5)
    monkeypatch.setattr(example, "QUICK", tiny)
    monkeypatch.setattr(example, "kang", lambda: None)  # not there
    rows = tmp_path / "rows.json"
    options = argparse.Namespace(quick=True, json=rows, cache=tmp_path, seed=[0])
    made = example.run(options, [example.kang, example.pbmc68k])
    assert [row["method"] for row in made] == list(example.METHODS[:-1])
    assert all(0 <= row["auc_low"] <= row["auc"] <= row["auc_high"] <= 1 for row in made)
    monkeypatch.setattr(example, "rows_of_method", lambda *_: pytest.fail("made again"))
    assert example.run(options, [example.pbmc68k]) == made


def test_normalised_data_are_no_counts(example: Any) -> None:
    from scipy.sparse import csr_matrix

    with pytest.raises(SystemExit, match="Raw counts are needed"):
        example.table_of(csr_matrix(np.full((3, 2), 0.5)))


def test_errors_are_zero_for_the_same_cells(example: Any) -> None:
    torch.manual_seed(0)
    x = torch.poisson(torch.full((50, 8), 3.0))
    assert example.correlation_error(x, x) == 0 and example.pseudobulk_error(x, x) == 0
    swapped = x[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert example.correlation_error(x, swapped) > 0.01
