"""The example with trajectories at toy size: its reading, scores, intervals and rows."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.recipe import make_quick
from torch.distributions import MultivariateNormal

from ncprior.testing import check_source


class Answer(io.BytesIO):
    """An answer of a server that breaks off, or not."""

    def __init__(self, text: bytes, *, breaks: bool) -> None:
        super().__init__(text)
        self.breaks = breaks

    def read(self, *size: int) -> bytes:
        if self.breaks:
            raise ConnectionResetError("broken off")
        return super().read(*size)


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delenv("NCPRIOR_DATA", raising=False)
    spec = importlib.util.spec_from_file_location("trajectories", EXAMPLES / "trajectories.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "trajectories", module)
    spec.loader.exec_module(module)
    return module


def recording(path: Path, seed: int, walkers: int = 12) -> None:
    """Walkers with constant speeds and turns, of 26 positions each, and one with a gap."""
    rng, lines = np.random.default_rng(seed), []
    for walker in range(walkers):
        angle, turn, speed = rng.uniform(0, 6.28), rng.normal(0, 0.1), rng.uniform(0.2, 0.6)
        xy = rng.uniform(-5, 5, 2)
        for t in range(26):
            angle += turn
            xy = xy + speed * np.array([math.cos(angle), math.sin(angle)])
            skipped = 100 if walker == 0 and t > 12 else 0  # frames
            lines.append((10 * t + skipped, walker, *xy))
    np.savetxt(path, np.array(lines), delimiter="\t")


@pytest.fixture
def folder(script: ModuleType, tmp_path: Path) -> Path:
    for seed, file in enumerate(script.FILES):
        recording(tmp_path / f"{file}.txt", seed)
    return tmp_path


def test_windows_have_no_gaps_and_one_frame_of_reference(script: ModuleType, folder: Path) -> None:
    found = script.load(("biwi_eth",), folder)
    assert len(found.past) == 11 * 7  # the walker with the gap has no 20 positions in a row
    assert set(found.pedestrian.tolist()) == set(range(1, 12))
    assert found.past[:, -1].abs().max() == 0
    step = found.past[:, -1] - found.past[:, -4]
    assert step[:, 1].abs().max() < 1e-5
    assert (step[:, 0] > 0).all()
    speeds = (found.future[:, 1:] - found.future[:, :-1]).norm(dim=-1)
    assert (speeds.std(1) < 1e-4).all()  # turning keeps lengths


def test_a_missing_file_is_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(script.urllib.request, "urlopen", offline)
    with pytest.raises(SystemExit, match=r"biwi_eth.txt is missing.*no network.*NCPRIOR_DATA/eth"):
        script.load(("biwi_eth",), tmp_path / "none")


def test_the_kernel_density_estimate_is_that_of_a_gaussian(script: ModuleType) -> None:
    """Draws of N(0, I) with a bandwidth of n^(-1/6) have about the density N(0, (1 + n^(-1/3)) I)."""
    drawn, x = torch.randn(1000, 1, 12, 2), torch.randn(50, 12, 2)
    nll = script.nll_of_kde(drawn.expand(-1, 50, -1, -1), x).mean().item()
    smooth = MultivariateNormal(torch.zeros(2), 1.1 * torch.eye(2))
    exact = -smooth.log_prob(x).mean().item()
    assert abs(nll - exact) < 0.02
    assert script.nll_of_kde(drawn[:50].expand(-1, 50, -1, -1), x + 100).max() == 20


def test_intervals_are_those_of_pedestrians(script: ModuleType) -> None:
    """100 pedestrians with 10 equal rows each: the error of the mean is that of 100 values."""
    values = torch.randn(100)
    mean, low, high = script.interval(values.repeat_interleave(10), torch.arange(1000) // 10)
    assert mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert high - low == pytest.approx(3.92 * values.std().item() / 10, rel=0.2)


@pytest.mark.parametrize("learned", [True, False])
def test_the_source_keeps_the_rules(script: ModuleType, folder: Path, learned: bool) -> None:
    rows = script.load(("biwi_eth",), folder)
    vae = script.TrajectoryVAE(latents=3, width=8, learned=learned).eval()
    x, c = rows.future[:6], rows.past[:6]
    check_source(vae.source(), (x, c), condition=c)
    p_c, p = vae.prior(c), vae.source().group(vae.source().start(6, condition=c)).prior
    assert torch.equal(p_c.mean, p.mean)


@pytest.mark.filterwarnings("ignore")
def test_rows_of_all_arms_are_made_once(
    script: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick(monkeypatch, steps=10)
    monkeypatch.setattr(script, "DRAWS", 20)
    out = tmp_path / "rows.json"
    values = {"--json": str(out), "--cache": str(tmp_path)}
    options = script.options_of([*(part for pair in values.items() for part in pair), "--quick"])
    options.steps, options.data, options.seconds = 10, folder, None
    assert options.scenes == ["zara1"]
    for _ in range(2):  # the second run only reads
        bench = script.Bench(options, {"prior": "learned", "steps": 10})
        rows = bench.add(
            partial(script.scene_rows, options, bench, "zara1", 0), scene="zara1", seed=0
        )
        monkeypatch.setattr(script, "measured", None)
    assert [row["method"] for row in rows] == [
        *("prior", "mixture", "NCP"),
        *("posterior (training rows)", "posterior (held-out rows)", "posterior (own future)"),
    ]
    for row in rows:
        for name in ("minADE", "minFDE", "KDE-NLL", "gain", "copies"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
    assert rows[0]["gain"] == 0
    assert json.loads(out.read_text())["rows"] == rows
    (mean,) = script.averaged([{**rows[0], "scene": name} for name in "abcd"])
    assert mean["minADE"] == pytest.approx(rows[0]["minADE"])
    width = rows[0]["minADE_high"] - rows[0]["minADE_low"]
    assert mean["minADE_high"] - mean["minADE_low"] == pytest.approx(width / 2)


def test_data_are_found_where_the_user_says(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: argparse.Namespace = script.options_of(["--cache", str(tmp_path)])
    assert options.data == tmp_path / "eth_ucy"
    monkeypatch.setenv("NCPRIOR_DATA", "/data")
    assert script.options_of([]).data == Path("/data/eth_ucy")


def test_a_download_that_breaks_off_leaves_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, breaks = tmp_path / "eth_ucy", True
    monkeypatch.setattr(
        script.urllib.request, "urlopen", lambda url: Answer(b"0 1 2 3\n", breaks=breaks)
    )
    with pytest.raises(SystemExit, match=r"cannot be downloaded \(broken off\)"):
        script.read("biwi_eth", folder)
    assert not folder.exists()
    breaks = False
    assert script.read("biwi_eth", folder).read_bytes() == b"0 1 2 3\n"
    assert [path.name for path in folder.iterdir()] == ["biwi_eth.txt"]
