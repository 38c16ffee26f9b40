r"""Number of proposals that SIR needs, and the KL divergence that no scale of log r can hide.

A classifier saturates where q and p hardly overlap: its log r stops at a few nats, whatever the
gap. The order that log r puts the draws into survives, so both estimates here use it or the best
scale of log r:

* SIR can only choose from the proposals it has. If a fraction P of the draws of p has a log r as
  high as half of the draws of q, fewer than 1/P proposals contain no typical draw of q.
* For every scale a > 0, the bound of Donsker and Varadhan holds,

  .. math::
      KL(q \| p) \ge a \, E_q[\log r] - \log E_p[r^a].

References:
    | The sample size required in importance sampling (Chatterjee & Diaconis, 2018)
    | https://doi.org/10.1214/17-AAP1326
    | Formal limitations on the measurement of mutual information (McAllester & Stratos, 2020)
    | https://proceedings.mlr.press/v108/mcallester20a.html
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ncprior.diagnostics.calibration import Mean

# Standard errors: chance alone passes a threshold once in 700 times.
MARGIN = 3.0

# Larger numbers of proposals are reported as this one.
_COUNTABLE = 10**9


class Needed(NamedTuple):
    """Number of proposals that SIR needs.

    Attributes:
        proposals: The number of proposals M from which draws of SIR are close to q.
        surely: A number that is exceeded within three standard errors.
        is_bound: Whether no draw of p was like a typical draw of q, so that both are lower bounds.
    """

    proposals: int
    surely: int
    is_bound: bool


def needed(log_q: Tensor, reached: tuple[int, int]) -> Needed:
    """Number of proposals that SIR needs: exp(KL + sd_q[log r]), and at least 1/P.

    Arguments:
        log_q: Recalibrated log r in nats at z ~ q, with shape ``(draws, rows)``.
        reached: Result of :func:`reach`.
    """
    hits, draws = reached
    kl, sd = Mean.of(log_q), log_q.std().item()
    most_hits = hits + MARGIN * math.sqrt(hits + 1) + MARGIN
    return Needed(
        max(_proposals(kl.value + sd), math.ceil(draws / max(hits, 1))),
        max(_proposals(kl.value - MARGIN * kl.error + sd), math.ceil(draws / most_hits)),
        hits == 0,
    )


def reach(log_q: Tensor, log_p: Tensor) -> tuple[int, int]:
    """Counts draws of p with a log r as high as half of the draws of q; returns all draws too."""
    return int((log_p >= log_q.median()).sum()), log_p.numel()


def kl_bound(log_q: Tensor, log_p: Tensor) -> float:
    """Lower bound of KL(q || p) in nats by Donsker and Varadhan, at the best scale of log r.

    Arguments:
        log_q: log r in nats at z ~ q.
        log_p: log r in nats at z ~ p, N draws.

    Returns:
        The bound, at most log N: N draws cannot show more.
    """
    most = math.log(log_p.numel())
    spread = torch.cat([log_q.flatten(), log_p.flatten()]).std().clamp(min=1e-12)
    log_p, mean = log_p.flatten() / spread, log_q.mean() / spread

    def bound(scales: Tensor) -> Tensor:
        return torch.stack([a * mean - (a * log_p).logsumexp(0) + most for a in scales])

    coarse = torch.logspace(-3, 3, 25, dtype=torch.float64)  # the bound is concave in the scale
    best = coarse[bound(coarse).argmax()]
    fine = best * torch.logspace(-0.25, 0.25, 11, dtype=torch.float64)
    return float(bound(fine).max().clamp(0.0, most))


def _proposals(log_number: float) -> int:
    return math.ceil(math.exp(min(max(log_number, 0.0), math.log(_COUNTABLE))))
