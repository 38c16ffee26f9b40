"""VAEs whose reweighting by an energy and by ratio heads has a closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from helpers.problems import SampleOnly, standard_normal
from helpers.toys import Unfinished
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from ncprior import Group, SingleGroup
from ncprior.adapters.nvae.laws import BoundedNormal


class Quadratic(nn.Module):
    """E(x) = a/2 |x - c|² + h·x, of trainable a and h."""

    def __init__(self, dim: int, a: float = 0.0, h: float = 0.0, centre: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.h = nn.Parameter(torch.full((dim,), h))
        self.centre = centre

    def forward(self, x: Tensor) -> Tensor:
        """E(x), with shape (B,)."""
        return 0.5 * self.a * (x - self.centre).square().sum(1) + x @ self.h


def nothing(x: Tensor) -> Tensor:
    """E ≡ 0."""
    return torch.zeros(len(x))


class Slope(nn.Module):
    """log r(z) = h·z - g/2 |z|²."""

    def __init__(self, h: float, g: float) -> None:
        super().__init__()
        self.h, self.g = nn.Parameter(torch.tensor(h)), g

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r, with shape (*, B)."""
        return self.h * z.sum(-1) - 0.5 * self.g * z.square().sum(-1)


@dataclass(frozen=True)
class LinearGaussian:
    """p(z) = N(m, s² I), p(x | z) = N(W z, σ² I): two latents, three pixels."""

    location: float = 0.3
    scale: float = 1.4
    sigma: float = 0.5

    @property
    def weight(self) -> Tensor:
        """W, with shape (3, 2)."""
        return torch.tensor([[1.0, 0.2], [-0.5, 0.8], [0.3, -1.0]])

    def decode(self, z: Tensor) -> Tensor:
        """W z."""
        return z @ self.weight.T

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z)."""
        return Independent(Normal(self.decode(z), self.sigma, validate_args=False), 1)

    def source(self, **options: Any) -> SingleGroup:
        """The VAE; its posterior is not the true one."""
        loc = torch.full((2,), self.location)
        prior = Independent(Normal(loc, torch.full((2,), self.scale), validate_args=False), 1)

        def posterior(x: Tensor) -> Distribution:
            return Independent(Normal(x @ self.weight, 0.5, validate_args=False), 1)

        options = {"likelihood": self.likelihood, **options}
        return SingleGroup(prior, posterior, self.decode, **options)

    def law(self, energy: Quadratic, slope: Slope | None = None) -> tuple[Tensor, Tensor]:
        """Mean and covariance of (z, x) under r·p·e^{-E}: its log-density is quadratic."""
        w, eye = self.weight.double(), torch.eye(2).double()
        precision = torch.zeros(5, 5).double()
        precision[:2, :2] = eye / self.scale**2 + w.T @ w / self.sigma**2
        precision[:2, 2:] = -w.T / self.sigma**2
        precision[2:, :2] = -w / self.sigma**2
        a = energy.a.item()
        precision[2:, 2:] = torch.eye(3).double() * (1 / self.sigma**2 + a)
        linear = torch.zeros(5).double()
        linear[:2] = self.location / self.scale**2
        linear[2:] = a * energy.centre - energy.h.detach().double()
        if slope is not None:
            precision[:2, :2] += slope.g * eye
            linear[:2] += slope.h.item()
        covariance = torch.linalg.inv(precision)
        return covariance @ linear, covariance


class Steps(NamedTuple):
    """The walk of `Scaled`: z_<k, with shape (B, k)."""

    z: Tensor


@dataclass(frozen=True)
class Scaled(Unfinished):
    """Two groups of one latent, and scales that depend on what is above them.

    z_1 ~ N(0, 1), z_2 ~ N(z_1, e^{2a z_1}), x ~ N(z_2, σ²), σ = max(e^{b z_1}, floor), of one pixel.
    Forgetting the Jacobian multiplies by e^{-a z_1} and 1/σ.
    """

    a: float = 0.0
    b: float = 0.0
    floor: float = 0.0
    num_groups = 2

    def start(self, batch_size: int, encoding: None = None, condition: None = None) -> Steps:
        """No latents yet."""
        return Steps(torch.zeros(batch_size, 0))

    def group(self, state: Steps) -> Group:
        """p(z_k | z_<k)."""
        if state.z.shape[1] == 0:
            zeros = torch.zeros(len(state.z), 1)
            return Group(Independent(Normal(zeros, zeros + 1, validate_args=False), 1))
        z = state.z[:, :1]
        return Group(Independent(Normal(z, (self.a * z).exp(), validate_args=False), 1), None, z)

    def advance(self, state: Steps, z: Tensor) -> Steps:
        """Joins z_k."""
        return Steps(torch.cat([state.z, z], 1))

    def decode(self, state: Steps) -> Tensor:
        """z_2."""
        return state.z[:, 1:]

    def likelihood(self, state: Steps) -> Distribution:
        """p(x | z), which tells the scale without the floor."""
        drawn = (self.b * state.z[:, :1]).exp()
        return Independent(BoundedNormal(state.z[:, 1:], drawn.clamp(min=self.floor), drawn), 1)


def bernoulli() -> SingleGroup:
    """A VAE of binary pixels."""

    def likelihood(z: Tensor) -> Distribution:
        return Independent(Bernoulli(logits=z @ torch.ones(2, 3), validate_args=False), 1)

    return SingleGroup(
        standard_normal(2),
        lambda x: Independent(Normal(x[:, :2], 1.0), 1),
        lambda z: (z @ torch.ones(2, 3)).sigmoid(),
        likelihood=likelihood,
    )


def sample_only() -> SingleGroup:
    """A linear-Gaussian VAE whose base can only be sampled."""
    problem = LinearGaussian()
    return SingleGroup(
        SampleOnly(standard_normal(2)),
        lambda x: Independent(Normal(x[:, :2], 1.0), 1),
        problem.decode,
        likelihood=problem.likelihood,
    )
