"""Choice of sampler and strength for a budget, and the check that heads do no harm."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from functools import partial

from ncprior.bases.empirical import NoPrior
from ncprior.bases.rebase import without_bases
from ncprior.data.stream import one_pass
from ncprior.diagnostics.calibration import Mean
from ncprior.diagnostics.diagnose import diagnose
from ncprior.diagnostics.recommend import recommend_sampler
from ncprior.diagnostics.strength import match_strength
from ncprior.heads.product import factors
from ncprior.prior import NCPrior
from ncprior.recipe.choices import Candidate, Choice
from ncprior.recipe.judge import Gap, remaining_gap, total
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.samplers.compose import describe
from ncprior.samplers.sir import sir

_BATCH = 256
_MATCHED = 2048  # rows for the strength


def choose_sampler(prior: NCPrior, parts: Parts, budget: int, record: Record) -> None:
    """Sets the prior's sampler and strength for a number of evaluations per sample and head."""
    started = time.monotonic()
    if not any(prior.active):
        prior.sampler = partial(sir, num_proposals=1)
        record.add(Choice("sampler", describe(prior.sampler), "the base's own draw"))
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
            *("sampler", describe(sampler), reason),
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
    record.add(
        Choice("strength", f"{prior.strength:.2f}", reason, seconds=time.monotonic() - started)
    )


def keep_what_helps(prior: NCPrior, parts: Parts, record: Record) -> tuple[Mean, Mean]:
    """Switches off the heads of groups whose draws are further from the encodings than the base's.

    Returns:
        The gap of the VAE's own prior, and of the prior as it is now, in nats, on the data for the
        report.
    """
    started, base = time.monotonic(), partial(sir, num_proposals=1)
    old = _own_prior(prior)
    before = None if old is None else remaining_gap(old, base, parts, record)
    alone = before
    if old is None or prior.source is not old.source:
        with prior.disabled():
            alone = remaining_gap(prior, base, parts, record)
    assert alone is not None
    has_heads = any(prior.active)
    after = remaining_gap(prior, prior.chosen(None), parts, record) if has_heads else alone
    gaps = {"the VAE's own prior": before, "base alone": alone}
    gaps |= {"heads": after} if has_heads else {}
    helps = [not _is_worse(*pair) for pair in zip(after.choose, alone.choose, strict=True)]
    prior.active = [on and good for on, good in zip(prior.active, helps, strict=True)]
    if not all(helps):
        after = (
            remaining_gap(prior, prior.chosen(None), parts, record) if any(prior.active) else alone
        )
    record.add(
        Choice(
            *("keep", "heads" if any(prior.active) else "base alone"),
            "a new classifier finds the least between draws and held-out encodings",
            candidates=tuple(_candidate(name, gap) for name, gap in gaps.items() if gap),
            criterion="remaining gap (JSD)",
            unit="nats",
            higher_is_better=False,
            seconds=time.monotonic() - started,
        )
    )
    return total((before or alone).judge), total(after.judge)


def _own_prior(prior: NCPrior) -> NCPrior | None:
    """The VAE's own prior, with heads that are off; ``None`` if the VAE has none."""
    source = without_bases(prior.source)
    if isinstance(source.shared_prior(), NoPrior):
        return None
    old = NCPrior(source, prior.heads).eval()
    old.active = [False] * source.num_groups
    return old


def _is_worse(after: Mean, before: Mean) -> bool:
    return after.value - before.value > 2 * math.hypot(after.error, before.error)


def _candidate(name: str, gap: Gap) -> Candidate:
    value, error = total(gap.choose)
    return Candidate(name, value, value - 1.96 * error, value + 1.96 * error)
