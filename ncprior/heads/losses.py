"""Training loss of the head of one group: the NCE loss, and the score term beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ncprior.nce import nce_loss, score_loss
from ncprior.source import Group, posterior_of
from ncprior.utils.precision import at_precision
from ncprior.utils.scores import score


class GroupLoss(NamedTuple):
    """Losses of the head of one group, scalars.

    Attributes:
        nce: The NCE loss at ν = 1 in nats, to be reported beside that of held-out data.
        total: The NCE loss at the given ν plus the weighted score term, to be minimised.
    """

    nce: Tensor
    total: Tensor


def group_loss(
    log_ratio: Callable[[Tensor], Tensor],
    z: Tensor,
    group: Group,
    noise_weight: float,
    score_weight: float,
) -> GroupLoss:
    """Losses at the draws of one group.

    Arguments:
        log_ratio: Maps z, with shape ``(*, S, B, *event)``, to log r in nats, ``(*, S, B)``.
        z: Draws of posterior and prior, with shape ``(2, S, B, *event)``.
        group: The group, with its posterior.
        noise_weight: ν, see :func:`ncprior.nce_loss`.
        score_weight: Weight of the score term, see :func:`ncprior.nce.score_loss`.

    Raises:
        TypeError: If posterior or prior has no score, or log r no gradient in z, but the score term
            has a weight.
    """
    if not score_weight:
        log_r = log_ratio(z)
        with at_precision(z.device.type, torch.float32):
            return _nce(log_r[0], log_r[1], noise_weight)
    scores = score(posterior_of(group), z[0]), score(group.prior, z[0])
    z_q = z[:1].requires_grad_()
    log_r_q, log_r_p = log_ratio(z_q), log_ratio(z[1:])
    slope = _slope(log_r_q, z_q)
    with at_precision(z.device.type, torch.float32):
        nce, total = _nce(log_r_q, log_r_p, noise_weight)
        return GroupLoss(nce, total + score_weight * score_loss(slope[0], *scores))


def _nce(log_r_q: Tensor, log_r_p: Tensor, noise_weight: float) -> GroupLoss:
    total = nce_loss(log_r_q, log_r_p, noise_weight)
    at_1 = total if noise_weight == 1 else nce_loss(log_r_q.detach(), log_r_p.detach())
    return GroupLoss(at_1, total)


def _slope(log_r: Tensor, z: Tensor) -> Tensor:
    """∂ log r / ∂z, which can be differentiated again; 0 for a log r that is a constant."""
    if not log_r.requires_grad:
        return torch.zeros_like(z)
    (slope,) = torch.autograd.grad(log_r.sum(), z, create_graph=True, allow_unused=True)
    if slope is None:
        raise TypeError(
            "The score term needs the gradient of log r in z. Look for no_grad or detach in the "
            "ratio head or in features=, or set score_weight=0."
        )
    return slope
