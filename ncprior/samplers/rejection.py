r"""Samplers that accept or reject proposals of p: rejection sampling and independence Metropolis.

References:
    | Resampled Priors for Variational Autoencoders (Bauer & Mnih, 2019), section 3
    | Markov Chains for Exploring Posterior Distributions (Tierney, 1994), section 2.3.3
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncprior.distributions import Sampleable
from ncprior.samplers.base import (
    NOT_FINITE,
    Draw,
    LogRatio,
    check_target,
    checked,
    draw_from,
    latents_at_once,
    like_event,
    start_at,
)
from ncprior.utils.draws import drawn
from ncprior.utils.require import require_counts, require_numbers


@torch.no_grad()
def rejection(
    prior: Sampleable, log_ratio: LogRatio, *, log_bound: float, max_tries: int = 100
) -> Draw:
    r"""Truncated rejection sampling: at most T proposals of p per row, the last of which is kept.

    A proposal is accepted with probability a(z) = min(1, r(z) / e^b); the T-th is accepted in any
    case. With Z = E_p a, the distribution of the draw is

    .. math::
        p(z) \left[ (1 - \alpha_T) \, a(z) / Z + \alpha_T \right], \qquad
        \alpha_T = (1 - Z)^{T - 1},

    which tends to r·p / Z as T → ∞ if b bounds log r.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``.
        log_bound: b in nats; a larger log r counts as b. One of about e^b / E_p r proposals is
            accepted.
        max_tries: T, the most proposals per row.

    Returns:
        A draw with ``z`` and ``acceptance``: 1 where a proposal was accepted, 0 where the T-th was
        kept in any case.

    Raises:
        TypeError: If an argument has the wrong type, or draws or log r are not real numbers.
        ValueError: If ``max_tries`` is below 1, or the bound is not finite.
        FloatingPointError: If log r is not finite.

    References:
        Bauer & Mnih (2019), section 3.

    Example:
        >>> prior = torch.distributions.Uniform(torch.zeros(1000), 1.0)
        >>> draw = rejection(prior, lambda z: z.log(), log_bound=0.0)  # r·p ∝ z: mean 2/3
        >>> round(draw.z.mean().item(), 1)
        0.7
    """
    require_counts(max_tries=max_tries)
    require_numbers(log_bound=log_bound)
    check_target(prior, log_ratio)

    def attempt() -> tuple[Tensor, Tensor, Tensor]:
        z, log_r = _proposals(prior, log_ratio, 1)
        accept = torch.rand_like(log_r[0]).log() < log_r[0] - float(log_bound)
        return z[0], accept, torch.isfinite(log_r).all()

    z, accepted, is_finite = attempt()
    for _ in range(max_tries - 1):
        if accepted.all() | ~is_finite:  # one synchronisation per try
            break
        new, accept, is_finite = attempt()
        z = torch.where(like_event(accepted, z), z, new)
        accepted = accepted | accept
    if not is_finite:
        raise FloatingPointError(NOT_FINITE)
    return Draw(z, acceptance=accepted.float())


@torch.no_grad()
def independence(
    prior: Sampleable,
    log_ratio: LogRatio,
    *,
    num_steps: int,
    init: Tensor | None = None,
    chunk_size: int | None = None,
) -> Draw:
    r"""Independence Metropolis: Metropolis-Hastings whose proposals are independent draws of p.

    A proposal z' is accepted with probability min(1, r(z') / r(z)), which leaves r·p / Z
    invariant. The sampler needs neither a gradient nor the density of p. The total variation
    distance to r·p / Z falls at least as fast as (1 - Z / max r)^num_steps.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``.
        num_steps: Number of proposals per row.
        init: Start of the chains, ``(B, *event)``, such as the z of another draw; ``None`` draws
            it from p(z).
        chunk_size: Largest number of latents (proposals × rows) per call of ``log_ratio``; at least
            one proposal per row is always given. ``None``: 4,096 on a CPU, more on an accelerator.

    Returns:
        A draw with ``z`` and ``acceptance``.

    Raises:
        TypeError: If an argument has the wrong type, or draws or log r are not real numbers.
        ValueError: If ``num_steps`` or ``chunk_size`` is too small, or ``init`` has the wrong
            shape or a value that is not finite.
        FloatingPointError: If log r is not finite.

    References:
        Tierney (1994), section 2.3.3.

    Example:
        >>> prior = Normal(torch.zeros(1000), 1.0)
        >>> draw = independence(prior, lambda z: 0.5 * z, num_steps=30)  # r·p ∝ N(0.5, 1)
        >>> round(draw.z.mean().item(), 1)
        0.5
    """
    require_counts("[0, inf)", num_steps=num_steps)
    require_counts("[1, inf) or None", chunk_size=chunk_size)
    check_target(prior, log_ratio)
    z = drawn(prior) if init is None else start_at(init, prior)
    here = checked(log_ratio(z[None]), z[None].shape[:2])[0]
    is_finite = torch.isfinite(here).all()  # read once, at the end
    accepted = torch.zeros_like(here)
    left, at_once = num_steps, latents_at_once(z[None], chunk_size)
    while left:
        count = min(left, max(1, at_once // max(1, len(z))))
        new, log_r = _proposals(prior, log_ratio, count)
        is_finite = is_finite & torch.isfinite(log_r).all()
        last = torch.full_like(here, -1, dtype=torch.long)  # each chain's current proposal
        for t, log_u in enumerate(torch.rand_like(log_r).log()):
            accept = log_u < log_r[t] - here
            here = torch.where(accept, log_r[t], here)
            last = torch.where(accept, t, last)
            accepted += accept
        z = torch.where(
            like_event(last < 0, z), z, new[last, torch.arange(len(z), device=z.device)]
        )
        left -= count
    if not is_finite:
        raise FloatingPointError(NOT_FINITE)
    return Draw(z, acceptance=accepted / max(1, num_steps))


def _proposals(prior: Sampleable, log_ratio: LogRatio, count: int) -> tuple[Tensor, Tensor]:
    z = draw_from(prior, count)
    return z, checked(log_ratio(z), z.shape[:2])
