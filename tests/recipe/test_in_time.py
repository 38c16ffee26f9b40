"""`improve` with little time: its report draws fewer rows, and leaves out the fresh heads."""

import sys
import time
from typing import Any

import pytest
import torch
from helpers.problems import Ring
from helpers.recipe import make_quick
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import SingleGroup, improve
from ncprior.diagnostics import Report, diagnose
from ncprior.recipe import heads, measure
from ncprior.recipe.choices import NEW, POSTERIOR
from ncprior.recipe.parts import parts_of
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


def test_the_heads_share_their_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sizes get 20 s each, 0.6 of 100 s: parts of that time were unequal, and 77 s in all."""
    limits: list[float] = []
    now = [0.0]

    def trained(*_: Any, max_seconds: float, **__: Any) -> History:
        limits.append(max_seconds)
        now[0] += max_seconds
        return History([Row(100, [1.2], [1.2], 1e-3, 1.0)], [100], [1.2], [0.1], "")

    monkeypatch.setattr(heads, "fit", trained)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    record = Record(progress=False, max_seconds=100.0)
    heads.train_heads(Ring().source(), parts_of(Ring().data(400), None, 0), record, None)
    assert limits == [pytest.approx(20.0)] * 3


def test_a_slow_encoder_sees_each_row_once_before_bases_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two modes, and an encoder of a millisecond per row: a mixture is found in spite of the limit."""
    make_quick(monkeypatch, steps=10)
    encoded: list[int] = []
    monkeypatch.setattr(time, "monotonic", lambda: 1e-3 * sum(encoded))  # nothing else takes time

    def posterior(x: Tensor) -> Independent:
        encoded.append(len(x))
        return Independent(Normal(x, 0.1), 1)

    prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    torch.manual_seed(0)
    x = 0.3 * torch.randn(2000, 2) + 2.0 * torch.randint(2, (2000, 1)) - 1
    improved = improve(
        SingleGroup(prior, posterior, lambda z: z), x, budget=20, max_seconds=4, progress=False
    )
    base = next(choice for choice in improved.report.choices if choice.part == "base")
    assert base.chosen.startswith("mixture of 10") or "average of 4" in base.chosen
    assert max(encoded) == 1000 and encoded.count(1000) <= 2  # training data in batches of 1,000


def test_a_latent_that_is_a_number_keeps_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch, steps=10)
    source = SingleGroup(Normal(torch.tensor(0.0), 1.0), lambda x: Normal(x[:, 0], 0.1), _column)
    torch.manual_seed(0)
    improved = improve(source, torch.randn(300, 1) + 1, seed=0, progress=False)
    assert "needs an axis" in improved.report.choices[0].reason
    assert improved.sample(4).x.shape == (4, 1)


def _column(z: Tensor) -> Tensor:
    return z[..., None]


def test_one_evaluation_is_no_budget() -> None:
    ring = Ring()
    with pytest.raises(ValueError, match=r"budget must be a whole number in \[2, inf\); got 1"):
        improve(ring.source(), ring.data(300), budget=1, progress=False)
