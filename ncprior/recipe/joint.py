"""A head for all groups of a VAE together, which chooses among a few walks of the trained prior."""

from __future__ import annotations

import hashlib
import math
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from ncprior.bases.joint import JointSource
from ncprior.data.batches import spread_rows
from ncprior.heads.probe import more_heads
from ncprior.prior import NCPrior
from ncprior.recipe.caches import draws_in_time, draws_to_store, walk_cache
from ncprior.recipe.choices import BASE, GROUPS, NEW, OLD, OWN, Choice
from ncprior.recipe.files import joint_file
from ncprior.recipe.judge import NO_TIME, Gap, kept, measure_gaps, remaining_gap
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.recipe.sampler import choose_sampler, choose_strength
from ncprior.recipe.sources import OWN_DRAW, bases_of, first_group, off, vae_of
from ncprior.samplers.sir import sir
from ncprior.saving.identity import as_text, source_facts
from ncprior.source import LatentSource, device_of
from ncprior.training.fit import fit
from ncprior.training.gating import gate
from ncprior.training.resumable import time_limit
from ncprior.training.settings import FitSettings
from ncprior.training.stages import cache_size
from ncprior.utils.precision import fast_precision

WALKS = 4  # that the joint head chooses among: each has its part of the budget

_PROBED = 512  # rows for the shapes and scales of the head

_HEAD = {"width": 32, "dropout": 0.1}  # on maps as large as images, wide heads are slow

_MOST_STEPS = 4000

_RATE = 2e-3

_SHARE = 0.5  # of the time that is left

_PER_ROW, _DRAWN = 4, (2000, 200_000)  # walks per row of training data, at least and at most

_NAMES = {OLD: OWN, BASE: "base alone", GROUPS: GROUPS, NEW: "joint head"}


def joint_source(prior: NCPrior, parts: Parts) -> JointSource | None:
    """Returns all groups of a prior as one; ``None`` for one group, with a condition or with codes."""
    one = prior.source.num_groups == 1
    if one or first_group(prior.source, parts.choose).context is not None:
        return None
    try:
        return JointSource(prior)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        # codes, or a condition that later groups or the decoder see, in the user's own code
        return None


