"""Small problems whose answers are known: base, target, log r, the finite-M law of SIR.

Every continuous problem is a pretend VAE too: `data(n)` draws x and `source()` walks it, and the
aggregate posterior E_x q(z|x) is *exactly* the target. On the numpy side everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Size, Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from ncprior.single_group import SingleGroup
from ncprior.source import Group, LatentSource

Array = np.ndarray

# Step of the quadrature in log t: e^{-pi²/0.2} = 4e-22.
STEP = 0.2


@dataclass(frozen=True)
class SIRLaw:
    """The exact law of SIR with any M over weighted nodes.

    The nodes are the atoms of a discrete base, or quadrature nodes of a continuous one (exact to
    rounding). With phi(t) = E_p e^{-t r} and 1/S = ∫ e^{-tS} dt for the sum S of M weights,

        P(draw = i)  = M ∫ phi^{M-1} p_i r_i e^{-t r_i} dt
        E[log Z_hat] = ∫ (e^{-t} - phi^M) / t dt - log M

    by the trapezoidal rule in s = log t. Both integrands vanish at both ends and are analytic and
    bounded for |Im s| < pi/2 (there Re t > 0), so a step h leaves an error of about e^{-pi²/h}.

    Arguments:
        nodes: where the nodes are, with shape (n, ...).
        weight: base probability of each node, with shape (n,), sum 1.
        log_r: log-ratio at each node in nats, with shape (n,); need not be normalised.
    """

    nodes: Array
    weight: Array
    log_r: Array

    @cached_property
    def _grid(self) -> tuple[Array, Array, Array]:
        """s, x = t·r with shape (s, n), and log phi, on a grid of s = log t."""
        seen = self.log_r[self.weight > 1e-16]
        s = np.arange(min(0.0, -seen.max()) - 50, max(0.0, -seen.min()) + 6, STEP)
        x = np.exp(np.minimum(s[:, None] + self.log_r, 6.6))  # e^{-e^6.6} is 0 in float64
        phi = np.exp(-x) @ self.weight
        near_one = np.log1p(np.maximum(np.expm1(-x) @ self.weight, -0.9))
        return s, x, np.where(phi > 0.5, near_one, np.log(phi + 1e-300))

    def probabilities(self, num_proposals: int) -> Array:
        """P(SIR's draw is node i), with shape (n,)."""
        _, x, log_phi = self._grid
        power = np.exp((num_proposals - 1) * log_phi)
        return num_proposals * self.weight * (STEP * power @ (x * np.exp(-x)))

    def mean(self, f: Array, num_proposals: int) -> float:
        """E[f(draw)] for the values `f` of a function at the nodes, with shape (n,)."""
        return float(self.probabilities(num_proposals) @ f)

    def mean_log_z(self, num_proposals: int) -> float:
        """E[log-mean-weight] in nats; log Z = log E_p[r] is its limit."""
        s, _, log_phi = self._grid
        gap = np.exp(-np.exp(s)) - np.exp(num_proposals * log_phi)
        return float(STEP * gap.sum() - math.log(num_proposals))

    @property
    def kl(self) -> float:
        """KL(q || p) = E_q[log r] in nats, for a normalised r."""
        return float(self.weight @ (np.exp(self.log_r) * self.log_r))

    @property
    def jsd(self) -> float:
        """JSD(q, p) in nats by its definition, for a normalised r."""
        log_mixture = np.logaddexp(0, self.log_r) - math.log(2)  # log (p + q)/2 - log p
        to_prior = -self.weight @ log_mixture
        to_posterior = self.weight @ (np.exp(self.log_r) * (self.log_r - log_mixture))
        return float(0.5 * (to_prior + to_posterior))


class ExactRatio(nn.Module):
    """A ratio head that is right (`scale` 1), over-confident (above 1) or too flat (below 1)."""

    def __init__(self, log_r: Callable[..., Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.log_r = log_r
        self.scale = scale

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """`scale` · log r, with shape (*, B)."""
        log_r = self.log_r(z) if context is None else self.log_r(z, context)
        return self.scale * log_r


class SampleOnly:
    """A prior that can be sampled and has no density."""

    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws from the wrapped distribution."""
        return self.distribution.sample(sample_shape)


def standard_normal(dim: int) -> Independent:
    """N(0, I) with an empty batch shape."""
    return Independent(Normal(torch.zeros(dim), torch.ones(dim), validate_args=False), 1)


def around(width: float) -> Callable[[Tensor], Distribution]:
    """The posterior q(z|x) = N(x, width² I)."""
    return lambda x: Independent(Normal(x, torch.full_like(x, width), validate_args=False), 1)


@dataclass(frozen=True)
class GaussianPair:
    """Base N(0, I), target N(mu, I): KL = |mu|²/2 and log r = mu·z - |mu|²/2 are exact.

    As a VAE: x ~ N(mu, (1 - width²) I) and q(z|x) = N(x, width² I). SIR changes the law along mu
    only, so `law` lives on the projection u = z·mu/|mu|, where the base is N(0, 1).
    """

    kl: float = 1.0
    dim: int = 2
    width: float = 0.3

    @property
    def shift(self) -> float:
        """|mu|."""
        return math.sqrt(2 * self.kl)

    @property
    def mean(self) -> Tensor:
        """mu, with shape (dim,)."""
        return torch.full((self.dim,), self.shift / math.sqrt(self.dim))

    @property
    def prior(self) -> Independent:
        """The base, with an empty batch shape."""
        return standard_normal(self.dim)

    @property
    def target(self) -> Independent:
        """The aggregate posterior, with an empty batch shape."""
        return Independent(Normal(self.mean, torch.ones(self.dim), validate_args=False), 1)

    def project(self, z: Tensor) -> Tensor:
        """u = z·mu/|mu|, with shape (*, B): what `law` is about."""
        return z.sum(-1) / math.sqrt(self.dim)

    def log_r(self, z: Tensor) -> Tensor:
        """Exact log-ratio in nats, with shape (*, B)."""
        return self.shift * self.project(z) - self.kl

    @cached_property
    def law(self) -> SIRLaw:
        """Exact law of SIR on u."""
        # The base must be resolved to e^{-81/2} and, as log r has slope |mu|, at |mu|·step = 0.1.
        u = np.arange(-9.0, 9.0 + self.shift, min(0.05, 0.1 / self.shift))
        weight = np.exp(-0.5 * u**2)
        return SIRLaw(u, weight / weight.sum(), self.shift * u - self.kl)

    def data(self, n: int) -> Tensor:
        """n draws of x, with shape (n, dim)."""
        return self.mean + math.sqrt(1 - self.width**2) * torch.randn(n, self.dim)

    def source(self) -> SingleGroup:
        """The pretend VAE; it decodes z to z."""
        return SingleGroup(self.prior, around(self.width), lambda z: z)

    def head(self, scale: float = 1.0) -> ExactRatio:
        """The exact head (scale 1), or one too sharp or too flat."""
        return ExactRatio(self.log_r, scale)


@dataclass(frozen=True)
class Ring:
    """Base N(0, I) in the plane, target a ring: z = radius·(cos a, sin a) + width·noise.

    x lies on the circle, q(z|x) = N(x, width² I), and the angle integrates out exactly:
    q(z) = e^{-(|z| - radius)²/(2 width²)} i0e(|z| radius/width²) / (2 pi width²), where i0e is
    the scaled Bessel function. `law` lives on |z|, whose base law is Rayleigh.
    """

    radius: float = 2.0
    width: float = 0.25

    @property
    def prior(self) -> Independent:
        """The base, with an empty batch shape."""
        return standard_normal(2)

    def log_r_at(self, norm: Tensor) -> Tensor:
        """Exact log-ratio in nats at |z|."""
        variance = self.width**2
        log_bessel = torch.special.i0e(norm * self.radius / variance).log()
        tube = 0.5 * norm**2 - 0.5 * (norm - self.radius) ** 2 / variance
        return tube + log_bessel - math.log(variance)

    def log_r(self, z: Tensor) -> Tensor:
        """Exact log-ratio in nats, with shape (*, B)."""
        return self.log_r_at(self.project(z))

    def project(self, z: Tensor) -> Tensor:
        """|z|, with shape (*, B): what `law` is about."""
        return z.norm(dim=-1)

    @cached_property
    def law(self) -> SIRLaw:
        """Exact law of SIR on |z|."""
        # |z| = log(1 + e^v): analytic, and the weight vanishes at both ends, like e^{2v} and
        # e^{-v²/2}.
        v = np.arange(-20.0, 9.0, 0.02)
        norm = np.logaddexp(0, v)
        weight = norm * np.exp(-0.5 * norm**2 + v - norm)  # d|z|/dv = e^{v - |z|}
        log_r = self.log_r_at(torch.from_numpy(norm)).numpy()
        return SIRLaw(norm, weight / weight.sum(), log_r)

    def data(self, n: int) -> Tensor:
        """n points on the circle, with shape (n, 2)."""
        angle = 2 * math.pi * torch.rand(n)
        return self.radius * torch.stack([angle.cos(), angle.sin()], -1)

    def source(self) -> SingleGroup:
        """The pretend VAE; it decodes z to z."""
        return SingleGroup(self.prior, around(self.width), lambda z: z)

    def head(self, scale: float = 1.0) -> ExactRatio:
        """The exact head (scale 1), or one too sharp or too flat."""
        return ExactRatio(self.log_r, scale)


@dataclass(frozen=True)
class Codes:
    """One categorical latent: base p, target q, log r = log q - log p, all exact tables.

    x is a code, q(z|x) keeps it with probability `keep` and otherwise draws a code uniformly;
    codes of x follow `frequency`, so that q = keep·frequency + (1 - keep)/n.
    """

    base: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)
    frequency: tuple[float, ...] = (0.05, 0.3, 0.05, 0.6)
    keep: float = 0.8

    @property
    def num_categories(self) -> int:
        """The number of codes n."""
        return len(self.base)

    @property
    def prior(self) -> Categorical:
        """The base, with an empty batch shape."""
        return Categorical(torch.tensor(self.base), validate_args=False)

    @property
    def target(self) -> Categorical:
        """The aggregate posterior, with an empty batch shape."""
        noise = (1 - self.keep) / self.num_categories
        probs = self.keep * torch.tensor(self.frequency) + noise
        return Categorical(probs, validate_args=False)

    def log_r(self, z: Tensor) -> Tensor:
        """Exact log-ratio in nats, with the shape of z."""
        return (self.target.probs.log() - self.prior.probs.log())[z]

    def project(self, z: Tensor) -> Tensor:
        """The code itself: what `law` is about."""
        return z

    @cached_property
    def law(self) -> SIRLaw:
        """Exact law of SIR on the codes."""
        base, frequency = np.array(self.base), np.array(self.frequency)
        target = self.keep * frequency + (1 - self.keep) / self.num_categories
        return SIRLaw(np.arange(self.num_categories), base, np.log(target / base))

    def data(self, n: int) -> Tensor:
        """n codes x, with shape (n,)."""
        return Categorical(torch.tensor(self.frequency)).sample((n,))

    def posterior(self, x: Tensor) -> Categorical:
        """q(z|x), with batch shape (B,)."""
        kept = nn.functional.one_hot(x, self.num_categories).float()
        probs = self.keep * kept + (1 - self.keep) / self.num_categories
        return Categorical(probs, validate_args=False)

    def source(self) -> SingleGroup:
        """The pretend VAE; it decodes a code to its one-hot vector."""
        return SingleGroup(self.prior, self.posterior, self.decode)

    def decode(self, z: Tensor) -> Tensor:
        """One-hot codes, with shape (B, n)."""
        return nn.functional.one_hot(z, self.num_categories).float()

    def head(self, scale: float = 1.0) -> ExactRatio:
        """The exact head (scale 1), or one too sharp or too flat."""
        return ExactRatio(self.log_r, scale)


class PairState(NamedTuple):
    """The walk of `CorrelatedPair`: what is drawn, with shape (B, k), and x, with shape (B, 2)."""

    z: Tensor
    x: Tensor | None


@dataclass(frozen=True)
class CorrelatedPair(LatentSource[Any, Any]):
    """A `LatentSource` of two groups whose base misses their correlation.

    Base: z_1 and z_2 independent N(0, 1). Aggregate posterior: exactly bivariate normal with
    unit variances and `correlation` c, since x ~ N(0, C - width² I), q(z_k|x) = N(x_k, width²).
    So log r_1 = 0 and log r_2(z_2|z_1) = log N(z_2; c z_1, 1 - c²) - log N(z_2; 0, 1), exactly.
    Needs width² < 1 - |c|.
    """

    correlation: float = 0.8
    width: float = 0.2

    @property
    def num_groups(self) -> int:
        """Two."""
        return 2

    @property
    def kl(self) -> float:
        """KL of the second group in nats (the first has none)."""
        return -0.5 * math.log(1 - self.correlation**2)

    def data(self, n: int) -> Tensor:
        """n draws of x, with shape (n, 2)."""
        covariance = torch.full((2, 2), self.correlation)
        covariance.fill_diagonal_(1 - self.width**2)
        return MultivariateNormal(torch.zeros(2), covariance).sample((n,))

    def encode(self, x: Tensor) -> Tensor:
        """x is all the walk needs."""
        return x

    def start(
        self, batch_size: int, encoding: Tensor | None = None, condition: None = None
    ) -> PairState:
        """Nothing drawn yet."""
        return PairState(torch.empty(batch_size, 0), encoding)

    def group(self, state: PairState) -> Group:
        """N(0, 1) against N(x_k, width²), with z_1 as the context of z_2."""
        batch_size, k = state.z.shape
        prior = standard_normal(1).expand((batch_size,))
        posterior = None if state.x is None else around(self.width)(state.x[:, k : k + 1])
        return Group(prior, posterior, state.z if k else None)

    def advance(self, state: PairState, z: Tensor) -> PairState:
        """Appends one latent."""
        return PairState(torch.cat([state.z, z], -1), state.x)

    def decode(self, state: PairState) -> Tensor:
        """The pair (z_1, z_2), with shape (B, 2)."""
        return state.z

    def log_r(self, z: Tensor, context: Tensor) -> Tensor:
        """Exact log-ratio of the second group in nats, with shape (*, B)."""
        variance = 1 - self.correlation**2
        fit = (z - self.correlation * context) ** 2 / variance
        return 0.5 * (z**2 - fit).squeeze(-1) - 0.5 * math.log(variance)

    def law(self, z_1: float) -> SIRLaw:
        """Exact law of SIR on z_2, given z_1."""
        z_2 = np.arange(-9.0, 9.0, 0.05)
        weight = np.exp(-0.5 * z_2**2)
        log_r = self.log_r(torch.from_numpy(z_2)[:, None], torch.tensor([[z_1]]).double())
        return SIRLaw(z_2, weight / weight.sum(), log_r.numpy())

    def expect(self, f: Callable[[float], Array | float]) -> Array:
        """E[f(z_1)] for z_1 ~ N(0, 1), by quadrature."""
        z_1, weight = np.polynomial.hermite_e.hermegauss(24)
        return weight @ np.array([f(z) for z in z_1]) / weight.sum()

    @cached_property
    def jsd(self) -> float:
        """JSD of the second group in nats, averaged over z_1 ~ N(0, 1)."""
        return float(self.expect(lambda z_1: self.law(z_1).jsd))

    def sir_correlation(self, num_proposals: int) -> float:
        """Exact correlation of (z_1, z_2) when z_2 is drawn by SIR with the exact ratio."""

        def moments(z_1: float) -> Array:
            law = self.law(z_1)
            return law.probabilities(num_proposals) @ np.stack([z_1 * law.nodes, law.nodes**2], 1)

        covariance, variance = self.expect(moments)
        return float(covariance / math.sqrt(variance))

    def heads(self, scale: float = 1.0) -> list[ExactRatio]:
        """The exact heads of both groups (scale 1), or too sharp or too flat ones."""
        first = ExactRatio(lambda z: torch.zeros_like(z[..., 0]))
        return [first, ExactRatio(self.log_r, scale)]


@dataclass(frozen=True)
class TwoBumps:
    """Base N(0, 1), target two equal bumps N(±center, width²): log r and cdf are exact.

    The density of the target is the hard part for Langevin dynamics: curved both ways.
    """

    center: float = 1.2
    width: float = 0.5

    @property
    def prior(self) -> Independent:
        """The base, with an empty batch shape."""
        return standard_normal(1)

    @property
    def target(self) -> MixtureSameFamily:
        """The target, with an empty batch and event shape."""
        center = torch.tensor([-self.center, self.center])
        return MixtureSameFamily(
            Categorical(torch.ones(2), validate_args=False),
            Normal(center, torch.full((2,), self.width), validate_args=False),
            validate_args=False,
        )

    def log_r(self, z: Tensor) -> Tensor:
        """Exact log-ratio in nats, with shape (*, B)."""
        return self.target.log_prob(z.squeeze(-1)) - self.prior.log_prob(z)


def two_point_law(p: float, r: float, num_proposals: int) -> float:
    """P(SIR draws the point of base probability p and weight r; the other point has weight 1).

    Exact: with j of the M proposals on the point, it is drawn with probability j r / (j r + M-j).
    """
    m, total = num_proposals, 0.0
    for j in range(1, m + 1):
        log_binomial = math.lgamma(m + 1) - math.lgamma(j + 1) - math.lgamma(m - j + 1)
        log_chance = log_binomial + j * math.log(p) + (m - j) * math.log1p(-p)
        total += math.exp(log_chance) * j * r / (j * r + m - j)
    return total


def ula_variance(
    variance: float, step_size: float, num_steps: int | None = None, start: float = 0.0
) -> float:
    """Variance of unadjusted Langevin dynamics on N(0, variance); stationary without `num_steps`.

    z <- z - (lambda/2) z/variance + sqrt(lambda) noise maps a variance v to a² v + lambda with
    a = 1 - lambda/(2 variance). Its fixed point is lambda / (1 - a²), and
    1 - a² = (lambda/variance) (1 - lambda/(4 variance)), so v = variance / (1 - lambda/(4 variance)).
    From `start`, v_n = v + a^{2n} (start - v).
    """
    stationary = variance / (1 - step_size / (4 * variance))
    if num_steps is None:
        return stationary
    decay = (1 - step_size / (2 * variance)) ** (2 * num_steps)
    return stationary + decay * (start - stationary)


def mala_acceptance(step_size: float) -> float:
    """Mean acceptance of MALA's steps on N(0, 1) in equilibrium, exact by quadrature.

    z' ~ N(z - (lambda/2) z, lambda) is accepted with min(1, pi(z') T(z|z') / pi(z) T(z'|z)).
    """
    z = np.linspace(-9, 9, 1801)
    here, there = z[:, None], z[None, :]
    drift = 1 - step_size / 2

    def log_flow(a: Array, b: Array) -> Array:
        return -0.5 * a**2 - 0.5 * (b - drift * a) ** 2 / step_size

    # min(1, x'/x) x = min(x, x'): no division.
    flow = np.exp(np.minimum(log_flow(here, there), log_flow(there, here))).sum()
    return float(flow * (z[1] - z[0]) ** 2 / (2 * math.pi * math.sqrt(step_size)))


def hmc_acceptance(step_size: float, num_leapfrogs: int) -> float:
    """Mean acceptance of HMC's steps on N(0, 1) in equilibrium, exactly.

    Leapfrogs are a linear map M of (z, v) ~ N(0, I), of singular values s and 1/s. A reversible map
    that keeps the volume is accepted with 2 P(H falls), and H falls where |a/b| < 1/s for a Cauchy a/b.
    """
    length = math.sqrt(step_size)
    kick, drift = np.array([[1, 0], [-length / 2, 1]]), np.array([[1, length], [0, 1]])
    leap = np.linalg.matrix_power(kick @ drift @ kick, num_leapfrogs)
    return float(4 / math.pi * math.atan(1 / np.linalg.svd(leap)[1][0]))
