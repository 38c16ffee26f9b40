r"""Langevin dynamics on the energy E(z) = -log r(z) - log p(z): ULA, MALA, and steps of HMC.

References:
    | A Contrastive Learning Approach for Training Variational Autoencoder Priors
    | (Aneja et al., NeurIPS 2021), section 4.3
    | Exponential Convergence of Langevin Distributions and Their Discrete Approximations
    | (Roberts & Tweedie, 1996)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncprior.distributions import Sampleable
from ncprior.samplers.base import Draw, LogRatio, over_event, start_at
from ncprior.samplers.target import Point, Target
from ncprior.utils.draws import drawn
from ncprior.utils.precision import at_least_float32
from ncprior.utils.require import require_counts, require_flags, require_numbers


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
            Adjusted chains reject such a proposal, unless more than half are.
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
    z = at_least_float32(z) if z.is_floating_point() else z.float()
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
        point, acceptance = hmc_step(target, point, step_size)
        accepted += acceptance
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
        step_size: λ, in squared units of z, or one that broadcasts to z.
        beta: β, the inverse temperature of r.
        num_leapfrogs: Leapfrogs between two Metropolis-Hastings corrections; each is a gradient.

    Returns:
        The next points, and the probability with which each proposal was accepted, with shape
        ``(*, B)``; 0 for one on whose way a value was not finite.

    References:
        | MCMC Using Hamiltonian Dynamics (Neal, 2011)
    """
    length = step_size**0.5
    start = torch.randn_like(here.z)
    there, momentum = here, start
    is_valid = torch.ones_like(here.log_r, dtype=torch.bool)
    for _ in range(num_leapfrogs):
        momentum = momentum + 0.5 * length * there.score(beta)
        there, is_finite = target.proposed(there.z + length * momentum, there)
        momentum = momentum + 0.5 * length * there.score(beta)
        is_valid = is_valid & is_finite
    gained = over_event(start.square() - momentum.square(), here.log_r).sum(-1)
    log_a = there.log_density(beta) - here.log_density(beta) + 0.5 * gained
    a = torch.where(is_valid & ~log_a.isnan(), log_a.clamp(max=0).exp(), 0.0)
    return there.where(torch.rand_like(a) < a, here), a
