"""Proposals z ~ p(z) of many rows, drawn again and again into the same memory."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Size, Tensor
from torch.distributions import Independent, Normal

from ncprior.distributions import Sampleable, is_expanded
from ncprior.samplers.base import LogRatio

_POINTS = 4  # proposals at which rows are compared

_ROUNDING = 1e-4


class Proposals:
    """Draws proposals of a prior; those of a normal one into one buffer, the next over the last.

    They are ``prior.sample``'s own, bit for bit, under the same seed.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
    """

    def __init__(self, prior: Sampleable) -> None:
        self.prior = prior
        self.normal = _normal(prior)
        self.buffer = torch.empty(0)

    def __call__(self, count: int) -> Tensor:
        """Draws ``count`` proposals per row, of shape ``(count, B, *event)``."""
        if self.normal is None:
            return self.prior.sample(Size((count,)))
        mean, sd = self.normal
        if len(self.buffer) < count:
            self.buffer = mean.new_empty(count, *mean.shape)
        return self.buffer[:count].normal_().mul_(sd).add_(mean)


def _normal(prior: Sampleable) -> tuple[Tensor, Tensor] | None:
    while type(prior) is Independent:
        prior = prior.base_dist
    return (prior.loc, prior.scale) if type(prior) is Normal else None


def require_same_rows(prior: Sampleable, log_ratio: LogRatio, z: Tensor) -> None:
    """Refuses rows of different p or log r, as far as some proposals show.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``.
        z: Proposals, with shape ``(M, B, *event)``.

    Raises:
        ValueError: If rows differ, or the prior does not tell.
    """
    points = z[0, :_POINTS, None].expand(-1, z.shape[1], *z.shape[2:])
    log_prob = getattr(prior, "log_prob", None)
    if log_prob is None and not is_expanded(prior):
        _refuse_sharing(f"the prior {type(prior).__name__} can only be sampled, and does not tell")
    if log_prob is not None and not _equal_rows(log_prob(points)):
        _refuse_sharing("p(z) is not the same in all of them")
    if not _equal_rows(log_ratio(points)):
        _refuse_sharing("log r(z) is not the same in all of them: it depends on a context")


def _equal_rows(values: Tensor) -> bool:
    values = values[values.isfinite().all(1)]  # what is not finite, the samplers speak of
    first = values[:, :1]
    return bool(((values - first).abs() <= _ROUNDING * (1 + first.abs())).all())


def _refuse_sharing(reason: str) -> NoReturn:
    raise ValueError(
        f"Rows can share proposals or particles only where their p and r are one: {reason}. Let "
        f"every row have its own: share_proposals=False of sir, share=False of tempered_smc."
    )
