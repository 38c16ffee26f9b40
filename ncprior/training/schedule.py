"""Schedule of head training: warm-up, stable learning rate and decay, and when each begins."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ncprior.training.checkpoints import Validators, are_numbers, is_finite, is_like, is_step
from ncprior.training.plateau import Plateau

_WARM_UP = 100  # steps, and at most a tenth of a given number

_DECAY = 4  # steps before the decay, per step of it

_LIMITS = _PLATEAU, _STEPS, _SECONDS = "plateau", "steps", "seconds"  # they begin the decay


class Schedule:
    """Learning rate that rises linearly, stays, and falls linearly to 0.

    The decay takes a fifth of all steps. It begins when held-out losses are on a plateau, or in
    time for the last step or the end of the time.

    Arguments:
        learning_rate: The rate of the stable phase.
        steps: The largest number of steps, or ``None``.
        max_seconds: The largest time, for words alone, or ``None``.
        wait: The least number of steps of a plateau; ``None`` ignores plateaus.

    Attributes:
        decay_from: Number of steps before the decay, or ``None`` while that is not decided.
        limit: What has begun the decay or ended it, or ``None``.
        plateau: The held-out losses so far, or ``None``.

    Example:
        >>> schedule = Schedule(1.0, steps=20)
        >>> [round(schedule.rate(taken), 2) for taken in (0, 1, 15)]
        [0.5, 1.0, 1.0]
        >>> schedule.after_step(16), [round(schedule.rate(16 + n), 2) for n in range(4)]
        (None, [0.8, 0.6, 0.4, 0.2])
        >>> schedule.after_step(20)
        'all 20 steps taken'
    """

    def __init__(
        self,
        learning_rate: float,
        steps: int | None,
        *,
        max_seconds: float | None = None,
        wait: int | None = None,
    ) -> None:
        self.learning_rate, self.steps = float(learning_rate), steps
        self.max_seconds, self.wait = max_seconds, wait
        self.warm_up = _WARM_UP if steps is None else min(_WARM_UP, steps // 10)
        self.decay_from: int | None = None
        self.limit: str | None = None
        self.plateau: Plateau | None = None

    @property
    def latest(self) -> float:
        """The largest number of steps before the decay."""
        return math.inf if self.steps is None else self.steps - self.steps // (1 + _DECAY)

    @property
    def last(self) -> int | None:
        """Number of all steps, as far as it is decided."""
        if self.decay_from is None or self.decay_from == self.latest:
            return self.steps
        return self.decay_from + decay_steps(self.decay_from)

    @property
    def phase(self) -> str:
        """The phase of the next step, for the progress bar."""
        return "stable rate" if self.decay_from is None else "decay"

    def rate(self, taken: int) -> float:
        """Returns the learning rate of the next step.

        Arguments:
            taken: Number of steps taken so far.
        """
        begin, last = self.decay_from, self.last
        if begin is None or last is None:
            return self.learning_rate * min(1.0, (taken + 1) / max(1, self.warm_up))
        reached = min(1.0, (begin + 1) / max(1, self.warm_up))  # of the warm-up
        return self.learning_rate * reached * (last - taken) / (last - begin + 1)

    def after_step(self, taken: int, *, late: bool = False, over: bool = False) -> str | None:
        """Begins the decay in time, and returns the reason if training ends here.

        Arguments:
            taken: Number of steps taken so far.
            late: Whether there is just enough time for the decay.
            over: Whether the time is over.
        """
        if self.decay_from is None and (late or over or taken >= self.latest):
            self.decay_from, self.limit = taken, _SECONDS if late or over else _STEPS
        if over:
            self.limit = _SECONDS
        return self._reason(taken) if over or taken == self.last else None

    def after_evaluation(self, taken: int, losses: Tensor) -> str | None:
        """Begins the decay on a plateau, and returns the reason if training ends here.

        Arguments:
            taken: Number of steps taken so far.
            losses: Held-out losses, with shape ``(K, N)``.
        """
        if self.plateau is None:
            self.plateau = Plateau(losses)
        if self.decay_from is not None and taken > self.decay_from:
            return None
        self.plateau.update(losses, taken)
        if self.decay_from is not None or self.wait is None:
            return None
        if not self.plateau.lasts(taken, self.wait):
            return None
        if self.plateau.worse:
            return f"held-out loss has risen since step {max(self.plateau.since)}"
        self.decay_from, self.limit = taken, _PLATEAU
        return self._reason(taken) if taken == self.last else None

    def _reason(self, taken: int) -> str:
        """Reason why training has ended, in words."""
        begun, plateau = self.decay_from or taken, self.plateau
        if plateau is not None and self.limit == _PLATEAU:
            return (
                f"held-out loss has not improved since step {max(plateau.since)}; decayed over "
                f"{taken - begun} steps"
            )
        more, reason = "steps", f"all {taken} steps taken"
        if self.limit == _SECONDS and self.max_seconds is not None:
            more, reason = "time", f"{round(self.max_seconds, 1):g} s are over"
        if plateau is not None and plateau.still_falls(begun):
            return f"{reason}; the held-out loss was still falling: more {more} would help"
        return reason

    def state(self) -> dict[str, Any]:
        """Returns the entries of a checkpoint."""
        return {
            "decay_from": self.decay_from,
            "limit": self.limit,
            "reference": None if self.plateau is None else self.plateau.reference,
            "since": None if self.plateau is None else self.plateau.since,
        }

    def validators(self, like: tuple[int, int] | None, last: int) -> Validators:
        """Returns a check of each entry of a checkpoint.

        Arguments:
            like: Numbers of groups and of held-out rows, or ``None`` without held-out losses.
            last: Number of steps taken.
        """
        reference = None if like is None else torch.zeros(like)

        def are_steps(value: Any) -> bool:  # noqa: ANN401
            if like is None:
                return value is None
            return are_numbers(value, like[0], (int,)) and all(is_step(s, last) for s in value)

        return {
            "decay_from": lambda v: v is None or (is_step(v, last) and 0 < v <= self.latest),
            "limit": lambda v: v is None or (isinstance(v, str) and v in _LIMITS),
            "reference": lambda v: is_like(v, reference) and (v is None or is_finite({0: v})),
            "since": are_steps,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Resumes from the entries of a checkpoint."""
        self.decay_from, self.limit = saved["decay_from"], saved["limit"]
        if saved["reference"] is not None:
            self.plateau = Plateau(saved["reference"])
            self.plateau.since = saved["since"]


def decay_steps(taken: int) -> int:
    """Returns the number of steps of a decay after so many steps."""
    return taken // _DECAY
