"""The MNIST VAEs of LARS and SNIS, with N(0, I) or either prior: the networks of NCP's Table 2.

    vae = EIMVAE(images.mean(0), SNISPrior())       # or LARSPrior(), or none for N(0, I)

Images are binary: each pixel is drawn anew, in every epoch, with its grey value as probability.
Grey images raise an error, since the posterior of a grey image is not that of its binary draws.

References:
    | Energy-Inspired Models: Learning with Sampler-Induced Distributions
    | (Lawson et al., NeurIPS 2019) https://arxiv.org/abs/1910.14265
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, kl_divergence
from torch.nn.functional import softplus

from ncprior.adapters.lars_snis.priors import (
    NUM_LATENTS,
    LARSPrior,
    SNISPrior,
    diagonal_normal,
    glorot,
    mlp,
    standard_normal,
)
from ncprior.distributions import Sampleable
from ncprior.utils.precision import at_least_float32
from ncprior.utils.require import floats_of_batch, real_tensor, require_instance, tensor_of_batch

_PIXELS = (1, 28, 28)

_BINARY = (
    "This VAE models binary images: pixels must be 0 or 1; got others. Draw them: "
    "torch.bernoulli(x) for x in [0, 1], or Binarised(x, batch_size) anew every epoch."
)


class _BinaryVAE(nn.Module):
    """Base class of both VAEs: binary images around a mean image, and the prior of the top group."""

    mean: Tensor
    mean_logits: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        mean = real_tensor("mean", mean)
        if tuple(mean.shape) != _PIXELS:
            raise ValueError(
                f"The mean is the training images' mean, of shape {_PIXELS}; got "
                f"{tuple(mean.shape)}. Pass images.mean(0)."
            )
        self.register_buffer("mean", mean.clone())
        self.register_buffer("mean_logits", torch.logit(mean.clamp(1e-4, 0.9999)))

    def _initialise(self, prior: SNISPrior | LARSPrior | None) -> None:
        """Initialises the networks, and keeps the prior unchanged."""
        kinds = (SNISPrior, LARSPrior, type(None))
        require_instance("prior", prior, kinds, "Pass SNISPrior(), LARSPrior() or None: N(0, I).")
        if prior is not None and prior.latents != NUM_LATENTS:
            raise ValueError(f"The prior must have {NUM_LATENTS} latents; got {prior.latents}.")
        glorot(self)
        self.prior = prior

    def prior_distribution(self) -> Sampleable:
        """Returns p(z) of the top group, with an empty batch shape: reweighted, or N(0, I)."""
        return (
            standard_normal(NUM_LATENTS, self.mean)
            if self.prior is None
            else self.prior.distribution()
        )

    def _divergence(self, q: Distribution, z: Tensor) -> Tensor:
        """KL(q, p) of the top group: exact for N(0, I), with the log-ratio of the prior estimated at z."""
        kl = kl_divergence(q, standard_normal(NUM_LATENTS, z).expand(q.batch_shape))
        return kl if self.prior is None else kl - self.prior.log_ratio(z)

    def _centred(self, x: Tensor) -> Tensor:
        x = tensor_of_batch(x)
        if x.ndim != 4 or tuple(x.shape[1:]) != _PIXELS:
            raise ValueError(
                f"These networks take images of shape (B, 1, 28, 28), unpadded; got "
                f"{tuple(x.shape)}."
            )
        # A GPU waits for the pixels of the first batch in evaluation mode, and of all in training.
        model = None if self.training else self
        x = floats_of_batch("This VAE", x.to(self.mean), _BINARY, (0, 1), model, _require_binary)
        return x - self.mean

    def _bernoulli(self, logits: Tensor) -> Distribution:
        logits = at_least_float32(logits + self.mean_logits)
        return Independent(Bernoulli(logits=logits, validate_args=False), 3)


class EIMVAE(_BinaryVAE):
    """The VAE of one group of 50 latents: 784-300-300-50 and back, with tanh.

    Arguments:
        mean: The training images' mean, with shape ``(1, 28, 28)``.
        prior: p(z), trained with the VAE; N(0, I) if None.

    Raises:
        ValueError: If the mean is of another shape.

    Example:
        >>> images = torch.rand(20, 1, 28, 28)
        >>> vae = EIMVAE(images.mean(0), SNISPrior()).eval()
        >>> x = torch.bernoulli(images)
        >>> vae.negative_elbo(x).shape, vae.decode(vae.posterior(x).sample()).shape
        (torch.Size([20]), torch.Size([20, 1, 28, 28]))
    """

    def __init__(self, mean: Tensor, prior: SNISPrior | LARSPrior | None = None) -> None:
        super().__init__(mean)
        self.encoder = nn.Sequential(nn.Flatten(), *mlp(784, 300, 300, 2 * NUM_LATENTS))
        self.decoder = nn.Sequential(*mlp(NUM_LATENTS, 300, 300, 784), nn.Unflatten(1, _PIXELS))
        self._initialise(prior)

    def posterior(self, x: Tensor) -> Distribution:
        """Returns q(z | x) for binary images x, ``(B, 1, 28, 28)``."""
        return diagonal_normal(*_split(self.encoder(self._centred(x))))

    def likelihood(self, z: Tensor) -> Distribution:
        """Returns p(x | z), over binary images."""
        return self._bernoulli(self.decoder(z.to(self.mean)))

    def decode(self, z: Tensor) -> Tensor:
        """Returns the mean of p(x | z), ``(B, 1, 28, 28)``."""
        return self.likelihood(z).mean

    def negative_elbo(self, x: Tensor) -> Tensor:
        """Returns KL(q, p) - E_q[log p(x | z)] in nats, ``(B,)``, from one draw of z.

        With SNIS it is larger on average, by the slack of the prior's bound.
        """
        q = self.posterior(x)
        z = q.rsample()
        return self._divergence(q, z) - self.likelihood(z).log_prob(x.to(self.mean))


class ConvEIMVAE(_BinaryVAE):
    """The convolutional VAE of two groups of 50 latents: z_2, whose prior is p, and z_1 given z_2.

    Arguments:
        mean: The training images' mean, with shape ``(1, 28, 28)``.
        prior: p(z_2), trained with the VAE; N(0, I) if None.

    Raises:
        ValueError: If the mean is of another shape.

    Example:
        >>> images = torch.rand(20, 1, 28, 28)
        >>> vae = ConvEIMVAE(images.mean(0)).eval()
        >>> vae.negative_elbo(torch.bernoulli(images)).shape
        torch.Size([20])
    """

    def __init__(self, mean: Tensor, prior: SNISPrior | LARSPrior | None = None) -> None:
        super().__init__(mean)
        self.top = nn.Sequential(*_convolutions(), nn.Linear(512, 2 * NUM_LATENTS))
        self.features = nn.Sequential(*_convolutions())
        self.embed = nn.Sequential(nn.Linear(NUM_LATENTS, 512), nn.Tanh())
        self.bottom = mlp(1024, 300, 2 * NUM_LATENTS)
        self.conditional = mlp(NUM_LATENTS, 300, 300, 2 * NUM_LATENTS)
        self.embed_1 = nn.Sequential(nn.Linear(NUM_LATENTS, 300), nn.Tanh())
        self.embed_2 = nn.Sequential(nn.Linear(NUM_LATENTS, 300), nn.Tanh())
        self.decoder = nn.Sequential(
            *(nn.Linear(600, 512), nn.Tanh(), nn.Unflatten(1, (32, 4, 4))),
            *(nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1), _Crop(), nn.ReLU()),
            *(nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1), nn.ReLU()),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )
        self._initialise(prior)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loc and scale of q(z_2 | x), and the features of x that q(z_1 | z_2, x) uses.

        For binary images ``(B, 1, 28, 28)``, the shapes are ``(B, 50)``, ``(B, 50)``, ``(B, 512)``.
        """
        x = self._centred(x)
        return (*_split(self.top(x)), self.features(x))

    def prior_of_z_1(self, z_2: Tensor) -> tuple[Tensor, Tensor]:
        """Returns loc and scale of p(z_1 | z_2)."""
        return _split(self.conditional(z_2.to(self.mean)))

    def posterior_of_z_1(self, z_2: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns loc and scale of q(z_1 | z_2, x)."""
        both = torch.cat([features, self.embed(z_2.to(self.mean))], 1)
        return _split(self.bottom(both))

    def likelihood(self, z_2: Tensor, z_1: Tensor) -> Distribution:
        """Returns p(x | z_1, z_2), over binary images."""
        z_1, z_2 = z_1.to(self.mean), z_2.to(self.mean)
        both = torch.cat([self.embed_1(z_1), self.embed_2(z_2)], 1)
        return self._bernoulli(self.decoder(both))

    def negative_elbo(self, x: Tensor) -> Tensor:
        """Returns KL(q, p) - E_q[log p(x | z)] in nats, ``(B,)``, from one draw of z.

        With SNIS it is larger on average, by the slack of the prior's bound.
        """
        loc, scale, features = self.encode(x)
        q_2 = diagonal_normal(loc, scale)
        z_2 = q_2.rsample()
        q_1 = diagonal_normal(*self.posterior_of_z_1(z_2, features))
        z_1 = q_1.rsample()
        kl = self._divergence(q_2, z_2) + kl_divergence(
            q_1, diagonal_normal(*self.prior_of_z_1(z_2))
        )
        return kl - self.likelihood(z_2, z_1).log_prob(x.to(self.mean))


class _Crop(nn.Module):
    """From 8×8 to 7×7."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :7, :7]


def _require_binary(x: Tensor) -> None:
    if not ((x == 0) | (x == 1)).all():
        raise ValueError(_BINARY)


def _convolutions() -> tuple[nn.Module, ...]:
    """From 28×28 over 14×14 and 7×7 to 32 maps of 4×4, with TensorFlow's 'same' padding."""
    return (
        *(nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(32, 32, 4, stride=2), nn.ReLU()),
        nn.Flatten(),
    )


def _split(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Loc, and a scale of at least 1e-5."""
    loc, raw = at_least_float32(parameters).chunk(2, dim=-1)
    return loc, softplus(raw).clamp(min=1e-5)
