"""`fit` without a number of steps: it ends by itself, in time, and resumes in every phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import edit_checkpoint
from helpers.problems import GaussianPair
from helpers.toys import Ladder, ladder_prior, same, stir, weights
from torch import Tensor, nn

from ncprior import NCPrior, SingleGroup, fit
from ncprior.heads import MLPHead
from ncprior.training import FitSettings, History, Row
from ncprior.training.held_out import HeldOut, mean_and_error

QUIET = {"progress": False}

PROBLEM = GaussianPair(kl=0.5)


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncprior.training.schedule._WARM_UP", 6)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plateau is found soon, and held-out losses are of few draws."""
    monkeypatch.setattr("ncprior.training.plateau._WORTH", 0.3)
    monkeypatch.setattr("ncprior.training.held_out._HELD_OUT_DRAWS", 32)


class Linear(nn.Module):
    """The family of the exact log r: two numbers to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.a * PROBLEM.project(z) + self.b


SETTINGS = FitSettings(ema_decay=0.9)
SHORT: dict[str, Any] = {"batch_size": 64, "eval_every": 4, "patience": 4, "settings": SETTINGS}


def run(rate: float, **options: Any) -> tuple[History, NCPrior]:
    """Learns the two numbers."""
    torch.manual_seed(0)
    prior = NCPrior(PROBLEM.source(), Linear())
    x, held_out = PROBLEM.data(1000), PROBLEM.data(500)
    options = {**SHORT, "learning_rate": rate, "held_out": held_out, **options}
    return fit(prior, x, **options, **QUIET), prior


def test_it_ends_by_itself_at_the_least_loss() -> None:
    """What is left on a plateau: less than the least improvement, and two standard errors."""
    history, prior = run(0.05)
    assert "held-out loss has not improved since step" in history.stopped
    assert "; decayed over " in history.stopped
    last, x = history.rows[-1].step, PROBLEM.data(2000)
    exact = NCPrior(PROBLEM.source(), PROBLEM.head())
    cpu = torch.device("cpu")
    difference = HeldOut(x, prior, 64, seed=1)(cpu) - HeldOut(x, exact, 64, seed=1)(cpu)
    excess, error = mean_and_error(difference)
    assert -4 * error[0] < excess[0] < 0.002 + 4 * error[0]
    assert last < 400


def test_slower_progress_is_given_more_steps() -> None:
    fast, slow = (run(rate)[0] for rate in (0.05, 0.01))
    assert fast.rows[-1].step < 0.6 * slow.rows[-1].step
    assert slow.best_loss is not None and fast.best_loss is not None
    assert slow.best_loss[0] == pytest.approx(fast.best_loss[0], abs=0.005)


def test_nothing_to_learn_ends_as_soon_as_it_is_seen() -> None:
    torch.manual_seed(0)
    source = SingleGroup(PROBLEM.prior, lambda x: PROBLEM.prior.expand(x.shape[:1]), lambda z: z)
    history = fit(NCPrior(source, Linear()), PROBLEM.data(2000), **SHORT, **QUIET)
    assert history.rows[-1].step <= 20
    assert "since step 0" in history.stopped


def test_an_explicit_number_is_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(0.05, steps=400)[0].rows[-1].step == run(0.05)[0].rows[-1].step
    short = run(0.005, steps=50)[0]
    assert short.rows[-1].step == 50
    assert short.stopped.endswith("the held-out loss was still falling: more steps would help")
    torch.manual_seed(0)
    fit(NCPrior(PROBLEM.source(), Linear()), PROBLEM.data(400), **SHORT, learning_rate=0.05)
    bar = capsys.readouterr().err
    assert "stable rate, NCE" in bar and "decay, NCE" in bar


def test_steps_between_evaluations_grow_with_the_held_out_data() -> None:
    """At most 15 batches of held-out data are measured in 100 steps."""
    prior, rows = NCPrior(PROBLEM.source(), Linear()), []
    for count in (10, 150, 151):
        held_out = PROBLEM.data(count)
        history = fit(
            prior, PROBLEM.data(20), held_out=held_out, batch_size=10, steps=200, **QUIET
        )
        rows.append([row.step for row in history.rows])
    assert rows == [[100, 200], [100, 200], [200]]


# --- resume ---


class Stop(Exception):
    pass


def hierarchical(path: Path | None, seed: int, crash: int | None = None, **options: Any) -> Any:
    """Two groups with dropout, from a checkpoint if there is one."""

    def callback(row: Row) -> None:
        if crash is not None and row.step >= crash:
            raise Stop

    torch.manual_seed(7)
    prior = stir(ladder_prior(2, dropout=0.2))
    x, held_out = torch.randn(200, 3), torch.randn(50, 3)
    torch.manual_seed(seed)
    options = {**SHORT, "batch_size": 16, "learning_rate": 1e-2, **options}
    history = fit(
        *(prior, x),
        held_out=held_out,
        checkpoint=path,
        checkpoint_every=3,
        callback=callback,
        **options,
        **QUIET,
    )
    return prior, history


@pytest.fixture(scope="module")
def uninterrupted() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncprior.training.schedule._WARM_UP", 6)
        patch.setattr("ncprior.training.plateau._WORTH", 0.3)
        patch.setattr("ncprior.training.held_out._HELD_OUT_DRAWS", 32)
        return hierarchical(None, seed=1)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("phase", ["warm-up", "stable", "begin", "decay", "end"])
def test_it_resumes_bit_for_bit_in_every_phase(
    phase: str, uninterrupted: Any, tmp_path: Path
) -> None:
    expected, history = uninterrupted
    rates = [(row.step, row.learning_rate) for row in history.rows]
    begin = max(step for step, rate in rates if rate == 1e-2)
    assert 8 < begin < rates[-1][0] - 3
    crash = {"warm-up": 4, "stable": 8, "begin": begin, "decay": begin + 3, "end": rates[-1][0]}
    path = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        hierarchical(path, seed=1, crash=crash[phase])
    resumed, again = hierarchical(path, seed=2)
    assert same(weights(resumed), weights(expected))
    assert [row[:4] for row in again.rows] == [row[:4] for row in history.rows]
    assert again[1:] == history[1:]


@pytest.mark.usefixtures("soon")
def test_its_checkpoint_is_resumed_without_a_number_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        hierarchical(path, seed=1, crash=8)
    for name, value in {"steps": 100, "max_seconds": 60.0}.items():
        match = f"training with {name}=None; got {name}={value}.*another check"
        with pytest.raises(ValueError, match=match):
            hierarchical(path, seed=1, **{name: value})


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("decay_from", 0),
        ("decay_from", 10**6),
        ("decay_from", "soon"),
        ("limit", "sky"),
        ("limit", torch.zeros(2)),
        ("reference", None),
        ("reference", torch.zeros(2, 49)),
        ("reference", torch.full((2, 50), torch.nan)),
        ("since", None),
        ("since", [0]),
        ("since", [0, 10**6]),
        ("steps", 10**12),
    ],
)
def test_a_damaged_schedule_is_refused(entry: str, value: Any, tmp_path: Path) -> None:
    """10¹² steps taken: their batches would be skipped for years."""
    path = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        hierarchical(path, seed=1, crash=8)
    edit_checkpoint(path, lambda state: state.update({entry: value}))
    with pytest.raises(ValueError, match=f"its .*{entry}.* cannot be used here"):
        hierarchical(path, seed=1)


# --- time ---


class Clock:
    """Seconds that pass when a batch is encoded, and never otherwise."""

    def __init__(self) -> None:
        self.now, self.each = 100.0, 1.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    encode = Ladder.encode

    def slow(self: Ladder, x: Any) -> Tensor:
        clock.now += clock.each
        return encode(self, x)

    monkeypatch.setattr(Ladder, "encode", slow)
    yield clock


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("steps", [None, 1000])
def test_the_decay_ends_in_time(steps: int | None, clock: Clock) -> None:
    """An evaluation takes 4 s, and a step 1 s."""
    _, history = hierarchical(None, seed=1, steps=steps, patience=100, max_seconds=60)
    assert history.stopped.startswith("60 s are over")
    assert 45 < history.rows[-1].seconds <= 62
    assert clock.now - 100 <= 62
    assert history.rows[-1].learning_rate < 0.003


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("factor", [0.01, 5.0])
def test_a_machine_that_changes_its_speed_is_noticed(factor: float, clock: Clock) -> None:
    """It becomes faster or slower at step 12; a step takes up to 5 s then."""

    def change(row: Row) -> None:
        if row.step == 12:
            clock.each = factor

    torch.manual_seed(7)
    prior, x = stir(ladder_prior(2)), torch.randn(200, 3)
    options = {**SHORT, "patience": 1000, "held_out": x[:50], "steps": 100, "callback": change}
    history = fit(prior, x, **options, max_seconds=60, **QUIET)
    assert history.rows[-1].seconds <= 1.5 * 60
    assert history.stopped.startswith("60 s are over" if factor > 1 else "all 100 steps taken")


@pytest.mark.usefixtures("soon")
def test_where_the_decay_begins_is_kept(clock: Clock, tmp_path: Path) -> None:
    """Though the machine is faster after the interruption."""
    path, options = tmp_path / "checkpoint", {"patience": 100, "max_seconds": 60}
    _, history = hierarchical(None, seed=1, **options)
    with pytest.raises(Stop):
        hierarchical(path, seed=1, crash=history.rows[-1].step, **options)
    clock.each = 0.001
    _, again = hierarchical(path, seed=2, **options)
    assert [row[:4] for row in again.rows] == [row[:4] for row in history.rows]


def test_all_stages_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    source = PROBLEM.source()
    encode = source.encode

    def slow(x: Any) -> Any:
        now[0] += 1.0
        return encode(x)

    source.encode = slow  # type: ignore[method-assign]
    torch.manual_seed(0)
    x = PROBLEM.data(400)
    options = {**SHORT, "held_out": x[:64], "patience": 1000}
    prior = NCPrior(source, MLPHead((2,), width=8, depth=1))
    history = fit(prior, x, stages=2, max_seconds=100, **options, **QUIET)
    assert 80 < now[0] < 110
    assert history.stopped.startswith("50 s are over")
    assert [h.stopped[:13] for h in history.stages] == ["50 s are over"]
