r"""Langevin dynamics on the energy E(z) = -log r(z) - log p(z): ULA, MALA, and steps of HMC.

References:
    | A Contrastive Learning Approach for Training Variational Autoencoder Priors
    | (Aneja et al., NeurIPS 2021), section 4.3
    | Exponential Convergence of Langevin Distributions and Their Discrete Approximations
    | (Roberts & Tweedie, 1996)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from ncprior.distributions import Sampleable
from ncprior.samplers.base import (
    Draw,
    LogRatio,
    check_prior,
    check_target,
    checked,
    like_event,
    start_at,
)
from ncprior.utils.draws import drawn
from ncprior.utils.gradients import require_grad_mode
from ncprior.utils.require import require_counts, require_flags, require_numbers
from ncprior.utils.supports import ANGLES, BOUNDED, DISCRETE, support_of

_NEVER = 2**31 - 1  # a call that no chain reaches; MPS computes integers by way of a double


@torch.no_grad()
def langevin(
    prior: Sampleable,
    log_ratio: LogRatio,
    *,
    num_steps: int,
    step_size: float,
    adjusted: bool = False,
    init: Tensor | None = None,
) -> Draw:
    r"""Langevin dynamics on the energy E(z) = -log r(z) - log p(z), in the paper's convention:

    .. math::
        z \leftarrow z - \tfrac{1}{2} \lambda \nabla E(z) + \sqrt{\lambda}\, \varepsilon,
        \qquad \varepsilon \sim N(0, I).

    By default this is the unadjusted Langevin algorithm (ULA), whose stationary distribution
    differs from r·p / Z by O(λ). ``adjusted=True`` adds a Metropolis-Hastings correction of each
    step: the Metropolis-adjusted Langevin algorithm (MALA), which leaves r·p / Z invariant.
    Gradients are taken with respect to z alone. Chains move in all of R^n: latents on a sphere,
    a simplex or a circle, bounded ones and codes are for :func:`~ncprior.sir`.

    Arguments:
        prior: p(z), a continuous distribution on R^n of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(B, *event)``, to log r(z) in nats, ``(B,)``.
        num_steps: Number of steps.
        step_size: λ, in squared units of z.
        adjusted: Whether to correct each step by Metropolis-Hastings (MALA).
        init: Start of the chains, ``(B, *event)``, such as the z of another draw; ``None`` draws
            it from p(z).

    Returns:
        A draw with ``z`` and, when adjusted, ``acceptance``.

    Raises:
        TypeError: If the prior is discrete, bounded, on a sphere or a simplex, or has no density, or
            an argument has the wrong type.
        ValueError: If an argument is out of range, or log r or log p changes with z but its
            gradient is cut, as by ``torch.no_grad`` or ``detach``.
        FloatingPointError: If log r, log p or a gradient is not finite; take a smaller step size.
        RuntimeError: Inside ``torch.inference_mode``.

    References:
        Aneja et al. (2021), section 4.3.

    Example:
        >>> prior = Normal(torch.zeros(2000), 1.0)
        >>> draw = langevin(prior, lambda z: 0.5 * z, num_steps=50, step_size=0.5, adjusted=True)
        >>> round(draw.z.mean().item(), 1)
        0.5
    """
    require_counts("[0, inf)", num_steps=num_steps)
    require_numbers("(0, inf)", step_size=step_size)
    require_flags(adjusted=adjusted)
    target = Target(prior, log_ratio)
    z = drawn(prior) if init is None else start_at(init, prior)
    z = z if z.is_floating_point() else z.float()
    z, acceptance = run_chains(target, z, num_steps, step_size, adjusted=adjusted)
    target.raise_if_bad(int(target.first_bad_step(z)))
    return Draw(z, acceptance=acceptance)


def run_chains(
    target: Target, z: Tensor, num_steps: int, step_size: float, *, adjusted: bool
) -> tuple[Tensor, Tensor | None]:
    """Runs Langevin chains without a synchronisation.

    Arguments:
        target: r·p, which records the first step that is not finite.
        z: Start of the chains, with shape ``(B, *event)``.
        num_steps: Number of steps.
        step_size: λ, in squared units of z.
        adjusted: Whether to correct each step by Metropolis-Hastings.

    Returns:
        The ends of the chains, and their acceptance rates if they are adjusted.
    """
    if adjusted:
        return _mala(target, z, num_steps, step_size)
    return _ula(target, z, num_steps, step_size), None


def _ula(target: Target, z: Tensor, num_steps: int, step_size: float) -> Tensor:
    for _ in range(num_steps):
        drift = target(z).score(1.0)
        z = z + 0.5 * step_size * drift + step_size**0.5 * torch.randn_like(z)
    return z


def _mala(target: Target, z: Tensor, num_steps: int, step_size: float) -> tuple[Tensor, Tensor]:
    point = target(z)
    accepted = torch.zeros_like(point.log_r)
    for _ in range(num_steps):
        point, accept = hmc_step(target, point, step_size)
        accepted += accept
    return point.z, accepted / max(1, num_steps)


def hmc_step(
    target: Target,
    here: Point,
    step_size: float | Tensor,
    beta: float = 1.0,
    num_leapfrogs: int = 1,
) -> tuple[Point, Tensor]:
    r"""One step of Hamiltonian Monte Carlo (HMC) on r^β·p, which is one of MALA for one leapfrog:

    .. math::
        v \leftarrow v + \tfrac{1}{2} \sqrt{\lambda}\, \nabla \log r^\beta p(z), \quad
        z \leftarrow z + \sqrt{\lambda}\, v, \quad
        v \leftarrow v + \tfrac{1}{2} \sqrt{\lambda}\, \nabla \log r^\beta p(z),
        \qquad v \sim N(0, I).

    Arguments:
        target: r·p.
        here: The current points of the chains.
        step_size: λ, in squared units of z.
        beta: β, the inverse temperature of r.
        num_leapfrogs: Leapfrogs between two Metropolis-Hastings corrections; each is a gradient.

    Returns:
        The next points, and whether each proposal was accepted, with shape ``(*, B)``.

    References:
        | MCMC Using Hamiltonian Dynamics (Neal, 2011)
    """
    length = step_size**0.5
    start = torch.randn_like(here.z)
    there, momentum = here, start
    for _ in range(num_leapfrogs):
        momentum = momentum + 0.5 * length * there.score(beta)
        there = target(there.z + length * momentum)
        momentum = momentum + 0.5 * length * there.score(beta)
    gained = (start.square() - momentum.square()).reshape(*here.log_r.shape, -1).sum(-1)
    log_a = there.log_density(beta) - here.log_density(beta) + 0.5 * gained
    accept = torch.rand_like(log_a).log() < log_a
    pairs = zip(there, here, strict=True)
    return Point(*(torch.where(like_event(accept, new), new, old) for new, old in pairs)), accept


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

    def log_density(self, beta: float) -> Tensor:
        """β log r(z) + log p(z) in nats, with shape ``(*, B)``."""
        return beta * self.log_r + self.log_p

    def score(self, beta: float) -> Tensor:
        """Gradient of β log r(z) + log p(z) with respect to z, of the shape of z."""
        return beta * self.grad_log_r + self.grad_log_p


class Target:
    """Unnormalised target r·p of Langevin dynamics, which records the first non-finite evaluation.

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
        self.first_bad: Tensor | None = None  # stays on the device: no synchronisation per step

    def __call__(self, z: Tensor) -> Point:
        """Evaluates log r, log p and their gradients at z, with shape ``(*, B, *event)``."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_p = self.prior.log_prob(z)
            log_r = checked(self.log_ratio(z), log_p.shape)
            slopes = [self._gradient("log_ratio", self.log_ratio, log_r, z)]
            slopes += [self._gradient("prior.log_prob", self.prior.log_prob, log_p, z)]
        point = Point(z.detach(), log_r.detach(), log_p.detach(), *slopes)
        bad = ~torch.stack([torch.isfinite(values).all() for values in point[1:]]).all()
        call = torch.where(bad, self.calls, _NEVER)
        self.first_bad = call if self.first_bad is None else torch.minimum(self.first_bad, call)
        self.calls += 1
        # After a value that is not finite, all slopes are 0 here: z stays finite, and a prior that
        # validates z does not raise its own error first.
        still = [torch.where(bad, 0.0, slope) for slope in slopes]
        return Point(*point[:3], *still)

    def first_bad_step(self, z: Tensor) -> Tensor:
        """Returns the first step that was not finite, on the device; a large number if all were.

        The last z counts as the step after all evaluations.
        """
        last = torch.where(torch.isfinite(z).all(), _NEVER, self.calls)
        return last if self.first_bad is None else torch.minimum(self.first_bad, last)

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
