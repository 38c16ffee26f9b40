"""A head for all groups of a VAE together, which chooses among a few walks of the trained prior."""

from __future__ import annotations

import math
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

from ncprior.bases.joint import JointSource
from ncprior.data.stream import first_batch
from ncprior.prior import NCPrior
from ncprior.recipe.choices import NEW, OLD, Choice
from ncprior.recipe.heads import walk_cache
from ncprior.recipe.judge import Gap
from ncprior.recipe.parts import Parts, draws_to_store, first_group
from ncprior.recipe.record import Record
from ncprior.recipe.sampler import choose_sampler, keep_what_helps
from ncprior.samplers.sir import sir
from ncprior.source import device_of
from ncprior.training.fit import fit
from ncprior.training.gating import gate
from ncprior.training.settings import FitSettings
from ncprior.training.stages import cache_size
from ncprior.utils.precision import fast_precision

WALKS = 4  # that the joint head chooses among: each has its part of the budget

_FEWEST_EACH = 2  # evaluations per walk

_PROBED = 512  # rows for the shapes and scales of the head

_MOST_STEPS = 4000

_RATE = 2e-3

_SHARE = 0.5  # of the time that is left

_PER_ROW, _DRAWN = 2, (2000, 50_000)  # walks per row of training data, at least and at most

_TIMED = 256  # walks


def join_groups(
    prior: NCPrior,
    gaps: dict[str, Gap],
    parts: Parts,
    budget: int,
    record: Record,
    folder: Path | None,
) -> tuple[NCPrior, dict[str, Gap]]:
    """Returns a prior with one more head for all groups, if it brings draws closer to the encodings.

    Each of its draws is chosen among four walks, which share the budget. It is compared with a prior
    whose every walk has the whole budget.

    Arguments:
        prior: A prior with a head for each of several groups.
        gaps: Its gaps.
        parts: The data.
        budget: Evaluations per sample of the head of each group.
        record: The record of the recipe.
        folder: A folder for the training, or ``None``.

    Returns:
        The prior to use and its gaps. The given ones, if the joint head does not help, or if there
        can be none: with one group, with a condition, with codes, or with a small budget.
    """
    several, enough = prior.source.num_groups > 1, budget >= WALKS * _FEWEST_EACH
    if not (several and enough) or first_group(prior.source, parts.choose).context is not None:
        return prior, gaps
    started, first = time.monotonic(), deepcopy(prior)
    choose_sampler(first, parts, budget // WALKS, record, name="walk ")
    try:
        source, alone = JointSource(first), JointSource(prior)
    except TypeError:  # codes
        return prior, gaps
    saved = None if folder is None else folder / f"joint-{budget}"
    whole, reason = _trained(source, parts, record, saved)
    chosen = "none" if whole is None else f"one of {WALKS} walks"
    record.add(Choice("joint head", chosen, reason, seconds=time.monotonic() - started))
    if whole is None:
        return prior, gaps
    joint = keep_what_helps(whole, parts, record, base=alone)
    if any(whole.active):
        return whole, joint
    return prior, {arm: joint[arm] for arm in (OLD, NEW) if arm in joint}


def _trained(
    source: JointSource, parts: Parts, record: Record, checkpoint: Path | None
) -> tuple[NCPrior | None, str]:
    """A joint head, or ``None`` if it has learnt nothing, with the reason."""
    count = _num_walks(source, parts, record)
    if count < _DRAWN[0]:
        return None, "there was too little time or memory to draw walks"
    record.begin(f"trains a head for all groups together, on {count:,} walks")
    whole = NCPrior.for_source(source, first_batch(parts.train, _PROBED), dropout=0.1)
    history = fit(
        whole,
        parts.train,
        held_out=parts.choose,
        steps=_MOST_STEPS,
        patience=parts.patience,
        learning_rate=_RATE,
        max_seconds=record.left(_SHARE),
        checkpoint=checkpoint,
        progress=record.progress,
        settings=FitSettings(
            weight_decay=0.05,
            num_cached_proposals=count,
            precision=fast_precision(device_of(source)),
            **walk_cache(source, parts, record),
        ),
    )
    record.histories.append(history)
    whole.sampler = partial(sir, num_proposals=WALKS)
    if gate(whole, history):
        return None, f"it has learnt nothing for sure; {history.stopped}"
    loss = sum(history.best_loss or [])
    return (
        whole,
        f"held-out NCE loss {loss:.4f} nats ({2 * math.log(2):.4f} without); {history.stopped}",
    )


def _num_walks(source: JointSource, parts: Parts, record: Record) -> int:
    """Number of walks to draw once: in proportion to the rows of data, to memory and to time."""
    count = draws_to_store(source, cache_size(parts.num_train, _PER_ROW, _DRAWN))
    left, started = record.left(_SHARE / 2), time.monotonic()
    if left is None:
        return count
    source.group(source.start(_TIMED)).prior.sample()
    return min(count, int(left * _TIMED / (time.monotonic() - started)))
