"""`improve` with little time: its report draws fewer rows, and leaves out the fresh heads."""

import sys
from typing import Any

import pytest
import torch
from helpers.problems import Ring
from helpers.recipe import make_quick

from ncprior import improve
from ncprior.diagnostics import Report, diagnose
from ncprior.recipe import measure
from ncprior.recipe.choices import NEW, POSTERIOR
from ncprior.recipe.record import Record
from ncprior.training import History
from ncprior.training.history import Row


@pytest.mark.parametrize("has_time", [True, False])
def test_a_report_is_as_long_as_there_is_time_for(
    has_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick(monkeypatch)
    asked: list[Any] = []

    def rows_in_time(prior: Any, data: Any, limits: tuple[int, int], seconds: Any) -> int:
        asked.append((limits, seconds))
        return 70

    def has_time_for(record: Record, steps: int, share: float) -> bool:
        asked.append((steps, share))
        return has_time

    monkeypatch.setattr(sys.modules["ncprior.recipe.improve"], "rows_in_time", rows_in_time)

    def diagnosed(*arguments: Any, fresh_steps: int, **options: Any) -> Report:
        asked.append(fresh_steps)
        return diagnose(*arguments, fresh_steps=0, **options)

    monkeypatch.setattr(Record, "has_time_for", has_time_for)
    monkeypatch.setattr(measure, "diagnose", diagnosed)
    torch.manual_seed(0)
    ring = Ring()
    report = improve(ring.source(), ring.data(3000), budget=20, seed=0, progress=False).report
    assert asked == [((64, 2000), None), (200, 0.4), 200 if has_time else 0]
    assert len(report.latents[NEW]) == len(report.latents[POSTERIOR]) == 70


def test_further_steps_take_as_long_as_those_of_the_first_training() -> None:
    """100 steps took 50 s: 200 more take 100 s."""
    history = History([Row(100, [1.0], [1.0], 1e-3, 50.0)], [100], [1.0], [0.1], "")
    for seconds, enough in ((260.0, True), (240.0, False), (None, True)):
        record = Record(progress=False, max_seconds=seconds)
        assert record.has_time_for(200, 0.4)  # nothing was trained yet
        record.histories.append(history)
        assert record.has_time_for(200, 0.4) == enough
