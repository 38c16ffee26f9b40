"""The report as lines of text, as JSON and as a file."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.reports import choices, improvement

from ncprior.recipe import Candidate, Choice, Improvement
from ncprior.recipe.choices import digits_of, duration


def test_a_choice_is_one_line_with_its_numbers() -> None:
    timed, reasoned, bare = map(str, choices())
    assert timed == (
        "base: mixture of 100 (held-out log p -12.31 ± 0.04 nats; N(0, I) -14.90 ± 0.03; "
        "mixture of 10 -12.80 ± 0.04), 21 s"
    )
    assert reasoned == "heads: one per group – They lower the held-out loss by 0.4 nats, 95 s"
    assert bare == "sampler: sir(num_proposals=50)"


def test_a_choice_that_is_no_candidate_names_all_of_them() -> None:
    found = (Candidate("one", 1.0), Candidate("two", 2.0))
    assert str(Choice("base", "neither", candidates=found)) == "base: neither (one 1.00; two 2.00)"


@pytest.mark.parametrize(
    ("half", "digits"), [(4.0, 0), (0.5, 1), (0.04, 2), (0.02, 3), (0.011, 3), (1e-9, 4)]
)
def test_digits_show_the_interval(half: float, digits: int) -> None:
    wide = Candidate("wide", 0.0, -9.0, 9.0)
    assert digits_of([wide, Candidate("narrow", 1.0, 1 - half, 1 + half)]) == digits
    assert digits_of([Candidate("without", 1.0)]) == 2


def test_durations() -> None:
    seconds = (0.04, 0.94, 1.0, 119.4, 121.0, 7140.0, 7500.0, math.nan)
    expected = ["0.0 s", "0.9 s", "1 s", "119 s", "2 min", "119 min", "2 h 5 min", "-"]
    assert [duration(it) for it in seconds] == expected


def test_the_report_as_text_ends_with_the_verdict() -> None:
    report = improvement()
    assert str(report).splitlines() == [*map(str, report.choices), report.verdict]
    assert len(repr(report)) < 200  # not the tensors


def test_json_holds_everything_but_tensors() -> None:
    report = improvement(num_groups=2)
    values = json.loads(report.to_json())
    assert values == report.to_dict()
    assert values.keys() == {*Improvement._fields} - {"latents", "samples"}
    assert values["scores"]["fitted base"] == {"value": 0.1, "low": None, "high": None}
    assert values["choices"][0]["candidates"][2]["name"] == "mixture of 100"
    assert values["histories"][0]["rows"][0]["step"] == 50
    assert values["diagnosis"] == report.diagnosis.to_dict()  # type: ignore[union-attr]


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    report = improvement()
    report.save_html(path)
    assert path.read_text(encoding="utf-8") == report.to_html()

    def fails(x: torch.Tensor) -> None:
        raise RuntimeError("no paper")

    with pytest.raises(RuntimeError, match="no paper"):
        report.save_html(path, show=fails)
    assert path.read_text(encoding="utf-8") == report.to_html()
    assert [it.name for it in path.parent.iterdir()] == ["report.html"]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    report = improvement()
    with pytest.raises(TypeError, match="path must be of type str or PathLike"):
        report.save_html(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="show must be a function"):
        report.to_html(show="a figure")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must return a matplotlib figure; got None"):
        report.save_html(tmp_path / "report.html", show=lambda x: None)
    assert not list(tmp_path.iterdir())
