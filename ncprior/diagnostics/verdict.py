"""Verdict on one group: the first remedy that its statistics call for.

A statistic leads to a verdict if it passes a threshold by three standard errors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncprior.diagnostics.calibration import Mean, losses
from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.needed import MARGIN, Needed, kl_bound, needed, reach

# Slopes: log r is exact up to a fifth, which is 1 nat of the 5 that 150 proposals correct.
_CALIBRATED = (0.8, 1.25)

# Nats: the JSD of a mean shifted by 0.2 standard deviations, shift²/8.
_NO_JSD = 0.005

# A quarter of the loss reduction on training data is missing on held-out data.
_MEMORISED = 0.25

# A fresh head adds a tenth to the JSD that log r has found.
_INCOMPLETE = 0.1

# Evaluations of a head per sample; for a thousand samples these are 10⁸, minutes of a GPU.
_MOST_PROPOSALS = 100_000

# Draws of p. If none of so many is like a typical draw of q, no practical number suffices.
_MANY_DRAWS = 10_000

# Nats: log r varies by no more than float32's rounding.
_CONSTANT = 1e-6


def with_verdict(report: GroupReport, log_r: Tensor, proposed: Tensor) -> GroupReport:
    """Adds the number of proposals needed, the bound of KL and the verdict.

    Arguments:
        report: The report, with all other statistics.
        log_r: α log r in nats at z ~ q and z ~ p, with shape ``(walks, 2, rows)``.
        proposed: α log r in nats at the proposals of the pools, further draws of p.
    """
    if log_r.std() < _CONSTANT:
        return report._replace(verdict=Verdict.CONSTANT, kl_bound=0.0)
    q, p = log_r.unbind(1)
    every_p = torch.cat([p.flatten(), proposed.flatten()])
    reached = reach(q, every_p)
    bound = kl_bound(q, every_p)
    if not math.isnan(report.slope):
        q, p = report.slope * q + report.offset, report.slope * p + report.offset
    need = needed(q, reached)
    jsd = Mean.of(math.log(2) - losses(q, p) / 2)
    return report._replace(
        kl_bound=bound,
        proposals_needed=need.proposals,
        needs_more=need.is_bound,
        verdict=_verdict(report, jsd, need, reached[1]),
    )


def _verdict(report: GroupReport, jsd: Mean, need: Needed, num_draws: int) -> Verdict:
    """The verdict, with the JSD of the recalibrated log r; NaN passes no threshold."""
    slope_low = report.slope - MARGIN * report.slope_error
    slope_high = report.slope + MARGIN * report.slope_error
    harm = -_NO_JSD - report.jsd  # above 0, the base alone is better
    learnt = 2 * math.log(2) - report.train_loss
    memorised = report.train_gap - MARGIN * report.train_gap_error
    sharp = slope_high < _CALIBRATED[0] or harm > MARGIN * report.jsd_error
    if learnt > 2 * _NO_JSD and memorised > _MEMORISED * learnt:
        return Verdict.MEMORISES
    if jsd.value <= max(_NO_JSD, MARGIN * jsd.error) and not (sharp and harm > 0):
        return _unless_incomplete(report, Verdict.MATCHES)
    if need.surely > _MOST_PROPOSALS or (need.is_bound and num_draws >= _MANY_DRAWS):
        return Verdict.TOO_WIDE
    if sharp:
        return Verdict.OVER_CONFIDENT
    if slope_low > _CALIBRATED[1]:
        return Verdict.TOO_FLAT
    enough = need.surely <= max(report.ess) and not need.is_bound
    return _unless_incomplete(report, Verdict.GOOD if enough else Verdict.TOO_FEW)


def _unless_incomplete(report: GroupReport, verdict: Verdict) -> Verdict:
    surely = report.missing - MARGIN * report.missing_error
    most = max(_NO_JSD, _INCOMPLETE * report.jsd)
    return Verdict.INCOMPLETE if surely > most else verdict
