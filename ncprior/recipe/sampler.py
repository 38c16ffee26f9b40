"""Choice of sampler and strength for a budget, and the check that heads do no harm."""

from __future__ import annotations

import itertools
import math
import time
from functools import partial

from ncprior.data.stream import one_pass
from ncprior.diagnostics.calibration import Mean
from ncprior.diagnostics.diagnose import diagnose
from ncprior.diagnostics.recommend import recommend_sampler
from ncprior.diagnostics.report import Report
from ncprior.diagnostics.strength import match_strength
from ncprior.heads.product import factors
from ncprior.prior import NCPrior
from ncprior.recipe.choices import Candidate, Choice
from ncprior.recipe.judge import remaining_jsd, total
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.samplers.compose import describe
from ncprior.samplers.sir import sir
from ncprior.training.calibration import calibrate_heads
from ncprior.utils.random_state import seeded

_BATCH = 256
_MATCHED = 2048  # rows for the strength

_SURE = 3.0  # standard errors by which log r must be miscalibrated, or the draws be worse


def choose_sampler(prior: NCPrior, parts: Parts, budget: int, record: Record) -> None:
    """Sets the prior's sampler and strength for a number of evaluations per sample and head."""
    started = time.monotonic()
    report = _diagnosis(prior, parts, budget)
    if any(_is_miscalibrated(group.slope, group.slope_error) for group in report.groups):
        slopes = calibrate_heads(prior, parts.choose)
        slope = ", ".join(f"{slope:.2f}" for slope in slopes[:4])
        record.add(
            Choice("calibration", "log r rescaled", f"slopes on held-out data were {slope}")
        )
        report = _diagnosis(prior, parts, budget)
    heads = sum(len(factors(head)) for k, head in enumerate(prior.heads) if prior.is_on(k))
    choice = recommend_sampler(report, budget=budget * max(1, heads))
    prior.sampler = choice.sampler
    record.add(
        Choice(
            *("sampler", describe(choice.sampler), choice.reason),
            seconds=time.monotonic() - started,
        )
    )
    started = time.monotonic()
    rows = list(itertools.islice(one_pass(parts.choose, _BATCH), _MATCHED // _BATCH))
    prior.strength = match_strength(prior, rows, prior.sampler, progress=record.progress)
    reason = "the mean log r of the draws is that of held-out encodings"
    record.add(
        Choice("strength", f"{prior.strength:.2f}", reason, seconds=time.monotonic() - started)
    )


def keep_what_helps(prior: NCPrior, parts: Parts, record: Record, seed: int) -> None:
    """Switches off the heads of groups whose draws are no closer to the encodings than the base's."""
    started, base = time.monotonic(), partial(sir, num_proposals=1)
    with seeded(seed), prior.disabled():
        before = remaining_jsd(prior, parts.choose, base)
    with seeded(seed):
        after = remaining_jsd(prior, parts.choose, prior.sampler)
    helps = [not _is_worse(*pair) for pair in zip(after, before, strict=True)]
    prior.active = [on and good for on, good in zip(prior.active, helps, strict=True)]
    off = [k for k, good in enumerate(helps) if not good]
    chosen = "base alone" if len(off) == len(helps) else "heads"
    reason = "a fresh classifier of draws and held-out encodings finds less than before"
    if off:
        reason = f"draws of groups {off} were worse than those of the base, which are kept"
    record.add(
        Choice(
            *("keep", chosen, reason),
            candidates=(_candidate("base alone", total(before)), _candidate("heads", total(after))),
            criterion="remaining JSD",
            unit="nats",
            higher_is_better=False,
            seconds=time.monotonic() - started,
        )
    )


def _diagnosis(prior: NCPrior, parts: Parts, budget: int) -> Report:
    proposals = (max(1, budget // 10), max(2, budget))
    return diagnose(prior, parts.choose, num_proposals=proposals, fresh_steps=0)


def _is_miscalibrated(slope: float, error: float) -> bool:
    return math.isfinite(slope) and slope > 0 and abs(slope - 1) > _SURE * error


def _is_worse(after: Mean, before: Mean) -> bool:
    return after.value - before.value > _SURE * math.hypot(after.error, before.error)


def _candidate(name: str, mean: Mean) -> Candidate:
    half = 1.96 * mean.error
    return Candidate(name, mean.value, mean.value - half, mean.value + half)