def join_groups(
    alone: JointSource,
    prior: NCPrior,
    parts: Parts,
    budget: int,
    record: Record,
    folder: Path | None,
) -> tuple[NCPrior, dict[str, Gap]]:
    """Returns a prior with one more head for all groups, if it brings draws closer to the encodings.

    It is trained only where a classifier tells draws of the heads of the groups from encodings.
    Each of its draws is chosen among four walks, which share the budget, at a strength of its own.
    It is compared with the heads of the groups alone, whose every walk has the whole budget, and
    these with their base: the classifiers see walks as the decoder shows them.

    Arguments:
        alone: All groups of the prior as one.
        prior: The prior, with a head for each group.
        parts: The data.
        budget: Evaluations per sample of the head of each group.
        record: The record of the recipe.
        folder: A folder for the training, or ``None``.

    Returns:
        The prior to use, and the gaps of all priors.
    """
    bases = bases_of(alone, parts.choose)
    whole = _untrained(alone, parts)
    gaps = measure_gaps(whole, OWN_DRAW, bases, parts, record)
    before, started = gaps[NEW], time.monotonic()  # of the heads of the groups, or of their base
    if budget < 2 * WALKS:
        reason = f"the budget is too small for {WALKS} walks"
    elif not before.is_measured:
        reason = NO_TIME
    elif not before.is_sure:
        reason = "a new classifier finds nothing for sure between draws and held-out encodings"
    else:
        first = deepcopy(prior)
        choose_sampler(first, parts, budget // WALKS, record, name="walk ")
        whole = _untrained(JointSource(first), parts)
        reason = _train(whole, parts, record, folder)
    chosen = f"one of {WALKS} walks" if any(whole.active) else "none"
    record.add(Choice("joint head", chosen, reason, seconds=time.monotonic() - started))
    if any(whole.active):
        choose_strength(whole, parts, record, name="joint ")
    if any(whole.active):
        gaps[NEW] = remaining_gap(whole, whole.chosen(None), parts, record, name=NEW)
    return _keep(whole, prior, gaps, list(bases), record)


def _untrained(source: JointSource, parts: Parts) -> NCPrior:
    """A joint head that is off until it is trained."""
    heads = more_heads(source, spread_rows(parts.train, _PROBED), **_HEAD)
    whole = NCPrior(source, heads).eval()
    whole.sampler, whole.active = partial(sir, num_proposals=WALKS), [False]
    return whole


def _keep(
    whole: NCPrior, prior: NCPrior, gaps: dict[str, Gap], bases: list[str], record: Record
) -> tuple[NCPrior, dict[str, Gap]]:
    """Keeps the heads of the groups unless they are worse than their base, the joint head if better.

    If draws are surely further than those of the VAE's own prior, that takes the place of the base.
    """
    best = BASE if BASE in gaps else OLD
    if GROUPS in gaps and not gaps[GROUPS].is_worse_than(gaps[best]):
        best = GROUPS
    if any(whole.active) and gaps[NEW].is_less_than(gaps[best]):
        best = NEW
    if BASE in gaps and OLD in gaps and gaps[best].is_worse_than(gaps[OLD]):
        best = OLD
    compared = [*bases, NEW] if any(whole.active) else [*bases]
    reason = (
        "a joint head stays if a new classifier finds less with it, others unless it finds more"
    )
    if not all(gaps[arm].is_measured for arm in compared):
        reason = NO_TIME
    measured = {_NAMES[arm]: gaps[arm] for arm in compared}
    record.add(kept(_NAMES[best], reason, measured, sum(gaps[arm].seconds for arm in compared)))
    if best == NEW:
        return whole, gaps
    if best != GROUPS:
        off(prior)
    gone = {GROUPS}
    if best == OLD and BASE in gaps:
        prior.source = vae_of(prior.source)
        gone.add(BASE)
    return prior, {arm: gaps[best if arm == NEW else arm] for arm in gaps if arm not in gone}


def _train(whole: NCPrior, parts: Parts, record: Record, folder: Path | None) -> str:
    """Trains the joint head, and switches it on if it has learnt something; returns the reason.

    Its checkpoint is of the walks that it is trained on, whose number and strength may depend on time.
    """
    count = _num_walks(whole.source, parts, record)
    if count < _DRAWN[0]:
        return "there was too little time or memory to draw walks"
    whole.active = [True]
    facts = as_text([source_facts(whole.source), count]).encode()
    file = joint_file(folder, hashlib.sha256(facts).hexdigest())
    record.begin(f"trains a head for all groups together, on {count:,} walks")
    history = fit(
        whole,
        parts.train,
        held_out=parts.choose,
        steps=_MOST_STEPS,
        patience=parts.patience,
        learning_rate=_RATE,
        max_seconds=time_limit(file, record.left(_SHARE)),
        checkpoint=file,
        progress=record.progress,
        settings=FitSettings(
            weight_decay=0.05,
            num_cached_proposals=count,
            precision=fast_precision(device_of(whole.source)),
            **walk_cache(whole.source, parts, record, math.inf),
        ),
    )
    record.histories.append(history)
    if gate(whole, history):
        return f"it has learnt nothing for sure; {history.stopped}"
    loss = sum(history.best_loss or [])
    return f"held-out NCE loss {loss:.4f} nats ({2 * math.log(2):.4f} without); {history.stopped}"


def _num_walks(source: LatentSource[Any, Any], parts: Parts, record: Record) -> int:
    """Number of walks to draw once: in proportion to the rows of data, to memory and to time."""
    count = draws_to_store(source, cache_size(parts.num_train, _PER_ROW, _DRAWN))
    return draws_in_time(source, count, record.left(_SHARE / 2))
