"""Waits of the host for a device, counted, with the lines that they come from."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

import ncprior

_PACKAGE = str(Path(ncprior.__file__).parent)

_HERE = str(Path(__file__).parent)


class Waits(Counter[str]):
    """Number of waits by line of the package, ``samplers/sir.py:140 item``."""

    def __call__(self, what: str) -> None:
        """Counts a wait where it is made; torch's own checks of arguments count there, too."""
        self[f"{_line(sys._getframe(1))} {what}"] += 1


class _Reports:
    """Passes waits of the emulated device on to those who count."""

    def __init__(self) -> None:
        self.counting: list[Waits] = []

    def __call__(self, what: str) -> None:
        for waits in self.counting:
            waits(what)


REPORTS = _Reports()


@contextmanager
def counted(*, emulated: bool) -> Iterator[Waits]:
    """Counts waits for the emulated device, or for a real GPU by torch's own warnings."""
    waits = Waits()
    if emulated:
        REPORTS.counting.append(waits)
        try:
            yield waits
        finally:
            REPORTS.counting.remove(waits)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *a, **k: (
            waits(str(message)) if "synchroniz" in str(message) else None
        )
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _line(frame: FrameType | None) -> str:
    """The innermost line of the package, or of anything but torch."""
    others = []
    while frame is not None:
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if place.startswith(_PACKAGE):
            return place.removeprefix(_PACKAGE + "/")
        if not place.startswith(_HERE):
            others.append(place)
        frame = frame.f_back
    return next((place for place in others if "/torch/" not in place), "?")
