r"""Tempered sequential Monte Carlo (SMC): particles move from p to r·p over r^β·p, β from 0 to 1.

SIR weights its proposals once and corrects at most log M nats. Tempered SMC alternates small
increments of β, resampling and moves by MALA or HMC: the nats that it can correct grow with the number of
temperatures. If all rows have the same target, they can share their particles: 12 nats of a
Gaussian then cost about a dozen gradients of log r per sample.

References:
    | Sequential Monte Carlo Samplers (Del Moral, Doucet & Jasra, 2006)
    | Inference for Lévy-driven stochastic volatility models via adaptive sequential Monte Carlo
    | (Jasra, Stephens, Doucet & Tsagaris, 2011), for the choice of temperatures
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncprior.distributions import Sampleable
from ncprior.samplers.base import Draw, LogRatio, draw_from
from ncprior.samplers.langevin import hmc_step
from ncprior.samplers.proposals import require_same_rows
from ncprior.samplers.target import Point, Target
from ncprior.utils.require import require_counts, require_flags, require_numbers

_BISECTIONS = 20

_POPULATION = 512  # least number of shared particles

_FEW = 16  # chains: with fewer, acceptance is mostly chance, and the step is adapted slowly

_ACCEPTANCE = 0.574  # optimal for MALA in many dimensions (Roberts & Rosenthal, 1998)

_ACCEPTANCE_OF_HMC = 0.75  # 0.65 is optimal for long chains (Beskos et al., 2013)

_JITTER = (0.8, 1.2)  # factors of a chain's leapfrog size in a move (Neal, 2011, section 3.2)


@torch.no_grad()
def tempered_smc(
    prior: Sampleable,
    log_ratio: LogRatio,
    *,
    num_particles: int,
    num_moves: int = 2,
    num_leapfrogs: int = 1,
    step_size: float = 0.5,
    ess_fraction: float = 0.5,
    share_particles: bool = False,
    max_temperatures: int = 200,
) -> Draw:
    r"""Tempered sequential Monte Carlo: draws one of P particles per row, moved from p to r·p.

    Each inverse temperature β is the largest at which the effective sample size of the particles
    is still ``ess_fraction`` of the way from 1 to P, on average over the rows; one particle that is not
    shared, of which there is none, is moved at β = 1 alone. At each β the particles
    are resampled and take ``num_moves`` steps of MALA, or of Hamiltonian Monte Carlo (HMC), whose λ
    is adapted to an acceptance rate of 0.57, or 0.75 for HMC; slowly where there are few chains, as
    a step that follows from the fate of a chain biases its draws. In a step of HMC every particle
    draws the size of its leapfrogs, from 0.8 to 1.2 times √λ. One sample costs
    P · (1 + temperatures · moves · leapfrogs) gradients of log r.

    Arguments:
        prior: p(z), a continuous distribution of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``.
        num_particles: P, the particles per row.
        num_moves: Steps per temperature.
        num_leapfrogs: Leapfrogs of a step: 1 is MALA, more are HMC.
        step_size: The first λ, in squared units of z.
        ess_fraction: Effective sample size after a step of β: 0 is one particle, and 1 all P.
        share_particles: Whether all rows share one population of P · B particles, at least 512.
            With P = 1 and B of 512 or more, every particle becomes a draw. The draws of one batch
            then depend on each other a little, through common ancestors. p and log r must be the
            same for every row, as in the first group of a VAE without conditions.
        max_temperatures: Largest number of values of β.

    Returns:
        A draw with ``z``, ``log_mean_weight`` (an estimate of log Z in nats), and ``acceptance``.

    Raises:
        ValueError: If a number is out of range, rows differ and cannot share particles, the
            gradient of log r or log p is cut, or β = 1 is not reached; take more particles or
            temperatures.
        TypeError: If the prior is discrete, bounded, or has no density, or an argument has the
            wrong type.
        FloatingPointError: If log r is not finite at a draw from p, or at more than half of the
            proposals; others are rejected.
        RuntimeError: Inside ``torch.inference_mode``.

    References:
        Del Moral et al. (2006), section 3.

    Example:
        >>> prior = Normal(torch.zeros(200), 1.0)
        >>> draw = tempered_smc(prior, lambda z: 5 * z, num_particles=20)  # r·p ∝ N(5, 1)
        >>> round(draw.z.mean().item())
        5
    """
    require_counts(
        num_particles=num_particles,
        num_moves=num_moves,
        num_leapfrogs=num_leapfrogs,
        max_temperatures=max_temperatures,
    )
    require_numbers("(0, inf)", step_size=step_size)
    require_numbers("(0, 1)", ess_fraction=ess_fraction)
    require_flags(share_particles=share_particles)
    particles = _Particles(Target(prior, log_ratio), num_particles, share_particles)
    accepted, wanted = [], _ACCEPTANCE if num_leapfrogs == 1 else _ACCEPTANCE_OF_HMC
    step = particles.scalar(step_size)  # on the device, as all but one number per temperature
    for _ in range(max_temperatures):
        particles.heat(ess_fraction)
        for _ in range(num_moves):
            a = particles.move(step, num_leapfrogs)
            gain = a.numel() / (a.numel() + _FEW)
            step = step * (gain * (a.mean().to(step.dtype) - wanted)).exp()
            accepted.append(a.mean(0))
        if particles.beta == 1:
            return particles.draw(torch.stack(accepted).mean(0))
    raise ValueError(
        f"After {max_temperatures} temperatures β is {particles.beta:.3g}. Take more particles, a "
        f"smaller ess_fraction or more temperatures, or a closer base."
    )


class _Particles:
    """Particles at one β: P per row, or one population of all rows if they are shared."""

    def __init__(self, target: Target, num_particles: int, share: bool) -> None:
        self.target, self.share = target, share
        z = draw_from(target.prior, num_particles)
        if share:
            require_same_rows(target.prior, target.log_ratio, z)
            missing = -(-_POPULATION // z.shape[1]) - num_particles
            if missing > 0:
                z = torch.cat([z, draw_from(target.prior, missing)])
        self.at = target(z)  # z: (P, B, *event)
        self.beta = 0.0
        self.log_z = torch.zeros_like(self.at.log_r[0])

    def heat(self, ess_fraction: float) -> None:
        """Increases β as far as the effective sample size allows, and resamples."""
        largest, bad = 1 - self.beta, self.target.first_bad_step(self.at.z)
        found = self._step(largest, ess_fraction)
        part, call = torch.stack([found, bad.to(found.dtype)]).tolist()  # the one synchronisation
        self.target.raise_if_bad(int(call))
        step = min(part, largest)
        self.beta = 1.0 if step == 1 - self.beta else self.beta + step
        log_w = self._population(step * self.at.log_r)
        self.log_z = self.log_z + log_w.logsumexp(0) - math.log(len(log_w))
        ancestors = _systematic(log_w)
        self.at = Point(*(self._resampled(values, ancestors) for values in self.at))

    def scalar(self, value: float) -> Tensor:
        """A number on the device of the particles, in float64 if it has such numbers."""
        log_r = self.at.log_r
        dtype = torch.float32 if log_r.device.type == "mps" else torch.float64
        return torch.full((), float(value), dtype=dtype, device=log_r.device)

    def move(self, step_size: Tensor, num_leapfrogs: int) -> Tensor:
        """Takes one step on r^β·p; returns the probabilities of its acceptance, (P, B)."""
        if num_leapfrogs > 1:  # several leapfrogs of one size can lead back to their start
            factor = torch.empty_like(self.at.log_r).uniform_(*_JITTER)
            events = [1] * (self.at.z.ndim - factor.ndim)
            step_size = (
                (step_size * factor.square()).reshape(*factor.shape, *events).to(self.at.z.dtype)
            )
        self.at, a = hmc_step(self.target, self.at, step_size, self.beta, num_leapfrogs)
        return a

    def draw(self, acceptance: Tensor) -> Draw:
        """Returns one particle per row, picked uniformly: resampling has made weights equal."""
        self.target.raise_if_bad(int(self.target.first_bad_step(self.at.z)))
        particles, batch = self.at.log_r.shape
        picked = torch.randint(particles, (batch,), device=self.at.z.device)
        z = self.at.z[picked, torch.arange(batch, device=self.at.z.device)]
        return Draw(z, log_mean_weight=self.log_z, acceptance=acceptance)

    def _step(self, largest: float, ess_fraction: float) -> Tensor:
        """Largest step of β at which the effective sample size is large enough, by bisection.

        It is infinite if even the largest step is.
        """
        low, high = self.scalar(0.0), self.scalar(largest)
        is_whole = self._ess_fraction(high) >= ess_fraction
        if high.device.type == "cpu" and is_whole:  # where reading it costs nothing
            return self.scalar(math.inf)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            is_enough = self._ess_fraction(middle) >= ess_fraction
            low, high = torch.where(is_enough, middle, low), torch.where(is_enough, high, middle)
        return torch.where(is_whole, math.inf, low)

    def _ess_fraction(self, step: Tensor) -> Tensor:
        """Effective sample size, from 1 to P, as a number from 0 to 1."""
        w = self._population(step * self.at.log_r).softmax(0)
        ess = (1 / w.square().sum(0)).mean().to(step.dtype)
        return (ess - 1) / (len(w) - 1) if len(w) > 1 else ess

    def _population(self, values: Tensor) -> Tensor:
        """Reshapes (P, B) to (P·B, 1) if all rows share one population."""
        return values.reshape(-1, 1) if self.share else values

    def _resampled(self, values: Tensor, ancestors: Tensor) -> Tensor:
        if self.share:
            return values.flatten(0, 1)[ancestors[:, 0]].reshape(values.shape)
        return values[ancestors, torch.arange(values.shape[1], device=values.device)]


def _systematic(log_w: Tensor) -> Tensor:
    """Systematic resampling: P ancestors, each ⌊P w⌋ or ⌈P w⌉ times, in random order, (P, B)."""
    device = "cpu" if log_w.device.type == "mps" else log_w.device
    w = log_w.to(device).double().softmax(0).mT
    count = w.shape[1]
    start = torch.rand(len(w), 1, dtype=torch.float64, device=device)
    points = (torch.arange(count, device=device) + start) / count
    ancestors = torch.searchsorted(w.cumsum(1), points).clamp(max=count - 1)
    return ancestors[:, torch.randperm(count, device=device)].mT.to(log_w.device)
