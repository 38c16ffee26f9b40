"""Remaining gap of a prior: new classifiers tell its draws from encodings of held-out data."""

from __future__ import annotations

import math
from typing import NamedTuple

from ncprior.diagnostics.calibration import Mean
from ncprior.diagnostics.diagnose import diagnose
from ncprior.diagnostics.walks import evaluating
from ncprior.heads.product import fresh_head
from ncprior.prior import NCPrior
from ncprior.recipe.parts import Parts, has_condition
from ncprior.recipe.record import Record
from ncprior.samplers.base import Sampler
from ncprior.training.fit import fit
from ncprior.training.settings import FitSettings
from ncprior.training.stages import nested

_STEPS = 1000

_MOST_SECONDS = 60.0  # for the classifiers of one prior

_CACHED = 20_000  # draws of a single group without a condition

_NUM_DRAWS = 4096


class Gap(NamedTuple):
    """Jensen-Shannon divergence of encodings and draws, for every group.

    Attributes:
        choose: In nats, with standard errors, on the data for choices.
        judge: In nats, with standard errors, on the data for the report.
    """

    choose: list[Mean]
    judge: list[Mean]


def remaining_gap(prior: NCPrior, sampler: Sampler, parts: Parts, record: Record) -> Gap:
    """Returns the gap that the draws of a prior leave to the encodings.

    New heads are trained to tell encodings of the training data from the draws, and measured on
    held-out data. They see all that base, heads, sampler and strength have left. The divergence is
    a lower bound, and 0 if the new heads find nothing.
    """
    single = prior.source.num_groups == 1 and not has_condition(prior.source, parts)
    settings = FitSettings(num_cached_proposals=_CACHED) if single else FitSettings()
    left = record.left(0.1)
    with evaluating(prior):
        fresh = NCPrior(nested(prior, sampler), map(fresh_head, prior.heads)).eval()
        history = fit(
            fresh,
            parts.train,
            held_out=parts.choose,
            steps=_STEPS,
            patience=parts.patience,
            max_seconds=_MOST_SECONDS if left is None else min(_MOST_SECONDS, left),
            progress=record.progress,
            settings=settings,
        )
        report = diagnose(
            fresh, parts.judge, num_proposals=(1, 2), num_draws=_NUM_DRAWS, fresh_steps=0
        )
    losses, errors = history.best_loss or [], history.best_error or []
    pairs = zip(losses, errors, strict=True)
    choose = [Mean(math.log(2) - loss / 2, error / 2) for loss, error in pairs]
    return Gap(choose, [Mean(group.jsd, group.jsd_error) for group in report.groups])


def total(means: list[Mean]) -> Mean:
    """Sum over groups, at least 0, with its standard error."""
    value = sum(mean.value for mean in means if math.isfinite(mean.value))
    error = sum(mean.error**2 for mean in means if math.isfinite(mean.error))
    return Mean(max(0.0, value), math.sqrt(error))


def share_closed(before: Mean, after: Mean) -> tuple[float, float, float]:
    """Part of a divergence that is gone, with its 95 % interval.

    A classifier that finds nothing returns a constant, whose loss hardly varies. The error of the
    gap before then stands for its own.
    """
    share = 1 - after.value / before.value
    finds_nothing = after.value <= 2 * after.error
    error = max(after.error, before.error) if finds_nothing else after.error
    relative = math.hypot(error, (1 - share) * before.error) / before.value
    return share, share - 1.96 * relative, share + 1.96 * relative


def in_words(before: Mean, after: Mean) -> str:
    """The result in one or two sentences that need no knowledge of the method."""
    found = (
        f"A classifier that tells draws from encodings of held-out data found {before.value:.3f} "
        f"nats (Jensen-Shannon) before, and {after.value:.3f} nats now."
    )
    if before.value <= 2 * before.error:
        return f"The VAE has no prior hole. {found}"
    share, low, high = (round(100 * part) for part in share_closed(before, after))
    return f"Prior hole closed: {share} % ({low}–{high}). {found}"
