"""Latents that are no Gaussian vectors, with known ratios: on a sphere, a simplex, and codes.

The classes are as a user would write them: without ``expand``, and with whatever support.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from helpers.problems import SIRLaw
from torch import Tensor
from torch.distributions import Bernoulli, Dirichlet, Distribution, Independent, constraints


class VonMisesFisher(Distribution):
    """Density ∝ exp(kappa mean·z) on the unit sphere of R³, whose support is called real.

    Arguments:
        mean: Unit vectors, with shape ``(*, 3)``.
        kappa: Concentration, above 0.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector  # as of hyperspherical packages

    def __init__(self, mean: Tensor, kappa: float) -> None:
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)
        self.location, self.kappa = mean, kappa

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Inverts the distribution function of mean·z, and turns uniformly around the mean."""
        shape = (*sample_shape, *self.batch_shape)
        u = torch.rand(shape)
        w = 1 + torch.log(u + (1 - u) * math.exp(-2 * self.kappa)) / self.kappa
        side = torch.randn(*shape, 3)
        side = side - (side * self.location).sum(-1, keepdim=True) * self.location
        side = side / side.norm(dim=-1, keepdim=True)
        z = w[..., None] * self.location + (1 - w**2).clamp(min=0).sqrt()[..., None] * side
        return z / z.norm(dim=-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """kappa mean·z + log kappa - log(4 pi sinh kappa)."""
        k = self.kappa
        log_z = math.log(2 * math.pi / k) + k + math.log1p(-math.exp(-2 * k))
        return k * (value * self.location).sum(-1) - log_z


NORTH = torch.tensor([0.0, 0.0, 1.0])


class Sphere:
    """Base of concentration 1 and target of concentration 4 around the north of a sphere."""

    prior, target = VonMisesFisher(NORTH, 1.0), VonMisesFisher(NORTH, 4.0)

    def log_r(self, z: Tensor) -> Tensor:
        return self.target.log_prob(z) - self.prior.log_prob(z)

    def project(self, z: Tensor) -> Tensor:
        return z[..., 2]

    @property
    def law(self) -> SIRLaw:
        """On the height, which is uniform on a sphere (Archimedes) and has weight e^h here."""
        h = (np.arange(2000) + 0.5) / 1000 - 1
        weight = np.exp(h)
        z = torch.stack([torch.zeros(2000), torch.zeros(2000), torch.from_numpy(h)], -1)
        return SIRLaw(h, weight / weight.sum(), self.log_r(z.double()).numpy())


class Simplex:
    """Base Dirichlet(1, 1, 1), target Dirichlet(3, 1, 1): r = 6 z_1² depends on z_1 alone."""

    prior, target = Dirichlet(torch.ones(3)), Dirichlet(torch.tensor([3.0, 1.0, 1.0]))

    def log_r(self, z: Tensor) -> Tensor:
        return math.log(6) + 2 * z[..., 0].clamp(min=1e-30).log()

    def project(self, z: Tensor) -> Tensor:
        return z[..., 0]

    @property
    def law(self) -> SIRLaw:
        """On z_1, which is Beta(1, 2) under the base."""
        h = (np.arange(2000) + 0.5) / 2000
        weight = 2 * (1 - h)
        return SIRLaw(h, weight / weight.sum(), math.log(6) + 2 * np.log(h))


class Bits:
    """Three independent bits, with other chances in the target."""

    chances, wanted = torch.tensor([0.2, 0.5, 0.7]), torch.tensor([0.6, 0.5, 0.1])
    prior = Independent(Bernoulli(chances), 1)
    target = Independent(Bernoulli(wanted), 1)

    def log_r(self, z: Tensor) -> Tensor:
        return self.target.log_prob(z) - self.prior.log_prob(z)

    def project(self, z: Tensor) -> Tensor:
        return z @ torch.tensor([4.0, 2.0, 1.0])

    @property
    def law(self) -> SIRLaw:
        """On the eight words."""
        words = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)]).float()
        weight = self.prior.log_prob(words).exp().double()
        return SIRLaw(
            np.arange(8), (weight / weight.sum()).numpy(), self.log_r(words).double().numpy()
        )
