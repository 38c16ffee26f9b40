"""The last fit: chosen base and heads once more, on nearly all rows of a small data set."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ncprior.prior import NCPrior
from ncprior.recipe.base_file import saved_base
from ncprior.recipe.choices import OWN, Choice
from ncprior.recipe.heads import train_heads
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.recipe.sampler import choose_strength
from ncprior.recipe.sources import off
from ncprior.source import LatentSource

_NAME = "refit "  # in front of choices and files


def refit(
    prior: NCPrior,
    source: LatentSource[Any, Any],
    parts: Parts,
    record: Record,
    folder: Path | None,
) -> NCPrior:
    """Returns the prior of the same choices, fitted to more rows.

    Choices and report need rows that nothing was fitted to: a quarter of few rows. Once they are
    made, base and heads are fitted again, with a tenth of all rows held out to stop the training, and
    for the strength. The sampler stays. If the base is no longer better than the VAE's own prior, or
    there is too little time, the prior stays as it is.

    Arguments:
        prior: The prior with one group, and its sampler.
        source: The VAE.
        parts: The parts of all rows.
        record: The record of the recipe, to which the choices are added.
        folder: The folder of the checkpoint, if any.
    """
    chosen = {choice.part: choice for choice in record.choices}
    base, heads = chosen["base"], chosen["heads"]
    if not any(prior.active) and OWN in (base.chosen, chosen["keep"].chosen):
        return prior  # the VAE's own prior
    left, needed = record.left(), _seconds(base, heads)
    if left is not None and left < needed:
        reason = f"too little time to fit base and heads once more, which takes {needed:.0f} s"
        record.add(Choice("refit", "none", reason))
        return prior
    based = saved_base(folder, source, parts, record, only=base.chosen, name=_NAME)
    if record.choices[-1].chosen != base.chosen:
        return prior
    if not any(prior.active):
        return off(NCPrior(based, prior.heads))
    again = train_heads(based, parts, record, folder, only=heads.chosen, name=_NAME)
    again.sampler = prior.sampler
    if any(again.active):
        choose_strength(again, parts, record, name=_NAME)
        return again
    return off(again)


def _seconds(base: Choice, heads: Choice) -> float:
    """Seconds that the fit of the base and the training of the chosen heads took."""
    spent = [base.seconds, *(it.seconds for it in heads.candidates if it.name == heads.chosen)]
    return sum(seconds for seconds in spent if not math.isnan(seconds))
