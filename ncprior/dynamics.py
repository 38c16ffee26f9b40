r"""Langevin dynamics in z on the energy E(z) = -log r(z) - log p(z), with and without correction.

References:
    | A Contrastive Learning Approach for Training Variational Autoencoder Priors
    | (Aneja et al., NeurIPS 2021), section 4.3
    | Exponential Convergence of Langevin Distributions and Their Discrete Approximations
    | (Roberts & Tweedie, 1996)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ncprior.samplers import Draw, LogRatio, check_rows, checked, like_event

if TYPE_CHECKING:
    from ncprior.source import Sampleable

__all__ = ["langevin"]


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

    Unadjusted (ULA), its stationary law differs from r·p / Z by O(λ). ``adjusted`` accepts or
    rejects each step after Metropolis and Hastings (MALA), which leaves r·p / Z invariant.
    Gradients are taken with respect to z alone.

    Arguments:
        prior: p(z), a continuous distribution of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(B, *event)``, to log r(z) in nats, ``(B,)``.
        num_steps: Number of steps.
        step_size: λ, in squared units of z.
        adjusted: Whether to correct each step (MALA).
        init: Where the chains start, ``(B, *event)``, such as the z of another draw; p(z) if None.

    Returns:
        A draw with ``z`` and, when adjusted, ``acceptance``.

    Raises:
        TypeError: If the prior is discrete, bounded, or has no density.
        ValueError: If ``num_steps``, ``step_size`` or the shape of ``init`` is wrong.
        FloatingPointError: If log r or log p is not finite on the way.

    References:
        Aneja et al. (2021), section 4.3.

    Example:
        >>> prior = Normal(torch.zeros(2000), 1.0)
        >>> draw = langevin(prior, lambda z: 0.5 * z, num_steps=50, step_size=0.5, adjusted=True)
        >>> round(draw.z.mean().item(), 1)
        0.5
    """
    if num_steps < 0 or not 0 < step_size < math.inf:
        raise ValueError(
            f"num_steps must be at least 0 and step_size positive and finite; "
            f"got {num_steps}, {step_size}."
        )
    density = continuous(prior)
    check_rows(prior)
    energy = Energy(density, log_ratio)
    z = prior.sample() if init is None else _checked_init(init, density)
    if adjusted:
        z, acceptance = mala(energy, z, num_steps, step_size)
    else:
        z, acceptance = ula(energy, z, num_steps, step_size), None
    energy.raise_if_bad(z)
    return Draw(z, acceptance=acceptance)


def ula(energy: Energy, z: Tensor, num_steps: int, step_size: float) -> Tensor:
    """Unadjusted steps of Langevin dynamics."""
    for _ in range(num_steps):
        _, gradient = energy(z)
        z = z - 0.5 * step_size * gradient + step_size**0.5 * torch.randn_like(z)
    return z


def mala(energy: Energy, z: Tensor, num_steps: int, step_size: float) -> tuple[Tensor, Tensor]:
    """Steps with Metropolis correction; z, with shape (*, B, *event), and the share accepted."""
    e, gradient = energy(z)
    accepted = torch.zeros_like(e)
    for _ in range(num_steps):
        noise = torch.randn_like(z)
        z_new = z - 0.5 * step_size * gradient + step_size**0.5 * noise
        e_new, gradient_new = energy(z_new)
        # log q(z | z') - log q(z' | z), both Gaussian of variance λ.
        back = (z - z_new + 0.5 * step_size * gradient_new) / step_size**0.5
        log_q_ratio = 0.5 * (noise.square() - back.square()).reshape(*e.shape, -1).sum(-1)
        accept = torch.rand_like(e).log() < e - e_new + log_q_ratio
        z = torch.where(like_event(accept, z), z_new, z)
        gradient = torch.where(like_event(accept, z), gradient_new, gradient)
        e = torch.where(accept, e_new, e)
        accepted += accept
    return z, accepted / max(1, num_steps)


class Energy:
    """E(z) = -log r(z) - log p(z) and its gradient; remembers the first step that is not finite."""

    def __init__(self, prior: Distribution, log_ratio: LogRatio) -> None:
        self.prior, self.log_ratio = prior, log_ratio
        self.calls = 0
        self.first_bad: Tensor | None = None  # stays on the device: no synchronisation per step

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_p = self.prior.log_prob(z)
            energy = -checked(self.log_ratio(z), log_p.shape) - log_p
            (gradient,) = torch.autograd.grad(energy.sum(), z)
        bad = ~(torch.isfinite(energy).all() & torch.isfinite(gradient).all())
        call = torch.where(bad, self.calls, torch.iinfo(torch.int64).max)
        self.first_bad = call if self.first_bad is None else torch.minimum(self.first_bad, call)
        self.calls += 1
        # A bad chain stands still, so that no validating prior complains of it in its own words.
        return energy.detach(), torch.where(bad, 0.0, gradient)

    def raise_if_bad(self, z: Tensor) -> None:
        """Raises if any energy, gradient or the last z is not finite: one synchronisation."""
        first = self.calls if self.first_bad is None else min(self.calls, int(self.first_bad))
        if first < self.calls or not torch.isfinite(z).all():
            raise FloatingPointError(
                f"The energy -log r - log p or its gradient is not finite at step {first} of "
                f"Langevin dynamics. Take a smaller step_size, or look for NaN or infinity in "
                f"the head's weights, the prior or the context."
            )


def continuous(prior: Sampleable) -> Distribution:
    """The prior, if Langevin dynamics can walk in it."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Langevin dynamics takes gradients, which torch.inference_mode forbids. "
            "Call it under torch.no_grad instead."
        )
    name = _name(prior)
    if not isinstance(prior, Distribution) and not hasattr(prior, "log_prob"):
        raise TypeError(
            f"Langevin dynamics needs log p(z); the prior {name} can only be sampled. Use sir."
        )
    try:
        support = prior.support  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError):
        return prior  # type: ignore[return-value]
    if support.is_discrete:
        raise TypeError(
            f"Langevin dynamics differentiates the latents; the prior {name} is discrete. Use sir."
        )
    while hasattr(support, "base_constraint"):  # behind Independent and mixtures
        support = support.base_constraint
    if isinstance(support, _BOUNDED):
        raise TypeError(
            f"Langevin dynamics walks on all of R^n; the prior {name} is bounded. Use sir."
        )
    return prior  # type: ignore[return-value]


_BOUNDED = tuple(
    type(constraint)
    for constraint in (
        constraints.unit_interval,
        constraints.half_open_interval(0, 1),
        constraints.greater_than(0),
        constraints.greater_than_eq(0),
        constraints.less_than(0),
        constraints.simplex,
    )
)


def _checked_init(init: Tensor, prior: Distribution) -> Tensor:
    if isinstance(prior, Distribution) and init.shape != prior.batch_shape + prior.event_shape:
        raise ValueError(
            f"init must have the prior's shape (B, *event), "
            f"{tuple(prior.batch_shape + prior.event_shape)}; got {tuple(init.shape)}."
        )
    return init.detach()


def _name(prior: Sampleable) -> str:
    base = getattr(prior, "base_dist", prior)  # the name behind Independent
    return type(getattr(base, "prior", base)).__name__
