"""Recommendation of a sampler for a trained prior and a budget of evaluations."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.report import Report
from ncprior.samplers.base import Sampler
from ncprior.samplers.identity import describe
from ncprior.samplers.mixture import within_components
from ncprior.samplers.sir import sir
from ncprior.samplers.smc import tempered_smc
from ncprior.utils.require import require_counts, require_instance

_PLENTY = 30  # multiple of the proposals needed at which the bias of SIR is below 1 %

_HOPELESS = "No sampler closes a gap that is too wide: fit a closer base first."

_MATCHING = (Verdict.MATCHES, Verdict.CONSTANT)

_MOST_MOVES = 16  # per temperature; more moves do not improve the draws

_LEAPFROGS = 3  # of a move within components

_FEWEST_MOVES = 3  # fewer take draws less far than SIR does

_FIRST_STEP = 0.1  # of these; the first moves of a larger one are rejected

_STEP = 0.5  # first step of shared particles, in variances of the base


class Recommendation(NamedTuple):
    """Recommended sampler, with its cost and a reason.

    Attributes:
        sampler: The sampler, for ``prior.sample(batch_size, sampler)``.
        evaluations: Approximate number of evaluations of heads per sample; an evaluation with a
            gradient counts twice.
        reason: The reason for this sampler, in one sentence.

    Example:
        >>> from ncprior import sir
        >>> print(Recommendation(partial(sir, num_proposals=9), 9, "Because."))
        sir(num_proposals=9), about 9 evaluations per sample. Because.
    """

    sampler: Sampler
    evaluations: int
    reason: str

    def __str__(self) -> str:
        """Shows sampler, cost and reason in one line."""
        sampler = describe(self.sampler)
        return f"{sampler}, about {self.evaluations} evaluations per sample. {self.reason}"


def recommend_sampler(report: Report, *, budget: int) -> Recommendation:
    """Recommended sampler and settings for a trained prior.

    The rules, in this order:

    * The base's own draw, if no head finds a difference.
    * SIR, if the budget allows many times the proposals needed, whose number grows as e^KL.
    * On a Gaussian mixture base, SIR within components if the budget allows the proposals needed, or
      less than three moves of a chain; else Hamiltonian chains within components.
    * For several groups, a context, or a prior without gradient, SIR.
    * For one group without context, tempered sequential Monte Carlo with shared particles, whose
      cost grows with KL.

    Afterwards, :func:`ncprior.diagnostics.match_strength` fits the strength to the sampler.

    Arguments:
        report: Result of :func:`ncprior.diagnostics.diagnose`.
        budget: Evaluations of heads that one sample may cost, over all groups and stages; an
            evaluation with a gradient counts twice. Tempered SMC adapts its number of
            temperatures, so that it keeps to the budget only approximately.

    Returns:
        The recommendation.

    Raises:
        ValueError: If the budget does not give every head in use one evaluation.

    Example:
        >>> from ncprior.diagnostics import diagnose
        >>> report = diagnose(prior, torch.randn(200, 3))
        >>> print(recommend_sampler(report, budget=100))  # the head is not trained yet
        sir(num_proposals=1), about 1 evaluations per sample. No head finds a difference: ...
    """
    require_instance("report", report, Report, "Pass the result of diagnose(prior, held_out).")
    require_counts(budget=budget)
    groups = [group for group in report.groups if group.verdict is not Verdict.OFF]
    heads = sum(group.num_factors for group in groups)
    if budget < max(1, heads):
        raise ValueError(
            f"The budget must give every head in use an evaluation; got {budget} for {heads} heads."
        )
    if not groups:
        return Recommendation(partial(sir, num_proposals=1), 0, "No head is in use.")
    each = budget // heads
    if all(group.verdict in _MATCHING for group in groups):
        return Recommendation(
            partial(sir, num_proposals=1), heads, "No head finds a difference: draw from the base."
        )
    widest = max(
        (group for group in groups if group.verdict not in _MATCHING),
        key=lambda group: group.proposals_needed,
    )
    choice = _choice(report, widest, each, heads)
    if any(group.verdict is Verdict.TOO_WIDE for group in groups):
        return choice._replace(reason=f"{choice.reason} {_HOPELESS}")
    return choice


def _choice(report: Report, widest: GroupReport, each: int, heads: int) -> Recommendation:
    """Recommendation for ``each`` evaluations of every head."""
    needed = widest.proposals_needed
    by_sir = partial(sir, num_proposals=each)
    if each >= _PLENTY * needed:
        return Recommendation(by_sir, each * heads, f"{_stated(widest)}: plenty.")
    if len(report.groups) == 1 and widest.num_components > 1:
        return _within(widest, each)
    if len(report.groups) > 1 or widest.has_context or not widest.has_gradient:
        enough = "enough" if each >= needed else "the budget is short, a closer base would help"
        return Recommendation(
            by_sir, each * heads, f"{_stated(widest)} in the widest group: {enough}."
        )
    # Gaussians that are δ apart have an ESS of e^{-δ²}, and are √(2 KL) apart in all.
    kl = max(0.0, widest.kl, widest.kl_bound)
    temperatures = max(1, math.ceil(math.sqrt(2 * kl / math.log(2))))
    moves = min(_MOST_MOVES, (each // 2 - 1) // temperatures)
    if moves < 1:
        return Recommendation(by_sir, each * heads, "The budget is too small for tempered SMC.")
    return Recommendation(
        partial(
            tempered_smc,
            num_particles=1,
            share_particles=True,
            num_moves=moves,
            step_size=_STEP * widest.variance,
        ),
        2 * (1 + temperatures * moves) * heads,
        f"{_stated(widest)} for draws close to q, and {_PLENTY} times as many for a bias below 1 %; "
        f"shared particles reach it at this budget, in about {temperatures} temperatures.",
    )


def _stated(group: GroupReport) -> str:
    """States the proposals that a group needs."""
    at_least = "More than " if group.needs_more else ""
    return f"{at_least}{group.proposals_needed:,} proposals are needed"


def _within(group: GroupReport, each: int) -> Recommendation:
    """Recommendation for a group on a mixture base, with ``each`` evaluations of log r."""
    gradients = each // 2 - 1
    moves = gradients // _LEAPFROGS
    if each >= group.proposals_needed or moves < _FEWEST_MOVES or not group.has_gradient:
        by_sir = within_components(partial(sir, num_proposals=each))
        cost = each * group.num_factors
        return Recommendation(
            by_sir, cost, f"{_stated(group)}, fewer within the components of the base."
        )
    # tempered_smc with one particle is a chain that adapts its step size.
    chain = partial(
        tempered_smc,
        num_particles=1,
        num_moves=moves,
        num_leapfrogs=_LEAPFROGS,
        step_size=_FIRST_STEP,
    )
    reason = (
        f"{_stated(group)}, beyond the budget: Hamiltonian chains move within the components of the "
        f"base."
    )
    evaluations = 2 * (1 + moves * _LEAPFROGS) * group.num_factors
    return Recommendation(within_components(chain), evaluations, reason)
