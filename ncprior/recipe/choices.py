"""Choices of a recipe with their evidence, and the names of the arms that a report compares."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

# The arms of a report, by the names that the page shows.
DATA, OLD, BASE, GROUPS, NEW, POSTERIOR = (
    "held-out data",
    "old prior",
    "fitted base",
    "heads of the groups",  # without the joint head
    "new prior",
    "posterior",
)

OWN = "the VAE's own prior"  # as a candidate


class Score(NamedTuple):
    """Score with its confidence interval.

    Attributes:
        value: The score.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float = math.nan
    high: float = math.nan


class Candidate(NamedTuple):
    """One of the candidates of a choice, with its score.

    Attributes:
        name: The candidate, such as ``"mixture of 10"``.
        score: Its score on held-out data.
        low: Lower end of the confidence interval of the score, or NaN.
        high: Upper end of the confidence interval of the score, or NaN.
        seconds: Time that the candidate took, in seconds, or NaN.
    """

    name: str
    score: float
    low: float = math.nan
    high: float = math.nan
    seconds: float = math.nan


class Choice(NamedTuple):
    """One choice of a recipe; ``str(choice)`` is one line with its numbers.

    Attributes:
        part: The part that was chosen, such as ``"base"``.
        chosen: The choice, such as ``"mixture of 100"``; the name of a candidate if there are any.
        reason: The reason in one sentence.
        candidates: All candidates with their scores.
        criterion: Name of the score, such as ``"held-out log p"``.
        unit: Unit of the score, such as ``"nats"``.
        higher_is_better: Whether the candidate with the highest score is the best.
        seconds: Time that the choice took, in seconds.
    """

    part: str
    chosen: str
    reason: str = ""
    candidates: tuple[Candidate, ...] = ()
    criterion: str = ""
    unit: str = ""
    higher_is_better: bool = True
    seconds: float = math.nan

    def __str__(self) -> str:
        digits = digits_of(self.candidates)
        named = [(it.name == self.chosen, it.name, scored(it, digits)) for it in self.candidates]
        scores = [
            text if chosen else f"{name} {text}"
            for chosen, name, text in sorted(named, key=_later)
        ]
        if scores:
            scores[0] = " ".join(filter(None, (self.criterion, scores[0], self.unit)))
        evidence = f" ({'; '.join(scores)})" if scores else ""
        reason = f" – {self.reason.rstrip('.')}" if self.reason and not scores else ""
        time = f", {duration(self.seconds)}" if math.isfinite(self.seconds) else ""
        return f"{self.part}: {self.chosen}{evidence}{reason}{time}"


def _later(named: tuple[bool, str, str]) -> bool:
    return not named[0]


def scored(candidate: Candidate, digits: int) -> str:
    """The score of a candidate as text, with the distance to the further end of its interval."""
    half = _half(candidate)
    error = f" ± {decimals(half, digits)}" if math.isfinite(half) else ""
    return decimals(candidate.score, digits) + error


def digits_of(candidates: Iterable[Candidate]) -> int:
    """Digits behind the point that show the narrowest interval with one digit, or two if it is small."""
    halves = [_half(it) for it in candidates if it.high > it.low]
    return max(0, min(4, math.ceil(-math.log10(min(halves) / 3)))) if halves else 2


def _half(it: Candidate) -> float:
    return max(it.high - it.score, it.score - it.low)


def decimals(value: float, digits: int = 2) -> str:
    """Number with a fixed number of digits behind the point, thousands apart; ``"-"`` for NaN."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """Duration as text: in seconds below two minutes, else in minutes or hours."""
    if math.isnan(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
