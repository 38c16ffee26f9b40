"""KL divergence of posterior and prior for every latent, by which active ones are found."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, kl_divergence

THRESHOLD = 0.01  # nats, of a mean divergence

_ALL = 5  # times the threshold, for all collapsed latents together

_FEW = 16  # rows, which do not show that a latent is collapsed

_DRAWS = 16  # per row, where torch knows no closed form


class LatentKL(NamedTuple):
    """Sums over rows of KL(q(z_j | x) || p(z_j)) in nats, for every latent z_j.

    Attributes:
        rows: The number of rows.
        total: The sum, of event shape, in float64 on the CPU; NaN for latents of unknown
            divergence, see :func:`latent_kl`.
        squares: The sum of squares, of event shape.
    """

    rows: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, posterior: Distribution, prior: Any) -> LatentKL:  # noqa: ANN401
        """Returns the sums over the rows of one batch."""
        kl = latent_kl(posterior, prior).cpu().double()
        return cls(len(kl), kl.sum(0), kl.square().sum(0))

    def merged(self, other: LatentKL) -> LatentKL:
        """Returns the sums over the rows of both."""
        total, squares = self.total + other.total, self.squares + other.squares
        return LatentKL(self.rows + other.rows, total, squares)

    @property
    def mean(self) -> Tensor:
        """The mean over rows in nats, of event shape."""
        return self.total / self.rows

    def active(self, threshold: float = THRESHOLD) -> Tensor:
        """A mask of event shape of the active latents, on the CPU.

        A latent is collapsed if its mean, plus three standard errors, is below the threshold in
        nats, and so are the sums of this over the collapsed latents below five times the threshold: many
        latents that are hardly used may carry much. Few rows, and an unknown divergence, leave a
        latent active.
        """
        if self.rows < _FEW:
            return torch.ones_like(self.total, dtype=torch.bool)
        variance = (self.squares / self.rows - self.mean.square()).clamp(min=0)
        most = (self.mean + 3 * (variance / self.rows).sqrt()).flatten()
        ascending = most.sort()
        collapsed = (ascending.values < threshold) & (
            ascending.values.cumsum(0) < _ALL * threshold
        )
        return ~collapsed[ascending.indices.argsort()].reshape(self.total.shape)


@torch.no_grad()
def latent_kl(posterior: Distribution, prior: Any) -> Tensor:  # noqa: ANN401
    """KL(q(z_j | x) || p(z_j)) in nats, for every latent z_j of every row.

    Arguments:
        posterior: q(z | x), of batch shape ``(B,)``.
        prior: p(z), of batch shape ``(B,)``. A distribution that draws some latents independently
            of all others has a method ``independent_latents()``, which returns a mask of event
            shape and an ``Independent`` distribution that is right where the mask is true.

    Returns:
        The divergences, with shape ``(B, *event)``: in closed form where torch knows it, else an
        estimate from 16 draws. NaN where q or p ties z_j to other latents, where p has no density,
        and for codes.
    """
    shape = posterior.batch_shape + posterior.event_shape
    parts = getattr(prior, "independent_latents", None)
    mask, p = (torch.ones((), dtype=torch.bool), prior) if parts is None else parts()
    kl = _factor_kl(_factors(posterior, shape), _factors(p, shape))
    if kl is None:
        return torch.full(shape, math.nan)
    return torch.where(mask.to(kl.device), kl.float(), math.nan)


def _factors(distribution: Any, shape: Size) -> Distribution | None:  # noqa: ANN401
    """The distributions of single latents, of batch shape ``(B, *event)``; None if they are tied."""
    while type(distribution) is Independent:
        distribution = distribution.base_dist
    if not isinstance(distribution, Distribution) or distribution.batch_shape != shape:
        return None
    with suppress(NotImplementedError):
        if getattr(distribution.support, "is_discrete", False):
            return None
    return distribution


def _factor_kl(q: Distribution | None, p: Distribution | None) -> Tensor | None:
    if q is None or p is None:
        return None
    with suppress(NotImplementedError):
        return kl_divergence(q, p)
    with suppress(NotImplementedError, ValueError):
        z = q.sample(Size((_DRAWS,)))
        return (q.log_prob(z) - p.log_prob(z)).mean(0)
    return None
