"""Record of the choices of a recipe: printed as they are made, and kept for the report."""

from __future__ import annotations

import math
import sys
import time

from huggingface_hub.utils import tqdm

from ncprior.recipe.choices import Choice
from ncprior.training.history import History
from ncprior.utils.distributed import rank


class Record:
    """Choices and histories of a recipe, and the time that is left.

    Arguments:
        progress: Whether to print each piece of work and each choice on standard error.
        max_seconds: Time for the whole recipe, in seconds, or ``None`` for no limit.
    """

    def __init__(self, *, progress: bool, max_seconds: float | None) -> None:
        self.progress = progress and rank() == 0
        self.started = time.monotonic()
        self.end = math.inf if max_seconds is None else self.started + max_seconds
        self.choices: list[Choice] = []
        self.histories: list[History] = []

    def add(self, choice: Choice) -> None:
        """Adds a choice and prints it."""
        self.choices.append(choice)
        if self.progress:
            tqdm.write(str(choice), file=sys.stderr)

    def begin(self, work: str) -> None:
        """Prints the work that begins."""
        if self.progress:
            tqdm.write(f"… {work}", file=sys.stderr)

    def seconds(self) -> float:
        """Returns the time since the start, in seconds."""
        return time.monotonic() - self.started

    def left(self, share: float = 1.0) -> float | None:
        """Returns a share of the time that is left, in seconds; ``None`` if there is no limit."""
        if math.isinf(self.end):
            return None
        return share * max(0.1, self.end - time.monotonic())

    def is_over(self) -> bool:
        """Returns whether no time is left."""
        return time.monotonic() > self.end

    def has_time_for(self, steps: int, share: float) -> bool:
        """Returns whether a share of the time that is left is enough for so many steps of training.

        They are taken to be as long as those of the first training.
        """
        left = self.left(share)
        rows = self.histories[0].rows if self.histories else []
        return left is None or not rows or steps * rows[-1].seconds <= left * rows[-1].step
