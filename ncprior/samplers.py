r"""Samplers of p(z) ∝ r(z)·p(z): pure functions ``sampler(prior, log_ratio) -> Draw``.

``prior`` is p(z) of batch shape ``(B,)``; ``log_ratio`` maps z, with shape ``(*, B, *event)``, to
log r(z) in nats, with shape ``(*, B)``. Anything with this signature is a sampler; configure one
with ``functools.partial(sir, num_proposals=500)``.

References:
    | A Contrastive Learning Approach for Training Variational Autoencoder Priors
    | (Aneja et al., NeurIPS 2021), section 4.3
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

if TYPE_CHECKING:
    from ncprior.source import Sampleable

__all__ = ["Draw", "LogRatio", "Sampler", "langevin", "sir"]

LogRatio: TypeAlias = Callable[[Tensor], Tensor]
Sampler: TypeAlias = "Callable[[Sampleable, LogRatio], Draw]"


class Draw(NamedTuple):
    """One draw per row, and what the sampler knows of its quality; what does not apply is None.

    Attributes:
        z: The latents, with shape ``(B, *event)``.
        ess: Effective sample size of the proposals, (Σ r)² / Σ r², from 1 to M, with shape ``(B,)``.
        log_mean_weight: log (1/M) Σ r, an estimate of log Z in nats, with shape ``(B,)``.
        acceptance: Share of accepted proposals of a Markov chain, with shape ``(B,)``.

    Example:
        >>> Draw(z=torch.zeros(4, 2)).ess is None
        True
    """

    z: Tensor
    ess: Tensor | None = None
    log_mean_weight: Tensor | None = None
    acceptance: Tensor | None = None


@torch.no_grad()
def sir(
    prior: Sampleable,
    log_ratio: LogRatio,
    *,
    num_proposals: int,
    chunk_size: int = 4096,
) -> Draw:
    r"""Sampling-importance-resampling: of M proposals z ~ p(z), keeps one with probability ∝ r(z).

    One pass of Gumbel-max over chunks of proposals: with g ~ Gumbel(0, 1), the proposal of the
    largest log r(z) + g is a draw from the categorical distribution of weights r(z). Memory does
    not grow with M. The law of the draw tends to r·p / Z as M → ∞; M proposals correct about
    log M nats.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``.
        num_proposals: M, the number of proposals per row.
        chunk_size: Most latents (proposals × rows) given to ``log_ratio`` at once, or one proposal
            per row if that is more. Bounds the memory; the law of the draw does not depend on it.

    Returns:
        A draw with ``z``, ``ess`` and ``log_mean_weight``.

    Raises:
        ValueError: If there is no proposal to draw, or the prior or log r has the wrong shape.
        FloatingPointError: If log r is not finite.

    References:
        Aneja et al. (2021), section 4.3.

    Example:
        >>> prior = Normal(torch.zeros(1000), 1.0)
        >>> draw = sir(prior, lambda z: 0.5 * z, num_proposals=200)  # r·p ∝ N(0.5, 1)
        >>> round(draw.z.mean().item(), 1)
        0.5
    """
    if num_proposals < 1 or chunk_size < 1:
        raise ValueError(
            f"num_proposals and chunk_size must be at least 1; got {num_proposals}, {chunk_size}."
        )
    _check_rows(prior)
    pool = _Pool(prior, log_ratio)
    # The first chunk is one proposal per row: it tells B, whatever kind of sampler the prior is.
    pool.add(1)
    rows = len(pool.z)
    while pool.num_proposals < num_proposals:
        pool.add(min(max(1, chunk_size // max(1, rows)), num_proposals - pool.num_proposals))
    return pool.draw()


class _Pool:
    """Proposals seen so far: the leader of each row and the running sums of r and r²."""

    finite: Tensor  # (), whether all of log r was; looked at once, at the end
    z: Tensor  # (B, *event), the leaders
    key: Tensor  # (B,), log r + Gumbel of the leaders
    top: Tensor  # (B,), the largest log r; the sums are relative to it, so that nothing overflows
    sum_r: Tensor  # (B,), Σ exp(log r - top)
    sum_r2: Tensor  # (B,), Σ exp(2 (log r - top))

    def __init__(self, prior: Sampleable, log_ratio: LogRatio) -> None:
        self.prior, self.log_ratio = prior, log_ratio
        self.num_proposals = 0

    def add(self, count: int) -> None:
        z = self.prior.sample(Size((count,)))
        log_r = _checked(self.log_ratio(z), z.shape[:2])
        # Gumbel = -log Exponential. Where float resolution makes an exponential zero, it stands
        # for one below the resolution.
        noise = torch.empty_like(log_r).exponential_().clamp_(min=torch.finfo(log_r.dtype).eps / 4)
        key, winner = (log_r - noise.log_()).max(0)
        top = log_r.amax(0)
        r = (log_r - top).exp()
        sum_r, sum_r2 = r.sum(0), r.square().sum(0)
        z = z[winner, torch.arange(len(winner), device=winner.device)]
        finite = torch.isfinite(log_r).all()
        if self.num_proposals == 0:
            self.finite = finite
            self.z, self.key, self.top, self.sum_r, self.sum_r2 = z, key, top, sum_r, sum_r2
        else:
            self.finite = self.finite & finite
            ahead = key > self.key
            self.z = torch.where(_like_event(ahead, z), z, self.z)
            self.key = torch.maximum(key, self.key)
            new_top = torch.maximum(top, self.top)
            old, new = (self.top - new_top).exp(), (top - new_top).exp()
            self.sum_r = self.sum_r * old + sum_r * new
            self.sum_r2 = self.sum_r2 * old.square() + sum_r2 * new.square()
            self.top = new_top
        self.num_proposals += count

    def draw(self) -> Draw:
        if not self.finite:
            raise FloatingPointError(
                f"log r is not finite for some of {self.num_proposals} proposals. "
                f"Look for NaN or infinity in the head's weights, the prior or the context."
            )
        log_mean_weight = self.top + self.sum_r.log() - math.log(self.num_proposals)
        return Draw(self.z, self.sum_r.square() / self.sum_r2, log_mean_weight)


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
    density = _continuous(prior)
    _check_rows(prior)
    energy = _Energy(density, log_ratio)
    z = prior.sample() if init is None else _checked_init(init, density)
    if adjusted:
        z, acceptance = _mala(energy, z, num_steps, step_size)
    else:
        z, acceptance = _ula(energy, z, num_steps, step_size), None
    energy.raise_if_bad(z)
    return Draw(z, acceptance=acceptance)


def _ula(energy: _Energy, z: Tensor, num_steps: int, step_size: float) -> Tensor:
    for _ in range(num_steps):
        _, gradient = energy(z)
        z = z - 0.5 * step_size * gradient + step_size**0.5 * torch.randn_like(z)
    return z


def _mala(energy: _Energy, z: Tensor, num_steps: int, step_size: float) -> tuple[Tensor, Tensor]:
    e, gradient = energy(z)
    accepted = torch.zeros_like(e)
    for _ in range(num_steps):
        noise = torch.randn_like(z)
        z_new = z - 0.5 * step_size * gradient + step_size**0.5 * noise
        e_new, gradient_new = energy(z_new)
        # log q(z | z') - log q(z' | z), both Gaussian of variance λ.
        back = (z - z_new + 0.5 * step_size * gradient_new) / step_size**0.5
        log_q_ratio = 0.5 * (noise.square() - back.square()).reshape(len(z), -1).sum(1)
        accept = torch.rand_like(e).log() < e - e_new + log_q_ratio
        z = torch.where(_like_event(accept, z), z_new, z)
        gradient = torch.where(_like_event(accept, z), gradient_new, gradient)
        e = torch.where(accept, e_new, e)
        accepted += accept
    return z, accepted / max(1, num_steps)


class _Energy:
    """E(z) = -log r(z) - log p(z) and its gradient; remembers the first step that is not finite."""

    def __init__(self, prior: Distribution, log_ratio: LogRatio) -> None:
        self.prior, self.log_ratio = prior, log_ratio
        self.calls = 0
        self.first_bad: Tensor | None = None  # stays on the device: no synchronisation per step

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            energy = -_checked(self.log_ratio(z), z.shape[:1]) - self.prior.log_prob(z)
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


def _continuous(prior: Sampleable) -> Distribution:
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


def _check_rows(prior: Sampleable) -> None:
    if isinstance(prior, Distribution) and len(prior.batch_shape) != 1:
        raise ValueError(
            f"The prior of a sampler has batch shape (B,); got {tuple(prior.batch_shape)} with "
            f"event shape {tuple(prior.event_shape)}. Use prior.expand((B,))."
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


def _checked(log_r: Tensor, shape: Size) -> Tensor:
    if log_r.shape != shape:
        raise ValueError(
            f"log_ratio must map z of shape (*, B, *event) to log r of shape (*, B), here "
            f"{tuple(shape)}; got {tuple(log_r.shape)}."
        )
    return log_r if log_r.dtype == torch.float64 else log_r.float()


def _like_event(mask: Tensor, z: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (z.ndim - mask.ndim))
