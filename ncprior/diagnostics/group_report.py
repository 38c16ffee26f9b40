"""Statistics and verdict of one latent group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from ncprior.diagnostics.calibration import Reliability

UNRELIABLE_K = (
    0.7  # Vehtari et al. (2024): above it, averages of weights do not converge in practice
)


class Verdict(str, Enum):
    """Verdict on one group, as a short phrase.

    Example:
        >>> print(Verdict.GOOD)
        head is good
        >>> Verdict.TOO_FEW.advice[:29]
        'Give sir as many proposals as'
    """

    GOOD = "head is good"
    MATCHES = "base already matches"
    CONSTANT = "base already matches, or the head is untrained"
    TOO_FEW = "too few proposals"
    OVER_CONFIDENT = "head over-confident"
    TOO_FLAT = "head too flat"
    INCOMPLETE = "head incomplete"
    MEMORISES = "head memorises"
    TOO_WIDE = "gap too wide, use a closer base"
    OFF = "off"

    def __str__(self) -> str:
        return str(self.value)

    @property
    def advice(self) -> str:
        """The recommended action, in one sentence."""
        return _ADVICE[self]


_ADVICE = {
    Verdict.GOOD: "log r is calibrated. Sample with sir, with at least the proposals needed.",
    Verdict.MATCHES: (
        "The head finds no difference that is worth correcting: use the base for this group "
        "(prior.active[k] = False)."
    ),
    Verdict.CONSTANT: (
        "log r is constant: either p and q agree or the head is untrained. Train the head, then "
        "diagnose again."
    ),
    Verdict.TOO_FEW: (
        "Give sir as many proposals as the table says are needed, or let recommend_sampler pick "
        "another sampler."
    ),
    Verdict.OVER_CONFIDENT: (
        "|log r| is too large on held-out data: train with early stopping, dropout or more data, "
        "or rescale log r: ncprior.training.calibrate_heads."
    ),
    Verdict.TOO_FLAT: (
        "|log r| is too small on held-out data: train longer or with a larger head, or rescale "
        "log r: ncprior.training.calibrate_heads."
    ),
    Verdict.INCOMPLETE: (
        "log r is calibrated, but a fresh head still finds differences between q and p that it "
        "misses: train longer, with a larger head or more data, or add a stage: fit(stages=2)."
    ),
    Verdict.MEMORISES: (
        "The NCE loss is lower on training data than on held-out data: train with more data, a "
        "smaller head, dropout or weight decay, and stop early on held-out data."
    ),
    Verdict.TOO_WIDE: (
        "No practical number of proposals closes the gap: fit a base to the aggregate posterior, "
        "such as a Gaussian mixture, and train the head on that base."
    ),
    Verdict.OFF: (
        "The head is not used: the group is not active, the strength is 0, or the prior is "
        "disabled."
    ),
}


class GroupReport(NamedTuple):
    """Diagnostic report on one group; values that were not measured are NaN.

    Every ``_error`` is the standard error of the value before it.

    Attributes:
        group: k, from 0.
        verdict: The verdict on the group; ``verdict.advice`` is the recommended action.
        nce_loss: L*, the plain NCE loss on held-out data, in nats.
        nce_loss_error: Its standard error.
        jsd: log 2 - L*/2 in nats: the Jensen-Shannon divergence of posterior and prior if log r is
            exact, otherwise a lower bound. At most 0.693; negative for a harmful head.
        jsd_error: Its standard error.
        kl: E_q[log r] in nats: KL(q || p) if log r is exact.
        kl_error: Its standard error.
        kl_bound: Lower bound of KL(q || p) in nats that no scale of log r can change, by Donsker
            and Varadhan; at most the logarithm of the number of draws.
        identity: E_q[D] + E_p[D] with D = σ(log r), a pure number: 1 if log r is exact.
        identity_error: Its standard error.
        slope: a of the recalibration a·log r + b: 1 is calibrated, below 1 over-confident, above 1
            too flat.
        slope_error: Its standard error.
        offset: b in nats; samplers do not depend on it.
        offset_error: Its standard error.
        mean_r: E_p[r], a pure number: 1 if log r is exact and ``mean_r_k`` below 0.7.
        mean_r_k: Pareto k̂ of r under p.
        mean_inverse_r: E_q[1/r], a pure number: 1 if log r is exact, ``mean_inverse_r_k`` is below
            0.7 and q is nowhere zero.
        mean_inverse_r_k: Pareto k̂ of 1/r under q.
        ess: Mean effective sample size of SIR, in proposals, for each number of proposals
            M; from 1 to M.
        log_z: Mean of log (1/M) Σ r at the larger M, in nats: an estimate of log Z from below.
        log_z_error: Its standard error.
        proposals_needed: exp(KL + sd_q[log r]) of the recalibrated log r: the order of magnitude
            of M from which draws of SIR are close to q; at least 1/P, with P the fraction of draws
            of p whose log r is as high as half of the draws of q. At most 10⁹.
        needs_more: Whether no draw of p has a log r as high as half of the draws of q, so that
            ``proposals_needed`` is only a lower bound.
        missing: The part of the Jensen-Shannon divergence, in nats, that a fresh head finds on
            held-out data and log r misses; negative if the fresh head finds nothing.
        missing_error: Its standard error.
        train_loss: The plain NCE loss on training data, in nats.
        train_gap: Held-out loss minus training loss, in nats.
        train_gap_error: Its standard error.
        has_context: Whether the group has a context, so that every row has its own target.
        has_gradient: Whether the prior of the group supports Langevin dynamics.
        num_components: Number of components if the base is a Gaussian mixture, else 1.
        num_factors: Number of heads that are multiplied, all evaluated for one log r.
        variance: Mean variance of the latents under the base, in squared units of z; 1 if the base
            does not know it.
        num_latents: Number of latents of the group.
        num_active: Number of active latents, see :func:`ncprior.bases.active_latents`.
        reliability: The reliability curve, ``None`` for a head that is off.

    Example:
        >>> GroupReport(0, Verdict.OFF).proposals_needed  # the base's own draw
        1
    """

    group: int
    verdict: Verdict
    nce_loss: float = math.nan
    nce_loss_error: float = math.nan
    jsd: float = math.nan
    jsd_error: float = math.nan
    kl: float = math.nan
    kl_error: float = math.nan
    kl_bound: float = math.nan
    identity: float = math.nan
    identity_error: float = math.nan
    slope: float = math.nan
    slope_error: float = math.nan
    offset: float = math.nan
    offset_error: float = math.nan
    mean_r: float = math.nan
    mean_r_k: float = math.nan
    mean_inverse_r: float = math.nan
    mean_inverse_r_k: float = math.nan
    ess: Mapping[int, float] = {}
    log_z: float = math.nan
    log_z_error: float = math.nan
    proposals_needed: int = 1
    needs_more: bool = False
    missing: float = math.nan
    missing_error: float = math.nan
    train_loss: float = math.nan
    train_gap: float = math.nan
    train_gap_error: float = math.nan
    has_context: bool = False
    has_gradient: bool = False
    num_components: int = 1
    num_factors: int = 1
    variance: float = 1.0
    num_latents: int = 0
    num_active: int = 0
    reliability: Reliability | None = None
