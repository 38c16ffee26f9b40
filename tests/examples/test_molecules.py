"""The example of molecules: pieces and strings, the VAE, the measures of MOSES, and a whole small run."""

import importlib
import importlib.metadata
import itertools
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ncprior.testing import check_source

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXTS = ["CCO", "CCCCCCl", "c1ccccc1", "CC(=O)Cl", "C[nH]Br", "CCOC(=O)c1ccccc1"]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


@pytest.fixture
def vae(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("molecules.vae", monkeypatch)


@pytest.fixture
def moses(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("rdkit")
    pytest.importorskip("fcd_torch")
    try:
        importlib.metadata.files("molsets")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("molsets is not installed")
    return load("molecules.moses", monkeypatch)


def test_strings_come_back_from_rows_of_pieces(vae: ModuleType) -> None:
    pieces = vae.Pieces(TEXTS, 20)
    rows = pieces.numbered(TEXTS)
    assert pieces.joined(rows) == TEXTS
    assert pieces.texts[0] == ""
    assert {"Cl", "Br", "[nH]", "C"} <= set(pieces.texts)  # symbols of two letters are one
    assert (rows[:, -1] == 0).all()
    assert rows.shape[1] < 1 + max(map(len, TEXTS))  # frequent runs are one piece
    with pytest.raises(ValueError, match="CCI"):
        pieces.numbered(["CCI"])
    junk = torch.tensor([[1, 0, 2, 0]])
    assert pieces.joined(junk) == [pieces.texts[1]]  # nothing counts after the first 0


def small(vae: ModuleType, *, pieces: int = 4, length: int = 4) -> Any:
    model = vae.MoleculeVAE(pieces, length, latents=2, hidden=6, embedding=5).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model


def test_the_vae_is_a_source(vae: ModuleType) -> None:
    model = small(vae)
    check_source(model.source(), torch.tensor([[3, 0, 0, 0], [1, 2, 3, 0], [2, 2, 0, 0]]))


def test_draws_of_strings_have_their_probabilities(vae: ModuleType) -> None:
    """All rows of three pieces and places: those that end before the last place sum to less than 1."""
    model = small(vae, pieces=3, length=3)
    z, rows = torch.randn(1, 2), torch.tensor([[0, 0, 0], [1, 0, 0], [2, 0, 0]])
    p = model.log_prob(rows, z.expand(3, 2)).exp()
    count = 4000
    drawn = vae.Rows(model, z).sample((count,))[:, 0]
    assert drawn.shape == (count, 3)
    for row, probability in zip(rows, p, strict=True):
        share = (drawn == row).all(1).float().mean()
        assert abs(share - probability) < 4 * (probability * (1 - probability) / count) ** 0.5
    longer = torch.tensor(list(itertools.product([1, 2], [1, 2], [0])))
    total = p.sum() + model.log_prob(longer, z.expand(4, 2)).exp().sum()
    assert p.sum() < total < 1  # rows that are longer than the table have the rest


def test_the_loss_is_the_negative_elbo(vae: ModuleType) -> None:
    """The weight of the KL divergence is exact; chunks of rows of one length change only draws."""
    model, x = small(vae), torch.tensor([[1, 2, 3, 0], [3, 0, 0, 0], [2, 2, 0, 0], [1, 1, 0, 0]])
    q, p = model.posterior(x).base_dist, model.source().prior.base_dist
    kl = torch.distributions.kl_divergence(q, p).sum(1).mean()

    def losses(beta: float, chunks: int) -> Tensor:
        torch.manual_seed(chunks)
        draws = [vae.negative_elbo(model, x, beta=beta, chunks=chunks) for _ in range(60)]
        return torch.stack(draws).detach()

    one, four = losses(0.0, 1), losses(0.0, 4)
    assert torch.allclose(losses(2.0, 4) - four, 2 * kl)
    assert abs(one.mean() - four.mean()) < 4 * ((one.var() + four.var()) / 60) ** 0.5
    z = q.sample((60,))
    expected = -torch.stack([model.log_prob(x, some).mean() for some in z])
    assert abs(one.mean() - expected.mean()) < 4 * ((one.var() + expected.var()) / 60) ** 0.5


def test_the_fcd_is_that_of_fcd_torch(moses: ModuleType) -> None:
    utils = importlib.import_module("fcd_torch.utils")
    texts = moses.molecules(60)
    test = moses.TestSet(set(texts[:30]), neighbours=5, num_test=2000)
    x = test.features(texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old calls of SciPy in fcd-torch
        theirs = utils.calculate_frechet_distance(
            test.mean.numpy(), test.cov.numpy(), x.mean(0).numpy(), x.T.cov().numpy()
        )
    assert test.distance(x).item() == pytest.approx(theirs, rel=1e-4)
    assert test.nearest(texts).amax() <= 1
    with moses.gzip.open(moses.file_of_molsets("test.csv.gz"), "rt") as file:
        known = file.read().split()[1:6]  # their fingerprints are the first of the statistics
    assert (test.nearest(known) == 1).all()
    assert moses.canonical("C1CC") is None and moses.canonical("") is None
    assert moses.canonical("OCC") == "CCO"
    assert moses.scaffold_of("CCO") is None


def test_the_jackknife_of_a_mean_is_its_standard_error(moses: ModuleType) -> None:
    blocks = torch.randn(20, 50)
    means = [blocks[torch.arange(20) != left_out].mean() for left_out in range(-1, 20)]
    expected = blocks.mean(1).std() / 20**0.5
    assert moses.jackknife_error(torch.stack(means)) == pytest.approx(expected.item(), rel=1e-4)


@pytest.fixture
def script(moses: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script at the size of a toy, where every string counts as a molecule."""
    module = load("molecules_moses", monkeypatch)
    known = ["C" * n + "c1ccccc1" + "O" * (n % 2) for n in range(1, 31)]
    monkeypatch.setattr(module, "molecules", lambda count: (known * count)[:count])
    monkeypatch.setattr(moses, "BLOCKS", 2)
    monkeypatch.setattr(module, "BATCH", 20)
    monkeypatch.setattr(module, "MIXTURES", (2,))
    monkeypatch.setattr(module, "QUICK", module.Size(100, 40, 60, 3, 24, 30, 5, 1.0))
    monkeypatch.setattr(module, "canonical", lambda text: known[len(text) % len(known)])
    argv = ["molecules_moses.py", "--quick", "--cache", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path / "rows.json")])
    return module


@pytest.mark.slow
def test_a_whole_run(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(script.METHODS)
    by_method = {row["method"]: row for row in rows}
    assert by_method[script.BASE]["closed"] == 0 and by_method[script.CEILING]["closed"] == 1
    assert all(0 <= row["novel"] <= 1 and row["fcd_low"] <= row["fcd"] for row in rows)

    def nothing_again(*_: Any) -> Tensor:
        raise AssertionError("An arm is measured again.")

    monkeypatch.setattr(script.Case, "measured", nothing_again)
    (tmp_path / "rows.json").unlink()
    script.main()  # from the cache
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows


def test_a_vae_that_writes_no_molecules_stops_the_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "canonical", lambda text: None)
    with pytest.raises(SystemExit, match="no prior can help"):
        script.main()
