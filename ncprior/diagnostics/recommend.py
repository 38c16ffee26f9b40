"""Which sampler to draw with, for what a sample may cost."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.report import Report
from ncprior.samplers.base import Sampler
from ncprior.samplers.compose import describe
from ncprior.samplers.mixture import within_components
from ncprior.samplers.sir import sir
from ncprior.samplers.smc import tempered_smc

_PLENTY = 30  # times the proposals needed: beyond, SIR's bias is below a hundredth

_MOST_MOVES = 16  # per temperature; more change nothing


class Recommendation(NamedTuple):
    """A sampler, what it costs, and why it.

    Attributes:
        sampler: The sampler, for ``prior.sample(batch_size, sampler)``.
        evaluations: About how many evaluations of heads one sample costs; one with a gradient
            counts twice.
        reason: Why this one, in one sentence.

    Example:
        >>> from ncprior import sir
        >>> print(Recommendation(partial(sir, num_proposals=9), 9, "Because."))
        sir(num_proposals=9), about 9 evaluations per sample. Because.
    """

    sampler: Sampler
    evaluations: int
    reason: str

    def __str__(self) -> str:
        """Says it in one line."""
        sampler = describe(self.sampler)
        return f"{sampler}, about {self.evaluations} evaluations per sample. {self.reason}"


def recommend_sampler(report: Report, *, budget: int) -> Recommendation:
    """Picks a sampler and its settings for a trained prior.

    SIR where it has plenty of proposals, or where nothing else can be: the proposals needed grow
    with e^KL. Else, on a mixture base, SIR within its components if there are as many as needed,
    and chains in their noise if not. Else, for a single group without a context, whose latents can
    be walked in, tempered sequential Monte Carlo over one population: its cost grows with KL itself.
    Then let :func:`ncprior.diagnostics.match_strength` suit the strength to the sampler.

    Arguments:
        report: What :func:`ncprior.diagnostics.diagnose` has found.
        budget: Evaluations of heads that one sample may cost, over all groups and stages; an
            evaluation with a gradient counts twice. SMC picks its temperatures by the particles it
            sees, so that it keeps to the budget roughly.

    Returns:
        The recommendation.

    Raises:
        ValueError: If the budget does not give every head in use one evaluation.

    Example:
        >>> from ncprior.diagnostics import diagnose
        >>> report = diagnose(prior, torch.randn(200, 3))
        >>> print(recommend_sampler(report, budget=100).sampler)
        functools.partial(<function sir at ...>, num_proposals=100)
    """
    groups = [group for group in report.groups if group.verdict is not Verdict.OFF]
    heads = sum(group.num_factors for group in groups)
    if budget < max(1, heads):
        raise ValueError(
            f"The budget must give every head in use an evaluation; got {budget} for {heads} heads."
        )
    if not groups:
        return Recommendation(partial(sir, num_proposals=1), 0, "No head is in use.")
    each = budget // heads
    needed = max(group.proposals_needed for group in groups)
    by_sir = partial(sir, num_proposals=each)
    if each >= _PLENTY * needed:
        return Recommendation(by_sir, each * heads, f"{needed:,} proposals are needed: plenty.")
    if len(report.groups) == 1 and groups[0].num_components > 1:
        return _within(groups[0], each)
    if len(report.groups) > 1 or groups[0].has_context or not groups[0].has_gradient:
        enough = "enough" if each >= needed else "the budget is short, a closer base would help"
        reason = f"{needed:,} proposals are needed in the widest group: {enough}."
        return Recommendation(by_sir, each * heads, reason)
    # Gaussians that are δ apart have an ESS of e^{-δ²}, and are √(2 KL) apart in all.
    temperatures = max(1, math.ceil(math.sqrt(2 * max(0.0, groups[0].kl) / math.log(2))))
    moves = min(_MOST_MOVES, (each // 2 - 1) // temperatures)
    if moves < 1:
        return Recommendation(by_sir, each * heads, "The budget is too short for a walk.")
    return Recommendation(
        partial(tempered_smc, num_particles=1, share_particles=True, num_moves=moves),
        2 * (1 + temperatures * moves) * heads,
        f"{needed:,} proposals are needed, and SIR settles with {_PLENTY} times as many, beyond the "
        f"budget; a population is led there in about {temperatures} temperatures.",
    )


def _within(group: GroupReport, each: int) -> Recommendation:
    """Of a group whose base is a mixture, with so many evaluations of log r."""
    needed = f"{group.proposals_needed:,} proposals are needed"
    moves = each // 2 - 1
    if each >= group.proposals_needed or moves < 1 or not group.has_gradient:
        by_sir = within_components(partial(sir, num_proposals=each))
        cost = each * group.num_factors
        return Recommendation(by_sir, cost, f"{needed}, fewer within the components of the base.")
    # One particle is a chain of MALA that finds its own step size.
    chain = partial(tempered_smc, num_particles=1, num_moves=moves)
    reason = f"{needed}, beyond the budget: chains walk within the components of the base."
    return Recommendation(within_components(chain), 2 * (1 + moves) * group.num_factors, reason)
