"""The unnormalised target r·p of Markov chains: its values and gradients at points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from ncprior.distributions import Sampleable
from ncprior.samplers.base import (
    LogRatio,
    check_prior,
    check_target,
    checked,
    like_event,
    over_event,
)
from ncprior.utils.gradients import require_grad_mode
from ncprior.utils.supports import ANGLES, BOUNDED, DISCRETE, support_of

_NEVER = 2**31 - 1  # a call that no chain reaches; MPS computes integers by way of a double


class Point(NamedTuple):
    """Points of Markov chains, with the values and gradients for a step on r^β·p at any β.

    Attributes:
        z: The latents, with shape ``(*, B, *event)``.
        log_r: log r(z) in nats, with shape ``(*, B)``.
        log_p: log p(z) in nats, with shape ``(*, B)``.
        grad_log_r: ∇ log r(z), of the shape of z.
        grad_log_p: ∇ log p(z), of the shape of z.
    """

    z: Tensor
    log_r: Tensor
    log_p: Tensor
    grad_log_r: Tensor
    grad_log_p: Tensor

    def where(self, mask: Tensor, other: Point) -> Point:
        """The points of the chains in a mask of shape ``(*, B)``, and other points of the rest."""
        pairs = zip(self, other, strict=True)
        return Point(*(torch.where(like_event(mask, new), new, old) for new, old in pairs))

    def is_finite(self) -> Tensor:
        """Whether all values of each point are finite, with shape ``(*, B)``."""
        return torch.stack([over_event(it.isfinite(), self.log_r).all(-1) for it in self]).all(0)

    def log_density(self, beta: float) -> Tensor:
        """β log r(z) + log p(z) in nats, with shape ``(*, B)``."""
        return beta * self.log_r + self.log_p

    def score(self, beta: float) -> Tensor:
        """Gradient of β log r(z) + log p(z) with respect to z, of the shape of z."""
        return beta * self.grad_log_r + self.grad_log_p


class Target:
    """Unnormalised target r·p of Langevin dynamics, which records the first non-finite evaluation.

    A proposal that is not finite is not accepted. It is an error only if more than half of them are.

    Raises:
        TypeError: If the prior is discrete, bounded, or has no density.
        ValueError: If its batch shape is not ``(B,)``; when called, if the gradient of log r or log
            p is cut.
    """

    def __init__(self, prior: Sampleable, log_ratio: LogRatio) -> None:
        require_grad_mode("Langevin dynamics")
        check_target(prior, log_ratio)
        self.prior, self.log_ratio = _continuous(prior), log_ratio
        self.calls = 0
        self.constants: set[str] = set()  # of log r and log p, those seen not to depend on z
        # Stay on the device: no synchronisation per step.
        self.first_bad: Tensor | None = None
        self.first_lost: Tensor | None = None  # of the proposals
        self.num_lost: Any = 0
        self.num_proposed = 0

    def __call__(self, z: Tensor) -> Point:
        """Evaluates log r, log p and their gradients at z, with shape ``(*, B, *event)``."""
        point = self._evaluated(z)
        bad = ~point.is_finite().all()
        self.first_bad = self._first(self.first_bad, bad)
        self.calls += 1
        # After a value that is not finite, all slopes are 0 here: z stays finite, and a prior that
        # validates z does not raise its own error first.
        return Point(*point[:3], *(torch.where(bad, 0.0, slope) for slope in point[3:]))

    def proposed(self, z: Tensor, last: Point) -> tuple[Point, Tensor]:
        """Evaluates proposals.

        Arguments:
            z: The proposals, with shape ``(*, B, *event)``.
            last: Finite points, to return where a proposal is not finite.

        Returns:
            The points, and whether each proposal is finite, with shape ``(*, B)``.
        """
        is_finite = over_event(z.isfinite(), last.log_r).all(-1)
        point = self._evaluated(torch.where(like_event(is_finite, z), z, last.z))
        is_finite = is_finite & point.is_finite()
        self.first_lost = self._first(self.first_lost, ~is_finite.all())
        self.num_lost = self.num_lost + (~is_finite).sum()
        self.num_proposed += is_finite.numel()
        self.calls += 1
        return point.where(is_finite, last), is_finite

    def first_bad_step(self, z: Tensor) -> Tensor:
        """Returns the first step that was not finite, on the device; a large number if none counts.

        The last z counts as the step after all evaluations, and proposals if more than half are lost.
        """
        first = torch.where(torch.isfinite(z).all(), _NEVER, self.calls)
        if self.first_bad is not None:
            first = torch.minimum(first, self.first_bad)
        if self.first_lost is not None:
            counts = 2 * self.num_lost > self.num_proposed
            first = torch.minimum(first, torch.where(counts, self.first_lost, _NEVER))
        return first

    def _first(self, first: Tensor | None, bad: Tensor) -> Tensor:
        call = torch.where(bad, self.calls, _NEVER)
        return call if first is None else torch.minimum(first, call)

    def _evaluated(self, z: Tensor) -> Point:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_p = self.prior.log_prob(z)
            log_r = checked(self.log_ratio(z), log_p.shape)
            slopes = [self._gradient("log_ratio", self.log_ratio, log_r, z)]
            slopes += [self._gradient("prior.log_prob", self.prior.log_prob, log_p, z)]
        return Point(z.detach(), log_r.detach(), log_p.detach(), *slopes)

    def raise_if_bad(self, first: int) -> None:
        """Raises an error if :meth:`first_bad_step` has found a step.

        Raises:
            FloatingPointError: If a value is not finite; take a smaller step size.
        """
        if first <= self.calls:
            raise FloatingPointError(
                f"The energy -log r - log p or its gradient is not finite at step {first} of "
                f"Langevin dynamics. Take a smaller step_size, or look for NaN or infinity in "
                f"the head's weights, the prior or the context."
            )

    def _gradient(
        self, name: str, function: Callable[[Tensor], Tensor], value: Tensor, z: Tensor
    ) -> Tensor:
        """∂ Σ value / ∂z of value = function(z); 0 for a constant, at the price of one check."""
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
            if gradient is not None:
                return gradient
        if name not in self.constants:
            with torch.no_grad():
                _require_constant(name, function, value, z)
            self.constants.add(name)
        return torch.zeros_like(z)


def supports_langevin(prior: Sampleable) -> bool:
    """Whether a prior supports Langevin dynamics: it needs a density on all of R^n.

    Example:
        >>> supports_langevin(Normal(0.0, 1.0)), supports_langevin(torch.distributions.Bernoulli(0.5))
        (True, False)
    """
    check_prior(prior)
    try:
        _continuous(prior)
    except TypeError:
        return False
    return True


def _require_constant(
    name: str, function: Callable[[Tensor], Tensor], value: Tensor, z: Tensor
) -> None:
    """Validates that a function without a gradient is a constant, at two other places."""
    away = torch.linspace(0.5, 1.5, z.shape[1:].numel(), dtype=z.dtype, device=z.device)
    for factor in (1, -2):
        there = function(z + factor * away.reshape(z.shape[1:]))
        if not torch.equal(value.nan_to_num(), there.nan_to_num().to(value.dtype)):
            raise ValueError(
                f"{name} changes with z, but Langevin dynamics gets no gradient of it. Look for "
                f"no_grad, inference_mode or detach in the ratio head, in features= or in the "
                f"source; or use sir, which needs no gradient."
            )


def _continuous(prior: Sampleable) -> Distribution:
    """Returns the prior after a check that it has a density on all of R^n."""
    name = name_of(prior)
    if not isinstance(prior, Distribution) and not hasattr(prior, "log_prob"):
        raise TypeError(
            f"Langevin dynamics needs log p(z); the prior {name} can only be sampled. Use sir."
        )
    support = support_of(prior)
    if support == DISCRETE:
        raise TypeError(
            f"Langevin dynamics differentiates the latents; the prior {name} is discrete. Use sir."
        )
    if support:
        where = "is bounded" if support in (BOUNDED, ANGLES) else f"draws latents {support}"
        raise TypeError(
            f"Langevin dynamics needs latents on all of R^n; the prior {name} {where}. Use sir."
        )
    return prior  # type: ignore[return-value]


def name_of(prior: Sampleable) -> str:
    """Returns the name of a prior's type, without ``Independent`` and expansion over rows."""
    inner: Any = prior.base_dist if isinstance(prior, Independent) else None
    inner = inner or getattr(prior, "prior", None)  # of a prior that is expanded over rows
    return type(prior).__name__ if inner is None else name_of(inner)
