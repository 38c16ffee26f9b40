"""The example of priors of VQ-VAEs, at toy size: its rows, resuming, and what its parts compute."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ncprior.demo.datasets import Labelled
from ncprior.training import held_out

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def images(repository: str, part: str) -> Labelled:
    """Bars at one of ten places, with noise."""
    count = 1500 if part == "train" else 120
    labels = torch.arange(count) % 10
    x = 0.2 * torch.rand(count, 1, 28, 28)
    for row, place in enumerate(labels.tolist()):
        x[row, 0, 2 * place : 2 * place + 6] += 0.6
    return Labelled(x, labels)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("benchmarks", "benchmarks.bench", "codes", "codes.vqvae", "codes_vqvae"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("codes_vqvae")
    sizes = module.Sizes(300, 4, 2, 40, 8, 2, 1, stopping=40, samples=40, nll=20, particles=10)
    monkeypatch.setattr(module, "SIZES", {True: sizes})
    monkeypatch.setattr(module, "PROPOSALS", (2,))
    monkeypatch.setattr(held_out, "_HELD_OUT_DRAWS", 40)
    monkeypatch.setattr(module, "read_images", images)
    return module


@pytest.mark.filterwarnings("ignore")  # networks of a few steps
@pytest.mark.parametrize("levels", ["1", "2"])
def test_rows_have_every_column_and_are_kept(
    example: ModuleType,
    levels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--quick", "--levels", levels, "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["codes_vqvae.py", *options, "--cache", str(tmp_path)])
    example.main()
    first = capsys.readouterr().out
    for arm in ("frequencies", "NCP(2) on network", "posterior (held-out rows)", "real"):
        assert f"\n{arm}" in first
    assert "codes in use" in first
    example.main()
    again = capsys.readouterr().out
    assert "codes in use" not in again  # everything is read back
    table = [line for line in first.splitlines() if line.startswith(("NCP", "real", "freq"))]
    assert table == [
        line for line in again.splitlines() if line.startswith(("NCP", "real", "freq"))
    ]


@pytest.mark.usefixtures("example")
def test_the_codebook_follows_its_inputs() -> None:
    codebook: Any = importlib.import_module("codes.vqvae").Codebook
    torch.manual_seed(0)
    centres = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, -3.0]])
    book: Any = codebook(3, 2, decay=0.5)
    for _ in range(20):
        which = torch.randint(3, (64,))
        h = (centres[which] + 0.1 * torch.randn(64, 2)).reshape(64, 2, 1, 1)
        codes, _, _ = book.train()(h)
    found: Tensor = book.vectors
    assert torch.cdist(centres, found).amin(1).max() < 0.2
    codes, vectors, tie = book.eval()(h)
    torch.testing.assert_close(vectors, book.look_up(codes))
    assert tie < 0.1
