"""The last fit of `improve`: all rows but a tenth, by choices that were made with fewer."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.problems import Ring
from helpers.recipe import make_quick
from torch import Tensor

from ncprior import NCPrior, improve
from ncprior.bases import GaussianMixture
from ncprior.recipe import base, heads, parts, sources
from ncprior.recipe import refit as recipe_refit
from ncprior.recipe.choices import OWN, Candidate, Choice
from ncprior.recipe.record import Record
from ncprior.training import History

OPTIONS: dict[str, Any] = {"budget": 5, "seed": 3, "progress": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    monkeypatch.setattr(base, "_SIZES_OF_FEW", (1,))  # heads have a ring to find


def chosen(prior: NCPrior) -> dict[str, str]:
    return {choice.part: choice.chosen for choice in prior.report.choices}


@pytest.mark.parametrize(
    ("rows", "train"), [(64, 56), (100, 90), (2000, 1800), (6900, 6210), (7100, None)]
)
def test_a_tenth_is_held_out_from_the_last_fit(rows: int, train: int | None) -> None:
    """At least 8 rows; with 7,000 rows, a seventh is held out before, and 5 % more are not worth it."""
    x = torch.arange(rows)
    first = parts.parts_of(x, None, seed=0)
    last = parts.parts_for_last_fit(x, first, seed=1)
    assert (last and len(last.train)) == train
    if last is not None:
        both = [part[torch.arange(len(part))] for part in (last.train, last.choose)]
        assert torch.equal(torch.cat(both).sort()[0], x)
        assert last.num_train == train


def test_base_and_heads_are_fitted_to_all_rows_but_a_tenth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that were held out for choices and report, too."""
    x, fitted, trained = Ring().data(400), list[Tensor](), list[Tensor]()
    fit_mixture, fit = base.fit_mixture, heads.fit

    def mixture(z: Tensor, size: int, **options: Any) -> GaussianMixture:
        fitted.append(z)
        return fit_mixture(z, size, **options)

    def heads_of(prior: NCPrior, data: Tensor, **options: Any) -> Any:
        trained.append(data)
        return fit(prior, data, **options)

    monkeypatch.setattr(base, "fit_mixture", mixture)
    monkeypatch.setattr(heads, "fit", heads_of)
    prior = improve(Ring().source(), x, **OPTIONS)
    made = chosen(prior)
    assert made["refit base"] == made["base"]
    assert {len(data) for data in trained[:-1]} == {300} and len(trained[-1]) == 360
    draws = 10  # of z per row
    assert len(fitted[0]) == 300 * draws and len(fitted[-1]) == 360 * draws
    assert prior.sampler is not None and "refit strength" in made
    assert prior.source.num_groups == 1 and any(prior.active)
    z = prior.sample(2000).latents[0]
    assert abs(z.norm(dim=1).mean() - 2.0) < 0.15


def test_rows_of_held_out_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x = Ring().data(400)
    prior = improve(Ring().source(), x[:300], held_out=x[300:], **OPTIONS)
    assert not any(part.startswith("refit") for part in chosen(prior))


def test_the_report_is_of_the_prior_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows have not been trained on: with and without the last fit, it says the same."""
    x = Ring().data(400)
    whole = improve(Ring().source(), x, **OPTIONS)
    improve_module = sys.modules["ncprior.recipe.improve"]
    monkeypatch.setattr(improve_module, "parts_for_last_fit", lambda *_: None)
    before = improve(Ring().source(), x, **OPTIONS)
    said = " It was then fitted once more, to 360 rows; the numbers are of the one before."
    assert whole.report.verdict == before.report.verdict + said
    assert whole.report.scores == before.report.scores
    count = len(before.report.choices)
    assert [it.chosen for it in whole.report.choices[:count]] == list(chosen(before).values())
    assert not torch.equal(
        *(torch.cat([p.flatten() for p in it.heads.parameters()]) for it in (whole, before))
    )


def test_without_heads_the_base_is_fitted_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(prior: NCPrior, _history: History) -> tuple[int, ...]:
        prior.active = [False]
        return (0,)

    monkeypatch.setattr(heads, "gate", off)
    prior = improve(Ring().source(), Ring().data(400), **OPTIONS)
    made = chosen(prior)
    assert made["refit base"] == made["base"] and "refit heads" not in made
    assert not any(prior.active) and prior.strength == 1
    assert isinstance(prior.source.prior, GaussianMixture)


def record_of(**seconds: float) -> Record:
    """Record of a run that has chosen a mixture and heads that took so many seconds."""
    record = Record(progress=False, max_seconds=seconds.pop("max_seconds", None))
    candidates = (
        Candidate("wide", 1.0, seconds=seconds["heads"]),
        Candidate("small", 2.0, seconds=1e9),
    )
    record.choices = [
        Choice("base", "Gaussian", seconds=seconds["base"]),
        Choice("heads", "wide", candidates=candidates, seconds=1e9),
        Choice("keep", "heads"),
    ]
    return record


@pytest.mark.parametrize(("spent", "fits"), [(30.0, False), (1.0, True), (math.nan, True)])
def test_too_little_time_is_said(
    spent: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 s are left: enough for base and heads that took 1 s each, and for a base that was not fitted."""
    asked: list[str] = []

    def based(*_: Any, only: str, name: str) -> Any:
        asked.append(only)
        record.add(Choice(f"{name}base", OWN))  # no longer better than the VAE's own prior
        return None

    monkeypatch.setattr(recipe_refit, "saved_base", based)
    record = record_of(max_seconds=20.0, base=spent, heads=min(spent, 2.0))
    source = Ring().source()
    prior = NCPrior.for_source(source, Ring().data(64))
    rows = parts.parts_of(torch.randn(100, 2), None, seed=0)
    assert recipe_refit.refit(prior, source, rows, record, None) is prior
    assert asked == (["Gaussian"] if fits else [])
    last = record.choices[-1]
    assert (last.part, last.chosen) == (("refit base", OWN) if fits else ("refit", "none"))
    assert fits or "which takes 32 s" in last.reason


def test_the_vae_s_own_prior_is_not_fitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_refit, "saved_base", lambda *_, **__: pytest.fail("nothing to fit"))
    record = record_of(base=1.0, heads=1.0)
    record.choices[-1] = Choice("keep", OWN)
    source = Ring().source()
    prior = sources.off(NCPrior.for_source(source, Ring().data(64)))
    rows = parts.parts_of(torch.randn(100, 2), None, seed=0)
    assert recipe_refit.refit(prior, source, rows, record, None) is prior


def test_a_last_fit_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, options = Ring().data(400), {**OPTIONS, "checkpoint": tmp_path}
    whole = improve(Ring().source(), x, **options)
    assert {"refit-base.safetensors", "refit-heads-0"} <= {
        file.name for file in tmp_path.iterdir()
    }
    trained = (tmp_path / "refit-heads-0").stat().st_mtime_ns
    again = improve(Ring().source(), x, **options)
    assert (tmp_path / "refit-heads-0").stat().st_mtime_ns == trained
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
