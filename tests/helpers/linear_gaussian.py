"""A linear-Gaussian VAE whose true posteriors, likelihood and prior of highest likelihood are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

from ncprior.single_group import SingleGroup


@dataclass(frozen=True)
class LinearGaussian:
    """x = z + noise, and p(z) = N(0, I). The prior of highest likelihood is N(mean, cov) of x less noise.

    The encoder has the mean and the standard deviation of p(z | x) under N(0, I), times a factor each.
    """

    dim: int = 2
    noise: float = 0.5
    mean_factor: float = 1.0
    scale_factor: float = 1.0

    def source(self) -> SingleGroup:
        """The VAE."""
        prior = Independent(Normal(torch.zeros(self.dim), torch.ones(self.dim)), 1)
        return SingleGroup(prior, self.encoded, lambda z: z, likelihood=self.decoded)

    def encoded(self, x: Tensor) -> Independent:
        """q(z | x)."""
        mean, variance = self.posterior(torch.zeros(1), torch.ones(1), x)
        scale = self.scale_factor * variance.sqrt().expand_as(x)
        return Independent(Normal(self.mean_factor * mean, scale, validate_args=False), 1)

    def decoded(self, z: Tensor) -> Independent:
        """p(x | z)."""
        return Independent(Normal(z, self.noise, validate_args=False), 1)

    def posterior(self, mean: Tensor, variance: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(z | x) under the prior N(mean, variance)."""
        precision = 1 / variance + 1 / self.noise**2
        return (mean / variance + x / self.noise**2) / precision, 1 / precision

    def gap(self, mean: Tensor, covariance: Tensor, x: Tensor) -> float:
        """Mean log-likelihood of x below that of the best prior, in nats, under N(mean, covariance)."""
        noise = self.noise**2 * torch.eye(self.dim, dtype=torch.float64)
        x = x.double()
        best = MultivariateNormal(
            x.mean(0), torch.cov(x.T, correction=0).reshape(self.dim, self.dim)
        )
        found = MultivariateNormal(mean.double(), covariance.double() + noise)
        return float((best.log_prob(x) - found.log_prob(x)).mean())


class Quadratic(nn.Module):
    """A head whose log r is a quadratic form of z, so that r N(0, I) is a normal distribution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.offset, self.slope = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(dim))
        self.form = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, z: Tensor, context: Any = None) -> Tensor:
        """log r, with shape (*, B)."""
        return self.offset + z @ self.slope - 0.5 * ((z @ self.form) * z).sum(-1)

    @torch.no_grad()
    def normal(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of r N(0, I)."""
        form = 0.5 * (self.form + self.form.T)
        covariance = torch.linalg.inv(torch.eye(len(form)) + form)
        return covariance @ self.slope, covariance
