"""Networks of the demonstration: a small VAE, and a classifier whose features compare samples."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits

from ncprior.single_group import SingleGroup
from ncprior.utils.require import require_choice, require_counts


class VAE(nn.Module):
    """VAE with Gaussian latents and a binomial likelihood, whose pixels are fractions of counts.

    Arguments:
        size: Height and width of the grey images, 8 (an MLP) or 28 (a convolutional network).
        latents: Number of latents.
        counts: Binomial trials per pixel: pixel x is ``counts * x`` successes. 1 gives the
            Bernoulli likelihood; for fractional x it is its expectation over binarised x.

    Raises:
        TypeError: If a number is not a whole number.
        ValueError: If there is no network for the size, or a number is below 1.

    Example:
        >>> vae = VAE(8, latents=6, counts=16).eval()
        >>> x = torch.rand(4, 1, 8, 8)
        >>> vae.decode(vae.posterior(x).sample()).shape, vae.negative_elbo(x).shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """

    def __init__(self, size: int, *, latents: int, counts: int) -> None:
        require_choice("size", size, (8, 28))
        require_counts(latents=latents, counts=counts)
        super().__init__()
        self.encoder, self.decoder = (_dense if size == 8 else _convolutional)(latents)
        self.latents, self.counts = latents, counts

    def prior(self) -> Distribution:
        """Returns p(z) = N(0, I)."""
        return Independent(Normal(torch.zeros(self.latents), 1.0), 1)

    def posterior(self, x: Tensor) -> Distribution:
        """Returns q(z | x) for images x, ``(B, 1, H, W)``."""
        mean, log_var = self.encoder(x).chunk(2, dim=-1)
        return Independent(Normal(mean, (0.5 * log_var).exp()), 1)

    def decode(self, z: Tensor) -> Tensor:
        """Returns the mean of p(x | z), ``(B, 1, H, W)``."""
        image: Tensor = self.decoder(z).sigmoid()
        return image

    def negative_elbo(self, x: Tensor) -> Tensor:
        """Returns KL(q, p) - E_q[log p(x | z)] in nats, ``(B,)``, from one draw of z.

        The binomial coefficients, which depend on x alone, are left out.
        """
        q = self.posterior(x)
        logits = self.decoder(q.rsample())
        misfit = binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
        return self.counts * misfit + kl_divergence(q, self.prior())

    def source(self) -> SingleGroup:
        """Returns the VAE as a source of one group."""
        return SingleGroup(self.prior(), self.posterior, self.decode, module=self)


class Classifier(nn.Module):
    """Classifier of ten digits; the layer below its logits gives the features.

    Arguments:
        size: Height and width of the images: grey ones of 8 or 28, colour ones of 32.
        num_features: Number of features.

    Raises:
        TypeError: If the number of features is not a whole number.
        ValueError: If there is no network for the size, or the number is below 1.

    Example:
        >>> classifier, x = Classifier(28, num_features=32), torch.rand(5, 1, 28, 28)
        >>> classifier(x).shape, classifier.features(x).shape
        (torch.Size([5, 10]), torch.Size([5, 32]))
    """

    def __init__(self, size: int, *, num_features: int) -> None:
        require_choice("size", size, (8, 28, 32))
        require_counts(num_features=num_features)
        super().__init__()
        first = 1 if size == 8 else 2  # the first stride; all later strides are 2
        channels = (3, 32, 64, 128) if size == 32 else (1, 32, 64)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(channels)):
            stride = first if i == 0 else 2
            size = -(-size // stride)
            layers += [nn.Conv2d(before, after, 3, padding=1, stride=stride), nn.SiLU()]
        flat = channels[-1] * size**2
        self.features = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(flat, num_features), nn.SiLU()
        )
        self.logits = nn.Linear(num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of the classes, ``(B, 10)``."""
        logits: Tensor = self.logits(self.features(x))
        return logits


def _dense(latents: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of 8×8 images."""
    encoder = nn.Sequential(nn.Flatten(), *_layers(64, 256, 256, 2 * latents))
    decoder = nn.Sequential(*_layers(latents, 256, 256, 64), nn.Unflatten(1, (1, 8, 8)))
    return encoder, decoder


def _convolutional(latents: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of 28×28 images."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        *_layers(64 * 7 * 7, 256, 2 * latents),
    )
    decoder = nn.Sequential(
        *_layers(latents, 256, 64 * 7 * 7),
        nn.SiLU(),
        nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
    )
    return encoder, decoder


def _layers(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return layers[:-1]
