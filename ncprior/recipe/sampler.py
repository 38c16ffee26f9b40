"""Choice of sampler and strength for a budget, and the check that heads do no harm."""

from __future__ import annotations

import time
import warnings
from functools import partial

from ncprior.data.batches import one_pass, until
from ncprior.diagnostics.diagnose import diagnose
from ncprior.diagnostics.recommend import recommend_sampler
from ncprior.diagnostics.strength import StrengthWarning, match_strength
from ncprior.heads.product import factors
from ncprior.prior import NCPrior
from ncprior.recipe.caches import rows_in_time
from ncprior.recipe.choices import BASE, NEW, OLD, OWN, Choice
from ncprior.recipe.judge import NO_TIME, Gap, is_worse, kept, measure_gaps, remaining_gap
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.recipe.sources import OWN_DRAW, bases_of, off
from ncprior.samplers.identity import describe
from ncprior.samplers.sir import sir

_BATCH = 256

_MATCHED = (64, 2048)  # rows for the strength, at least and at most

_PASSES = 10  # of a search for the strength over its rows

_SHARE = 0.25  # of the time that is left, for the strength


def choose_sampler(
    prior: NCPrior, parts: Parts, budget: int, record: Record, *, name: str = ""
) -> None:
    """Sets the prior's sampler and strength for a number of evaluations per sample and head.

    The name stands in front of both choices in the record.
    """
    started = time.monotonic()
    if not any(prior.active):
        prior.sampler = OWN_DRAW
        record.add(Choice(f"{name}sampler", describe(prior.sampler), "the base's own draw"))
        return
    proposals = (max(1, budget // 10), max(2, budget))
    report = diagnose(prior, parts.choose, num_proposals=proposals, fresh_steps=0)
    heads = sum(len(factors(head)) for k, head in enumerate(prior.heads) if prior.is_on(k))
    choice = recommend_sampler(report, budget=budget * max(1, heads))
    sampler, reason = choice.sampler, choice.reason
    if choice.evaluations <= heads < budget * heads:  # the base's own draw: heads find very little
        sampler, reason = partial(sir, num_proposals=budget), "heads find little; all the budget"
    prior.sampler = sampler
    record.add(
        Choice(
            part=f"{name}sampler",
            chosen=describe(sampler),
            reason=reason,
            seconds=time.monotonic() - started,
        )
    )
    choose_strength(prior, parts, record, name=name)


def choose_strength(prior: NCPrior, parts: Parts, record: Record, *, name: str = "") -> None:
    """Sets the prior's strength for its sampler, by as many rows of held-out data as there is time for.

    Batches of data that are batches already stay whole. At strength 0, heads are switched off.
    """
    started = time.monotonic()
    rows = rows_in_time(prior, parts.choose, _MATCHED, record.left(_SHARE / _PASSES))
    size = min(_BATCH, rows)
    batches = list(until(one_pass(parts.choose, size), rows))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior.strength = match_strength(
            prior, batches, prior.chosen(None), progress=record.progress
        )
    reason = "the mean log r of the draws is that of held-out encodings"
    for one in caught:
        if issubclass(one.category, StrengthWarning):
            reason = str(one.message)
        else:  # of the user's code
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    took, found = time.monotonic() - started, prior.strength
    if found == 0:
        off(prior)
        reason = "any correction is further from held-out encodings than the base; heads are off"
    record.add(Choice(f"{name}strength", f"{found:.2f}", reason, seconds=took))


def keep_what_helps(prior: NCPrior, parts: Parts, record: Record) -> dict[str, Gap]:
    """Switches off the heads of groups whose draws are further from the encodings than the base's.

    If draws are surely further than those of the VAE's own prior, that takes the place of the base. This
    happens where it can only be sampled, so that no likelihood has told.

    Returns:
        The gaps of all priors, with the prior as it is now, see :func:`measure_gaps`.
    """
    started, had_heads = time.monotonic(), any(prior.active)
    bases = bases_of(prior.source, parts.choose)
    gaps = measure_gaps(prior, prior.chosen(None), bases, parts, record)
    base = BASE if BASE in gaps else OLD
    alone, kept_heads = gaps[base], _ARMS[NEW]
    shown = [arm for arm in _ARMS if arm in gaps and (had_heads or arm != NEW)]
    measured = {_ARMS[arm]: gaps[arm] for arm in shown}
    reason = "heads stay unless a new classifier tells their draws from encodings better than the base's"
    if had_heads and not (alone.is_measured and gaps[NEW].is_measured):
        reason = NO_TIME
    elif had_heads:
        pairs = zip(gaps[NEW].choose.groups, alone.choose.groups, strict=True)
        helps = [not is_worse(*pair, among=len(prior.active)) for pair in pairs]
        before = prior.active
        prior.active = [on and good for on, good in zip(before, helps, strict=True)]
        if not any(prior.active):
            gaps[NEW] = alone
            off(prior)
        elif prior.active != before:
            gaps[NEW] = remaining_gap(prior, prior.chosen(None), parts, record, name=NEW)
            kept_heads = "heads of the groups that they help"
            measured[kept_heads] = gaps[NEW]
    if BASE in gaps and OLD in gaps and gaps[NEW].is_worse_than(gaps[OLD]):
        prior.source, base, reason = (
            bases[OLD],
            OLD,
            "its draws are surely closer to the encodings",
        )
        off(prior)
        del gaps[BASE]
        gaps[NEW] = gaps[OLD]
    chosen = kept_heads if any(prior.active) else _ARMS[base]
    record.add(kept(chosen, reason, measured, time.monotonic() - started))
    return gaps


_ARMS = {OLD: OWN, BASE: "base alone", NEW: "heads"}  # as candidates
