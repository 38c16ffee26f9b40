r"""LARS and SNIS: priors that reweight N(0, I) by a network, trained end to end with a VAE.

NCP trains such a network afterwards. All three are N(0, I) times a ratio, so that the ELBO of a VAE
gains E_q[log ratio]:

* SNIS draws by sampling-importance-resampling with energy network E and K proposals. The log-ratio
  of this distribution to N(0, I) is bounded from below, on average over K - 1 fresh proposals z_j, by
  E(z) - log (1/K) (e^E(z) + Σ e^E(z_j)).
* LARS draws by rejection sampling with acceptance a(z), truncated at the T-th proposal, which is
  taken whatever it is. Its ratio is exactly a(z) (1 - α)/Z + α with Z = E_p[a] and
  α = (1 - Z)^(T-1).

References:
    | Resampled Priors for Variational Autoencoders (Bauer & Mnih, AISTATS 2019)
    | https://arxiv.org/abs/1810.11428
    | Energy-Inspired Models: Learning with Sampler-Induced Distributions
    | (Lawson et al., NeurIPS 2019) https://arxiv.org/abs/1910.14265
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints
from torch.nn.functional import logsigmoid

from ncprior.distributions import Sampleable
from ncprior.utils.require import (
    described,
    floats,
    require_callable,
    require_counts,
    require_numbers,
)

NUM_LATENTS = 50  # of the paper's VAEs

_CHUNK = 100_000  # samples that estimate Z at once


class EnergyNet(nn.Module):
    """The network 50-100-100-1 with tanh: SNIS's energy, LARS's acceptance, NCP's ratio head.

    Arguments:
        latents: Number of latents.

    Raises:
        TypeError: If the number is not a whole number.
        ValueError: If it is below 1.

    Example:
        >>> net = EnergyNet()
        >>> net(torch.randn(7, 4, 50)).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([7, 4]), 15301)
    """

    def __init__(self, latents: int = NUM_LATENTS) -> None:
        require_counts(latents=latents)
        super().__init__()
        self.layers = mlp(latents, 100, 100, 1)
        glorot(self)

    def forward(self, z: Tensor, context: None = None) -> Tensor:
        """Returns one number in nats per row, ``(*, B)``, for z of shape ``(*, B, D)``."""
        weight = next(self.parameters())
        z = floats("z", z).to(weight.dtype)
        if z.shape[-1:] != weight.shape[1:]:
            raise ValueError(f"z must have shape (*, {weight.shape[1]}); got {described(z)}.")
        values: Tensor = self.layers(z).squeeze(-1)
        return values


class SNISPrior(nn.Module):
    """N(0, I), resampled with an energy network: the distribution of one draw out of K proposals.

    Only a bound of its density is known, so that as a prior it can be sampled, without ``log_prob``.

    Arguments:
        latents: Number of latents.
        num_proposals: K.
        energy: Maps z, ``(*, B, D)``, to E(z) = log r(z), ``(*, B)``; a new :class:`EnergyNet` if
            None. With a trained ratio head it is the distribution that NCP samples.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no proposal or no latent.

    Example:
        >>> prior = SNISPrior(num_proposals=16)
        >>> z = prior.sample((4,))
        >>> z.shape, prior.log_ratio(z).shape
        (torch.Size([4, 50]), torch.Size([4]))
    """

    def __init__(
        self,
        latents: int = NUM_LATENTS,
        *,
        num_proposals: int = 128,
        energy: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        require_counts(latents=latents, num_proposals=num_proposals)
        if energy is not None:
            require_callable("energy", energy, "Pass a network such as EnergyNet().")
        super().__init__()
        self.latents, self.num_proposals = latents, num_proposals
        self.energy = EnergyNet(latents) if energy is None else energy

    def log_ratio(self, z: Tensor) -> Tensor:
        """Returns a random lower bound of log p(z) - log N(z; 0, I).

        On average over its fresh proposals it is at most the log-ratio, and its exponential is on
        average the ratio itself.

        Arguments:
            z: Latents, with shape ``(*, B, D)``.

        Returns:
            The bound in nats, with shape ``(*, B)``.

        References:
            Lawson et al. (2019), self-normalised importance sampling.
        """
        proposals = standard_normal(self.latents, z).sample(Size((self.num_proposals - 1,)))
        energy, fresh = self.energy(z), self.energy(proposals)
        total = torch.logaddexp(energy, torch.logsumexp(fresh, 0))
        return energy - total + math.log(self.num_proposals)

    def distribution(self) -> Sampleable:
        """Returns p(z) for a source: this prior itself, which can only be sampled."""
        return self

    @torch.no_grad()
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws latents, ``(*sample_shape, D)``, each out of K proposals of its own.

        Raises:
            FloatingPointError: If the energy is not finite.
        """
        from ncprior.samplers.sir import sir

        rows = Size((math.prod(sample_shape),))
        proposals = standard_normal(self.latents, _like(self)).expand(rows)
        draw = sir(proposals, self.energy, num_proposals=self.num_proposals)
        return draw.z.reshape(*sample_shape, self.latents)


