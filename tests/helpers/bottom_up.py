"""A VAE whose posterior is drawn bottom-up, as of BIVA and LVAE with skips; its ratios are known.

The prior is top-down, and all is linear and Gaussian:

    p:  z ~ N(0, 1),  b ~ N(0.6 z, 0.8²),  t ~ N(-0.5 z, 0.7²),  x ~ N(b + 0.5 t + 0.3 z, 0.5²)
    q:  b ~ N(0.7 x, 0.6²),  z ~ N(0.5 b + 0.2 x, 0.7²),  t ~ N(0.3 x - 0.4 z, 0.6²)

b is drawn before z, which is the first group of the prior. So ``encode`` draws b and z, and their
groups replay them; t is drawn top-down, in the walk. With x ~ N(0, 1), the aggregate posterior of
(z, b, t) is Gaussian, and so is every q(z_k | z_<k).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers.problems import ExactRatio, SIRLaw
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ncprior import Group, LatentSource
from ncprior.distributions import PointMass

# Rows of the joint distribution of x, b, z, t under q as combinations of four N(0, 1).
_X = np.array([1.0, 0, 0, 0])
_B = 0.7 * _X + np.array([0, 0.6, 0, 0])
_Z = 0.5 * _B + 0.2 * _X + np.array([0, 0, 0.7, 0])
_T = 0.3 * _X - 0.4 * _Z + np.array([0, 0, 0, 0.6])
COVARIANCE = np.stack([_Z, _B, _T]) @ np.stack([_Z, _B, _T]).T  # of (z, b, t) under q


def normal(mean: Tensor, sd: float) -> Distribution:
    """N(mean, sd²) of one latent, for means of shape (*, 1)."""
    return Independent(Normal(mean, sd, validate_args=False), 1)


class Code(NamedTuple):
    """x, and the draws of b and z with their log-densities."""

    x: Tensor
    b: Tensor
    z: Tensor
    log_q_b: Tensor
    log_q_z: Tensor


class State(NamedTuple):
    """The latents so far, with shape (B, k), and the encoding."""

    drawn: Tensor
    code: Code | None


class BottomUp(LatentSource[Code, State]):
    """The VAE; `drawn_in_walk` is the mistake of a walk that draws z and b top-down."""

    num_groups = 3

    def data(self, n: int) -> Tensor:
        """n draws of x, with shape (n, 1)."""
        return torch.randn(n, 1)

    def encode(self, x: Tensor) -> Code:
        """Draws b and then z."""
        q_b = normal(0.7 * x, 0.6)
        b = q_b.sample()
        q_z = normal(0.5 * b + 0.2 * x, 0.7)
        z = q_z.sample()
        return Code(x, b, z, q_b.log_prob(b), q_z.log_prob(z))

    def start(
        self, batch_size: int, encoding: Code | None = None, condition: None = None
    ) -> State:
        """Nothing drawn yet."""
        return State(torch.empty(batch_size, 0), encoding)

    def group(self, state: State) -> Group:
        """z, b and t, in the order of the prior."""
        drawn, code = state
        k, z = drawn.shape[1], drawn[:, :1]
        if k == 0:
            p = normal(drawn.new_zeros(len(drawn), 1), 1.0)
            return Group(p, None if code is None else PointMass(code.z, code.log_q_z))
        if k == 1:
            q = None if code is None else PointMass(code.b, code.log_q_b)
            return Group(normal(0.6 * z, 0.8), q, drawn)
        q_t = None if code is None else normal(0.3 * code.x - 0.4 * z, 0.6)
        return Group(normal(-0.5 * z, 0.7), q_t, drawn)

    def advance(self, state: State, z: Tensor) -> State:
        """Appends one latent."""
        return State(torch.cat([state.drawn, z], 1), state.code)

    def decode(self, state: State) -> Tensor:
        """The mean of p(x | z, b, t)."""
        return state.drawn @ torch.tensor([[0.3], [1.0], [0.5]])

    def likelihood(self, state: State) -> Distribution:
        """p(x | z, b, t)."""
        return normal(self.decode(state), 0.5)


def evidence(x: Tensor) -> Tensor:
    """log p(x) in nats, exactly."""
    slope = 0.6 + 0.5 * -0.5 + 0.3  # of x in z
    variance = slope**2 + 0.8**2 + (0.5 * 0.7) ** 2 + 0.5**2
    return Normal(0.0, math.sqrt(variance)).log_prob(x[:, 0].double())


def log_r(k: int, z: Tensor, context: Tensor | None = None) -> Tensor:
    """Exact log-ratio of group k in nats, with shape (*, B)."""
    earlier = COVARIANCE[:k, :k]
    slopes = np.linalg.solve(earlier, COVARIANCE[:k, k]) if k else np.zeros(0)
    variance = float(COVARIANCE[k, k] - slopes @ COVARIANCE[:k, k])
    seen = (
        torch.zeros_like(z) if context is None else context @ torch.tensor(slopes).to(z)[:, None]
    )
    p_slope, sd = ((0.0, 1.0), (0.6, 0.8), (-0.5, 0.7))[k]
    p_mean = torch.zeros_like(z) if context is None else p_slope * context[:, :1]
    q = normal(seen.expand_as(z), math.sqrt(variance))
    return q.log_prob(z) - normal(p_mean.expand_as(z), sd).log_prob(z)


def heads() -> list[Any]:
    """The exact heads."""
    return [ExactRatio(lambda z, context=None, k=k: log_r(k, z, context)) for k in range(3)]


def law_of_z() -> SIRLaw:
    """Exact law of SIR on z, the first group."""
    z = np.arange(-9.0, 9.0, 0.02)
    weight = np.exp(-0.5 * z**2)
    return SIRLaw(z, weight / weight.sum(), log_r(0, torch.from_numpy(z)[:, None]).numpy())
