"""`improve` in a second: one size of heads, and classifiers that are trained for a few steps."""

import pytest

from ncprior.recipe import heads, joint, judge


def make_quick(patch: pytest.MonkeyPatch, *, steps: int = 300) -> None:
    """Lets heads and classifiers take a few steps only."""
    patch.setattr(heads, "_SMALL", ())
    patch.setattr(heads, "_LARGE", heads._Kind(8, 0.0, 1e-2))
    patch.setattr(heads, "_MOST_STEPS", steps)
    patch.setattr(heads, "_MOST_WITH_SCORES", steps)
    patch.setattr(joint, "_MOST_STEPS", steps)
    patch.setattr(judge, "_STEPS", 60)
    patch.setattr(judge, "_CACHED", (500, 3000))
