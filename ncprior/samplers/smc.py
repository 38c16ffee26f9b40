r"""Tempered sequential Monte Carlo: particles led from p to r·p over r^β·p, β from 0 to 1.

SIR weighs its proposals once and corrects about log M nats. Here particles are weighed a little,
resampled and moved, again and again: the nats that can be corrected grow with the number of
temperatures. Where all rows have one target, they can share their particles: 12 nats of a Gaussian
then cost about a dozen gradients of log r per sample.

References:
    | Sequential Monte Carlo Samplers (Del Moral, Doucet & Jasra, 2006)
    | Inference for Lévy-driven stochastic volatility models via adaptive sequential Monte Carlo
    | (Jasra, Stephens, Doucet & Tsagaris, 2011), for the choice of temperatures
"""

from __future__ import annotations

import math

import torch
from torch import Size, Tensor

from ncprior.distributions import Sampleable
from ncprior.samplers.base import Draw, LogRatio
from ncprior.samplers.langevin import Point, Target, mala_step
from ncprior.samplers.proposals import require_same_rows

_BISECTIONS = 20

_POPULATION = 512  # particles at least, where rows share them

_ACCEPTANCE = 0.574  # optimal for MALA in many dimensions (Roberts & Rosenthal, 1998)


@torch.no_grad()
def tempered_smc(
    prior: Sampleable,
    log_ratio: LogRatio,
    *,
    num_particles: int,
    num_moves: int = 2,
    step_size: float = 0.5,
    ess_share: float = 0.5,
    share: bool = False,
    max_temperatures: int = 200,
) -> Draw:
    r"""Draws one of P particles per row, led from p to r·p in steps of β.

    Every β is the largest at which the effective sample size of the particles is still
    ``ess_share`` of their number, on average over the rows. After each, the particles are resampled
    and take ``num_moves`` Metropolis-adjusted Langevin steps, whose λ is adapted to an acceptance
    of 0.57. One sample costs P · (1 + temperatures · moves) gradients of log r.

    Arguments:
        prior: p(z), a continuous distribution of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``.
        num_particles: P, the particles per row.
        num_moves: Langevin steps per temperature.
        step_size: The first λ, in squared units of z.
        ess_share: Share of the particles that a step of β must keep effective, between 0 and 1.
        share: Whether all rows share their particles, P · B of them but at least 512, and all
            become draws where P is 1 and B at least 512. Draws of one batch then depend on each
            other a little, through their ancestors. Only where p and log r are the same for every
            row, as in the first group of a VAE without conditions.
        max_temperatures: Most values of β.

    Returns:
        A draw with ``z``, ``log_mean_weight``, an estimate of log Z, and ``acceptance``.

    Raises:
        ValueError: If a number is out of range, rows that are to share their particles differ, or
            β = 1 is not reached.
        TypeError: If the prior is discrete, bounded, or has no density.
        FloatingPointError: If log r is not finite.

    References:
        Del Moral et al. (2006), section 3.

    Example:
        >>> prior = Normal(torch.zeros(200), 1.0)
        >>> draw = tempered_smc(prior, lambda z: 5 * z, num_particles=20)  # r·p ∝ N(5, 1)
        >>> round(draw.z.mean().item())
        5
    """
    if min(num_particles, num_moves, max_temperatures) < 1 or not 0 < ess_share < 1:
        raise ValueError(
            f"num_particles, num_moves and max_temperatures must be at least 1 and ess_share "
            f"between 0 and 1; got {num_particles}, {num_moves}, {max_temperatures}, {ess_share}."
        )
    particles = _Particles(Target(prior, log_ratio), num_particles, share)
    accepted = []
    for _ in range(max_temperatures):
        particles.heat(ess_share)
        for _ in range(num_moves):
            accept = particles.move(step_size)
            step_size *= math.exp(accept.mean().item() - _ACCEPTANCE)
            accepted.append(accept.mean(0))
        if particles.beta == 1:
            return particles.draw(torch.stack(accepted).mean(0))
    raise ValueError(
        f"After {max_temperatures} temperatures β is {particles.beta:.3g}. Take more particles, a "
        f"smaller ess_share or more temperatures, or a closer base."
    )


class _Particles:
    """P particles of every row at one β; with ``share``, of one population of all rows."""

    def __init__(self, target: Target, num_particles: int, share: bool) -> None:
        self.target, self.share = target, share
        z = target.prior.sample(Size((num_particles,)))
        if share:
            require_same_rows(target.prior, target.log_ratio, z)
            missing = -(-_POPULATION // z.shape[1]) - num_particles
            if missing > 0:
                z = torch.cat([z, target.prior.sample(Size((missing,)))])
        self.at = target(z)  # z: (P, B, *event)
        self.beta = 0.0
        self.log_z = torch.zeros_like(self.at.log_r[0])

    def heat(self, ess_share: float) -> None:
        """Raises β as far as the effective sample size allows, and resamples."""
        self.target.raise_if_bad(self.at.z)
        step = self._step(1 - self.beta, ess_share)
        self.beta = 1.0 if step == 1 - self.beta else self.beta + step
        log_w = self._population(step * self.at.log_r)
        self.log_z = self.log_z + log_w.logsumexp(0) - math.log(len(log_w))
        rows = _systematic(log_w)
        self.at = Point(*(self._resampled(part, rows) for part in self.at))

    def move(self, step_size: float) -> Tensor:
        """Takes a step of MALA at r^β·p; returns what was accepted, (P, B)."""
        self.at, accept = mala_step(self.target, self.at, step_size, self.beta)
        return accept.float()

    def draw(self, acceptance: Tensor) -> Draw:
        """One particle of every row: after resampling they weigh the same."""
        self.target.raise_if_bad(self.at.z)
        particles, batch = self.at.log_r.shape
        picked = torch.randint(particles, (batch,), device=self.at.z.device)
        z = self.at.z[picked, torch.arange(batch, device=self.at.z.device)]
        return Draw(z, log_mean_weight=self.log_z, acceptance=acceptance)

    def _step(self, most: float, ess_share: float) -> float:
        """The largest step of β that keeps the particles effective."""
        if self._ess_share(most) >= ess_share:
            return most
        low, high = 0.0, most
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._ess_share(middle) >= ess_share else (low, middle)
        return low

    def _ess_share(self, step: float) -> float:
        w = self._population(step * self.at.log_r).softmax(0)
        return (1 / (w.square().sum(0) * len(w))).mean().item()

    def _population(self, values: Tensor) -> Tensor:
        """(P, B), or (P·B, 1) where all rows are one population."""
        return values.reshape(-1, 1) if self.share else values

    def _resampled(self, part: Tensor, rows: Tensor) -> Tensor:
        if self.share:
            return part.flatten(0, 1)[rows[:, 0]].reshape(part.shape)
        return part[rows, torch.arange(part.shape[1], device=part.device)]


def _systematic(log_w: Tensor) -> Tensor:
    """Picks P of P particles, each ⌊P w⌋ or ⌈P w⌉ times, in random order; (P, B)."""
    device = "cpu" if log_w.device.type == "mps" else log_w.device
    w = log_w.to(device, torch.float64).softmax(0).mT
    count = w.shape[1]
    start = torch.rand(len(w), 1, dtype=torch.float64, device=device)
    points = (torch.arange(count, device=device) + start) / count
    rows = torch.searchsorted(w.cumsum(1), points).clamp(max=count - 1)
    return rows[:, torch.randperm(count, device=device)].mT.to(log_w.device)
