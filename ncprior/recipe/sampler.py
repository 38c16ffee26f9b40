"""Choice of sampler and strength for a budget, and the check that heads do no harm."""

from __future__ import annotations

import itertools
import math
import time
from functools import partial

from ncprior.data.stream import one_pass
from ncprior.diagnostics.diagnose import diagnose
from ncprior.diagnostics.recommend import recommend_sampler
from ncprior.diagnostics.report import Report
from ncprior.diagnostics.strength import match_strength
from ncprior.evaluation.two_sample import TwoSampleTest
from ncprior.heads.product import factors
from ncprior.prior import NCPrior
from ncprior.recipe.choices import Candidate, Choice
from ncprior.recipe.judge import compare_draws
from ncprior.recipe.parts import Parts, has_condition
from ncprior.recipe.record import Record
from ncprior.samplers.compose import describe
from ncprior.samplers.sir import sir
from ncprior.training.calibration import calibrate_heads

_BATCH = 256
_MATCHED = 2048  # rows for the strength

_SURE = 3.0  # standard errors by which log r must be miscalibrated, or the draws be worse


def choose_sampler(prior: NCPrior, parts: Parts, budget: int, record: Record) -> None:
    """Sets the prior's sampler and strength for a number of evaluations per sample and head."""
    started = time.monotonic()
    if not any(prior.active):
        prior.sampler = partial(sir, num_proposals=1)
        record.add(Choice("sampler", describe(prior.sampler), "the base's own draw"))
        return
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
    """Switches the head of a single group off if its draws are further from the encodings than the base's."""
    if prior.source.num_groups > 1 or not any(prior.active) or has_condition(prior.source, parts):
        return
    started = time.monotonic()
    new = compare_draws(prior, parts.choose, seed)
    prior.active = [False]
    base = compare_draws(prior, parts.choose, seed)
    helps = new.auc - base.auc <= new.high - new.auc
    prior.active = [helps]
    record.add(
        Choice(
            *("keep", "heads" if helps else "base alone"),
            "a classifier of draws and encodings of held-out data finds less",
            candidates=(_candidate("base alone", base), _candidate("heads", new)),
            criterion="AUC",
            higher_is_better=False,
            seconds=time.monotonic() - started,
        )
    )


def _diagnosis(prior: NCPrior, parts: Parts, budget: int) -> Report:
    proposals = (max(1, budget // 10), max(2, budget))
    return diagnose(prior, parts.choose, num_proposals=proposals, fresh_steps=0)


def _is_miscalibrated(slope: float, error: float) -> bool:
    return math.isfinite(slope) and slope > 0 and abs(slope - 1) > _SURE * error


def _candidate(name: str, test: TwoSampleTest) -> Candidate:
    return Candidate(name, test.auc, test.low, test.high)
