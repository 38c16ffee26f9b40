"""`improve` and the report on it, with a few steps of each part."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.device_vaes import codes, flat, rows, strays
from helpers.recipe import make_quick
from torch import Tensor

from ncprior import NCPrior, SingleGroup, improve, sir
from ncprior.recipe import report_on


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch, steps=20)


def test_improve(source: SingleGroup, on: torch.device, tmp_path: Path) -> None:
    prior = improve(source, rows(400), budget=5, seed=0, progress=False)
    assert not strays((list(prior.parameters()), prior.sample(8)), on)
    assert prior.report.verdict
    prior.report.save_html(tmp_path / "report.html")


def test_improve_of_codes(on: torch.device) -> None:
    torch.manual_seed(0)
    prior = improve(codes(on).source, rows(300), budget=5, seed=0, progress=False)
    assert not strays((list(prior.parameters()), prior.sample(8)), on)


def test_report_on(prior: NCPrior, x: Tensor) -> None:
    assert str(report_on(prior, x, sampler=partial(sir, num_proposals=5), num_rows=100))


def test_sources_of_other_devices_take_the_prior(
    prior: NCPrior, on: torch.device, tmp_path: Path
) -> None:
    prior.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert not strays(list(NCPrior.from_pretrained(flat(on), tmp_path).parameters()), on)