class LARSPrior(nn.Module):
    """N(0, I), thinned by learned accept-reject sampling that is truncated at T proposals.

    Arguments:
        latents: Number of latents.
        truncation: T: the T-th proposal is taken whatever it is.
        num_proposals: K, the proposals that estimate Z at each step of training.
        decay: Decay per step of the moving average of Z in training.

    Attributes:
        normaliser: Z = E_p[a]: the moving average while training, then the
            estimate of :meth:`estimate_normaliser`; 0 before either.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.

    Example:
        >>> prior = LARSPrior().eval()
        >>> error = prior.estimate_normaliser(10_000)
        >>> z = prior.sample((4,))
        >>> z.shape, prior.log_ratio(z).shape
        (torch.Size([4, 50]), torch.Size([4]))
    """

    normaliser: Tensor

    def __init__(
        self,
        latents: int = NUM_LATENTS,
        *,
        truncation: int = 100,
        num_proposals: int = 128,
        decay: float = 0.99,
    ) -> None:
        require_counts(latents=latents, num_proposals=num_proposals)
        require_counts("[2, inf)", truncation=truncation)
        require_numbers("[0, 1)", decay=decay)
        super().__init__()
        self.latents, self.truncation = latents, truncation
        self.num_proposals, self.decay = num_proposals, decay
        self.logit = EnergyNet(latents)
        self.register_buffer("normaliser", torch.zeros(()))
        self._known_version = -1  # of the normaliser that has been seen to be above 0

    def log_ratio(self, z: Tensor) -> Tensor:
        """Returns log p(z) - log N(z; 0, I) = log (a(z) (1 - α)/Z + α), with α = (1 - Z)^(T-1).

        In training mode Z is estimated anew and averaged: the average's value, with the gradient
        of the new estimate.

        Arguments:
            z: Latents, with shape ``(*, B, D)``.

        Returns:
            The log-ratio in nats, with shape ``(*, B)``.

        Raises:
            ValueError: In evaluation mode, if Z has not been estimated.

        References:
            Bauer & Mnih (2019), the truncated density.
        """
        normaliser = self._running() if self.training else self._known()
        # At Z = 1 the gradient of α is 0 · ∞, at Z = 0 the ratio 0 / 0.
        log_z = normaliser.clamp(1e-35, 1 - 1e-6).log()
        log_alpha = (self.truncation - 1) * torch.log1p(-log_z.exp())
        log_accepted = logsigmoid(self.logit(z)) - log_z + torch.log(-torch.expm1(log_alpha))
        return torch.logaddexp(log_accepted, log_alpha)

    @torch.no_grad()
    def estimate_normaliser(self, num_samples: int = 1_000_000) -> float:
        """Estimates Z once and for all, from fresh samples of N(0, I).

        Arguments:
            num_samples: Number of samples.

        Returns:
            The standard error of log Z, in nats.

        Raises:
            FloatingPointError: If the acceptance is not finite.
            ValueError: If there is no sample.
        """
        require_counts(num_samples=num_samples)
        proposal, total, squares = standard_normal(self.latents, _like(self)), 0.0, 0.0
        for start in range(0, num_samples, _CHUNK):
            a = self._accept(proposal.sample(Size((min(_CHUNK, num_samples - start),))))
            total, squares = total + a.sum().item(), squares + a.square().sum().item()
        mean: float = total / num_samples
        self.normaliser.fill_(mean)
        return math.sqrt(max(0.0, squares / num_samples - mean**2) / num_samples) / mean

    def distribution(self) -> Sampleable:
        """Returns p(z), a distribution of empty batch shape."""
        return _LARS(self, Size())

    @torch.no_grad()
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws latents, ``(*sample_shape, D)``: those not yet accepted are proposed again.

        Raises:
            FloatingPointError: If the acceptance is not finite.
        """
        proposal = standard_normal(self.latents, _like(self))
        z = proposal.sample(Size((math.prod(sample_shape),)))
        waiting = torch.arange(len(z), device=z.device)
        for _ in range(self.truncation - 1):
            a = self._accept(z[waiting])
            waiting = waiting[torch.rand_like(a) >= a]
            if len(waiting) == 0:
                break
            z[waiting] = proposal.sample(waiting.shape)
        return z.reshape(*sample_shape, self.latents)

    def _accept(self, z: Tensor) -> Tensor:
        """a(z), in float64: sums of small probabilities."""
        logit: Tensor = self.logit(z)
        logit = logit.cpu() if logit.device.type == "mps" else logit  # which has no float64
        a = logit.double().sigmoid()
        if not torch.isfinite(a).all():
            raise FloatingPointError(
                "LARS's acceptance is not finite. Look for NaN or infinity in its weights."
            )
        return a

    def _running(self) -> Tensor:
        proposal = standard_normal(self.latents, self.normaliser)
        proposals = proposal.sample(Size((self.num_proposals,)))
        new: Tensor = self.logit(proposals).sigmoid().mean()
        with torch.no_grad():
            first = self.normaliser == 0
            average = self.normaliser.lerp(new, 1 - self.decay)
            self.normaliser.copy_(torch.where(first, new, average))
        return new + (self.normaliser - new).detach()

    def _known(self) -> Tensor:
        version = self.normaliser._version  # a GPU waits once for each
        if version != self._known_version and self.normaliser == 0:
            raise ValueError(
                "LARS's density needs its normaliser Z, which has not been estimated. Train the "
                "prior, or call prior.estimate_normaliser()."
            )
        self._known_version = version
        return self.normaliser


class _LARS(Distribution):
    """The density of a :class:`LARSPrior`."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, prior: LARSPrior, batch_shape: Size) -> None:
        self.prior, self.truncation = prior, prior.truncation
        super().__init__(batch_shape, Size((prior.latents,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _LARS:  # noqa: ANN401
        return _LARS(self.prior, Size(batch_shape))

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: ANN401, B008
        return self.prior.sample(Size((*sample_shape, *self.batch_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        base: Tensor = standard_normal(self.prior.latents, value).log_prob(value)
        return base + self.prior.log_ratio(value)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def glorot(module: nn.Module) -> None:
    """Initialises weights by Glorot's uniform distribution, and biases by 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]


def diagonal_normal(loc: Tensor, scale: Tensor) -> Distribution:
    return Independent(Normal(loc, scale, validate_args=False), 1)


def standard_normal(latents: int, like: Tensor) -> Distribution:
    """N(0, I) of empty batch shape, on a tensor's device."""
    zeros = torch.zeros(latents, device=like.device)
    return diagonal_normal(zeros, torch.ones_like(zeros))


def _like(module: nn.Module) -> Tensor:
    return next(module.parameters(), torch.empty(0))
