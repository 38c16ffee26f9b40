"""Choice of sampler and strength for a budget, and the check that heads do no harm."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from functools import partial
from typing import Any

from ncprior.bases.joint import JointSource
from ncprior.data.stream import one_pass
from ncprior.diagnostics.calibration import Mean
from ncprior.diagnostics.diagnose import diagnose
from ncprior.diagnostics.recommend import recommend_sampler
from ncprior.diagnostics.strength import match_strength
from ncprior.heads.product import factors
from ncprior.prior import NCPrior
from ncprior.recipe.choices import BASE, GROUPS, NEW, OLD, Candidate, Choice
from ncprior.recipe.judge import Gap, base_of, measure_gaps, remaining_gap, total
from ncprior.recipe.parts import OWN_DRAW, Parts
from ncprior.recipe.record import Record
from ncprior.samplers.compose import describe
from ncprior.samplers.sir import sir
from ncprior.source import LatentSource

_BATCH = 256
_MATCHED = 2048  # rows for the strength


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
            *(f"{name}sampler", describe(sampler), reason),
            seconds=time.monotonic() - started,
        )
    )
    started = time.monotonic()
    rows = list(itertools.islice(one_pass(parts.choose, _BATCH), _MATCHED // _BATCH))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior.strength = match_strength(prior, rows, prior.sampler, progress=record.progress)
    reason = "the mean log r of the draws is that of held-out encodings"
    if caught:
        reason = str(caught[0].message)
    took = time.monotonic() - started
    record.add(Choice(f"{name}strength", f"{prior.strength:.2f}", reason, seconds=took))


def keep_what_helps(
    prior: NCPrior,
    parts: Parts,
    record: Record,
    *,
    base: LatentSource[Any, Any] | None = None,
) -> dict[str, Gap]:
    """Switches off the heads of groups whose draws are further from the encodings than the base's.

    Returns:
        The gaps of all priors, with the prior as it is now, see :func:`measure_gaps`, which takes
        the same arguments.
    """
    started, had_heads = time.monotonic(), any(prior.active)
    gaps = measure_gaps(prior, prior.chosen(None), parts, record, base=base)
    below = base_of(prior.source) or OLD
    is_joint = isinstance(prior.source, JointSource)
    alone, names = gaps[below], {**_ARMS, NEW: "joint head" if is_joint else "heads"}
    shown = [arm for arm in names if arm in gaps and (had_heads or arm != NEW)]
    candidates = [_candidate(names[arm], gaps[arm]) for arm in shown if gaps[arm].is_measured]
    reason = "a new classifier finds the least between draws and held-out encodings"
    if had_heads and not (alone.is_measured and gaps[NEW].is_measured):
        reason = "there was too little time to compare draws with encodings"
    elif had_heads:
        pairs = zip(gaps[NEW].choose, alone.choose, strict=True)
        helps = [not _is_worse(*pair) for pair in pairs]
        prior.active = [on and good for on, good in zip(prior.active, helps, strict=True)]
        if not any(prior.active):
            gaps[NEW], prior.sampler, prior.strength = alone, OWN_DRAW, 1.0
        elif not all(helps):
            gaps[NEW] = remaining_gap(prior, prior.chosen(None), parts, record, name=NEW)
    record.add(
        Choice(
            *("keep", names[NEW if any(prior.active) else below], reason),
            candidates=tuple(candidates),
            criterion="remaining gap (JSD)",
            unit="nats",
            higher_is_better=False,
            seconds=time.monotonic() - started,
        )
    )
    return gaps


_ARMS = {OLD: "the VAE's own prior", BASE: "base alone", GROUPS: GROUPS}  # as candidates


def _is_worse(after: Mean, before: Mean) -> bool:
    return after.value - before.value > 2 * math.hypot(after.error, before.error)


def _candidate(name: str, gap: Gap) -> Candidate:
    value, error = total(gap.choose)
    return Candidate(name, value, value - 1.96 * error, value + 1.96 * error)
