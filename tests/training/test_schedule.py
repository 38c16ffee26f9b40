"""The schedule of head training, and the plateau of held-out losses that begins its decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ncprior.training.plateau import Plateau
from ncprior.training.schedule import Schedule

ROWS = 1000

NO_HEAD = 2 * math.log(2)  # nats


def noise(seed: int, scale: float, groups: int = 1, mean: float = 0.0) -> Tensor:
    """Numbers per group and row."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(groups, ROWS, generator=generator, dtype=torch.float64)
    return mean + scale * draws


def steps_of(schedule: Schedule, plateau_at: int | None = None) -> list[float]:
    """The rates of a whole training, whose held-out losses may be on a plateau from a step on."""
    found: list[float] = []
    while True:
        found.append(schedule.rate(len(found)))
        if schedule.after_step(len(found)) is not None:
            return found
        if plateau_at == len(found) and schedule.decay_from is None:
            schedule.decay_from = plateau_at


def test_every_number_of_steps_ends_in_a_decay_to_zero_in_a_fifth() -> None:
    for steps in range(1, 120):
        rates = steps_of(Schedule(1.0, steps))
        assert len(rates) == steps
        decay, warm_up = steps // 5, max(1, steps // 10)
        assert sum(rate == 1.0 for rate in rates) == steps - decay - warm_up + 1
        assert rates[-1] == pytest.approx(1 / (decay + 1))
        for begin in range(4, steps):
            cut = steps_of(Schedule(1.0, steps), begin)
            assert begin < len(cut) <= steps
            assert cut[-1] <= 0.5


def test_without_a_number_of_steps_the_rate_stays_until_the_decay() -> None:
    schedule = Schedule(2.0, None)
    assert [schedule.rate(taken) for taken in (0, 49, 99, 10**6)] == [0.02, 1.0, 2.0, 2.0]
    assert (schedule.after_step(10**6), schedule.last) == (None, None)
    schedule.decay_from = 1000
    assert schedule.last == 1250


def test_the_time_begins_the_decay_and_ends_it() -> None:
    schedule = Schedule(1.0, None, max_seconds=300.0)
    assert schedule.after_step(40) is None
    assert schedule.after_step(41, late=True) is None
    assert (schedule.decay_from, schedule.last) == (41, 51)
    assert schedule.after_step(51) == "300 s are over"
    schedule = Schedule(1.0, None, max_seconds=0.5)
    assert schedule.after_step(1, late=True, over=True) == "0.5 s are over"


def test_too_few_steps_are_said_in_words() -> None:
    """Losses that fall by 0.1 at each evaluation until step 60 or 80; the decay begins at 80."""
    for last_fall, falls in ((60, False), (80, True)):
        schedule = Schedule(1.0, 100, wait=1000)
        schedule.after_evaluation(0, noise(0, 1.0))
        for step in range(20, 101, 20):
            reason = schedule.after_step(step)
            if reason is None:
                fall = 0.1 * min(step, last_fall)
                schedule.after_evaluation(step, noise(0, 1.0, mean=-fall))
        assert reason is not None and reason.startswith("all 100 steps taken")
        assert ("still falling: more steps would help" in reason) is falls


# --- plateaus ---


def test_an_improvement_far_below_the_error_of_a_loss_is_seen() -> None:
    """A fall of 0.005 whose paired standard error is 0.001; that of the loss is 0.03."""
    first = noise(0, 1.0, mean=NO_HEAD)
    plateau = Plateau(first)
    plateau.update(first + noise(1, 0.03, mean=-0.005), 100)
    assert (plateau.since, plateau.worse) == ([100], False)
    plateau.update(first + noise(2, 0.03, mean=0.005), 200)
    assert (plateau.since, plateau.worse) == ([100], True)


@pytest.mark.parametrize("groups", [1, 30])
def test_noise_passes_for_an_improvement_in_two_percent(groups: int) -> None:
    """Of 400: 8 are expected, with a standard deviation of 3."""
    passed = 0
    for seed in range(400):
        plateau = Plateau(torch.zeros(groups, ROWS, dtype=torch.float64))
        plateau.update(noise(seed, 0.5, groups), 100)
        passed += max(plateau.since) > 0
    assert 0 < passed <= 8 + 4 * 3


def test_slow_progress_adds_up() -> None:
    """Each fall of 0.0004 is below what counts, 0.001; three of them are not."""
    plateau, improved = Plateau(torch.full((1, ROWS), NO_HEAD)), []
    for step in range(1, 13):
        plateau.update(torch.full((1, ROWS), NO_HEAD - 0.0004 * step), step)
        improved.append(plateau.since[0] == step)
    assert improved == 4 * [False, False, True]


@pytest.mark.parametrize(("fall", "since"), [(0.009, 0), (0.011, 100)])
def test_of_a_wide_gap_an_improvement_is_a_hundredth_of_the_gain(fall: float, since: int) -> None:
    """So far a head has gained 1 nat, and slow progress would go on for many times the steps."""
    plateau = Plateau(torch.full((1, ROWS), NO_HEAD - 1.0))
    plateau.update(torch.full((1, ROWS), NO_HEAD - 1.0 - fall), 100)
    assert plateau.since == [since]


def test_a_plateau_takes_a_third_of_the_steps() -> None:
    plateau = Plateau(torch.zeros(2, ROWS))
    plateau.since = [100, 200]
    assert [plateau.lasts(step, 50) for step in (240, 250, 299, 300)] == [
        False,
        False,
        False,
        True,
    ]
    assert [plateau.lasts(step, 150) for step in (300, 349, 350)] == [False, False, True]
