"""Proposals z ~ p(z) for the rows of a batch, drawn into reused memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from ncprior.distributions import Sampleable, is_expanded
from ncprior.samplers.base import LogRatio, checked, draw_from
from ncprior.utils.draws import normal_parameters

_POINTS = 4  # proposals at which rows are compared

_ROUNDING = 1e-4  # relative differences up to this one are rounding


class Proposals:
    """Proposals of a prior; those of a normal prior overwrite one buffer at each call.

    Under the same seed, those of a normal prior equal ``prior.sample``, bit for bit.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.

    Attributes:
        example: A tensor of the proposals' shape, dtype and device, ``(1, B, *event)``.
    """

    def __init__(self, prior: Sampleable) -> None:
        self.prior = prior
        self.normal = normal_parameters(prior)
        self.buffer = torch.empty(0)
        self.first: Tensor | None = None
        if self.normal is not None:
            self.example = self.normal[0][None]
        else:  # only a draw has the shape; it becomes the first of the proposals
            self.example = self.first = draw_from(prior, 1)

    def __call__(self, count: int) -> Tensor:
        """Draws ``count`` proposals per row, of shape ``(count, B, *event)``."""
        if self.normal is None:
            first, self.first = self.first, None
            if first is None:
                return draw_from(self.prior, count)
            return first if count == 1 else torch.cat([first, draw_from(self.prior, count - 1)])
        mean, sd = self.normal
        if len(self.buffer) < count:
            self.buffer = mean.new_empty(count, *mean.shape)
        return self.buffer[:count].normal_().mul_(sd).add_(mean)

    def peek(self) -> Tensor:
        """Returns one draw per row, of shape ``(1, B, *event)``, before the first proposals.

        Draws of a normal prior cost nothing and are new; those of another one are its first proposals.
        """
        return self(1) if self.first is None else self.first


def require_same_rows(prior: Sampleable, log_ratio: LogRatio, z: Tensor) -> None:
    """Validates that p and log r are the same for all rows, at some proposals.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``.
        z: Proposals, with shape ``(M, B, *event)``.

    Raises:
        ValueError: If rows differ, or a prior without density may differ between rows; let every
            row have its own proposals.
    """
    points = _points(z)
    log_prob = getattr(prior, "log_prob", None)
    if log_prob is None and not is_expanded(prior):
        _raise_not_shareable(
            f"the prior {type(prior).__name__} can only be sampled: its rows cannot be compared"
        )
    if log_prob is not None and not is_same_density(log_prob, z):
        _raise_not_shareable("p(z) differs between rows")
    log_r = checked(log_ratio(points), points.shape[:2])
    if not _equal_rows(log_r[log_r.isfinite().all(1)]):  # samplers raise for others
        _raise_not_shareable("log r(z) differs between rows, as it depends on a context")


def is_same_density(log_prob: Callable[[Tensor], Tensor], z: Tensor) -> bool:
    """Returns whether log p is the same for all rows, at some z of shape ``(M, B, *event)``."""
    return _equal_rows(log_prob(_points(z)))


def _points(z: Tensor) -> Tensor:
    """Some proposals, each given to all rows."""
    return z[0, :_POINTS, None].expand(-1, z.shape[1], *z.shape[2:])


def _equal_rows(values: Tensor) -> bool:
    """Whether the rows of (N, B) numbers are equal; infinite numbers and NaN, too."""
    first = values[:, :1]
    close = (values - first).abs() <= _ROUNDING * (1 + first.abs())
    return bool((close | (values == first) | (values.isnan() & first.isnan())).all())


def _raise_not_shareable(reason: str) -> NoReturn:
    raise ValueError(
        f"Rows can share proposals or particles only if p(z) and r(z) are the same for all rows: "
        f"{reason}. Pass share_proposals=False to sir, or share_particles=False to tempered_smc."
    )
