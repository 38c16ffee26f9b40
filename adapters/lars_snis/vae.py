"""The MNIST VAEs of LARS and SNIS, with N(0, I) or either prior, and their walks: NCP's Table 2.

    vae = EIMVAE(images.mean(0), SNISPrior())       # or LARSPrior(), or none for N(0, I)
    train_vae(vae, images, epochs=150)
    source = EIMSource(vae)

Images are binary: each pixel is drawn anew, in every epoch, with its grey value as probability.
Grey images raise an error, since the posterior of a grey image is not that of its binary draws.

References:
    | Energy-Inspired Models: Learning with Sampler-Induced Distributions
    | (Lawson et al., NeurIPS 2019) https://arxiv.org/abs/1910.14265
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

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
from ncprior.distributions import Sampleable, expand
from ncprior.single_group import SingleGroup
from ncprior.source import Group, LatentSource, require_eval
from ncprior.utils.require import (
    floats_of_batch,
    real_tensor,
    require_counts,
    require_instance,
    require_numbers,
    tensor_of_batch,
)

_PIXELS = (1, 28, 28)


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
        x = x.to(self.mean)
        if not ((x == 0) | (x == 1)).all():
            raise ValueError(
                "This VAE models binary images: pixels must be 0 or 1; got others. Draw them: "
                "torch.bernoulli(x) for x in [0, 1], or Binarised(x, batch_size) anew every epoch."
            )
        return x - self.mean

    def _bernoulli(self, logits: Tensor) -> Distribution:
        return Independent(
            Bernoulli(logits=(logits + self.mean_logits).float(), validate_args=False), 3
        )


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


class EIMSource(SingleGroup):
    """An :class:`EIMVAE` as a latent source, with any of its priors.

    Arguments:
        model: The VAE, in evaluation mode when it is used.

    Raises:
        TypeError: If it is no :class:`EIMVAE`.

    Example:
        >>> from ncprior.source import sample_posterior
        >>> vae = EIMVAE(torch.full((1, 28, 28), 0.5)).eval()
        >>> latents, state = sample_posterior(EIMSource(vae), torch.ones(4, 1, 28, 28))
        >>> latents[0].shape
        torch.Size([4, 50])
    """

    def __init__(self, model: EIMVAE) -> None:
        require_instance("model", model, EIMVAE, "Two groups: ConvEIMSource(ConvEIMVAE(...)).")
        super().__init__(
            *(model.prior_distribution(), model.posterior, model.decode),
            module=model,
            likelihood=model.likelihood,
        )


class ConvEIMSource(LatentSource[Any, Any]):
    """A :class:`ConvEIMVAE` as a latent source: z_2, then z_1 with context z_2.

    Arguments:
        model: The VAE, in evaluation mode when it is used.

    Raises:
        TypeError: If it is no :class:`ConvEIMVAE`.

    Example:
        >>> from ncprior.source import sample_posterior
        >>> source = ConvEIMSource(ConvEIMVAE(torch.full((1, 28, 28), 0.5)).eval())
        >>> (z_2, z_1), state = sample_posterior(source, torch.ones(4, 1, 28, 28))
        >>> source.decode(state).shape
        torch.Size([4, 1, 28, 28])
    """

    num_groups = 2

    def __init__(self, model: ConvEIMVAE) -> None:
        remedy = "One group: EIMSource(EIMVAE(...))."
        self.module: ConvEIMVAE = require_instance("model", model, ConvEIMVAE, remedy)

    class Encoding(NamedTuple):
        """Loc and scale of q(z_2 | x), and features of x."""

        loc: Tensor
        scale: Tensor
        features: Tensor

    class State(NamedTuple):
        """The latents so far, and loc and scale of the next posterior and, if Gaussian, prior."""

        rows: Tensor  # (B, 0): carries the batch size
        latents: tuple[Tensor, ...]
        prior: tuple[Tensor, Tensor] | None
        posterior: tuple[Tensor, Tensor] | None
        features: Tensor | None

    def encode(self, x: Any) -> Encoding:  # noqa: ANN401
        """Encodes binary images, ``(B, 1, 28, 28)``, the first item of a batch that is a tuple."""
        require_eval(self.module)
        return self.Encoding(*self.module.encode(x))

    def start(
        self, batch_size: int, encoding: Encoding | None = None, condition: None = None
    ) -> State:
        """Returns the state before z_2, for ``batch_size`` rows."""
        require_eval(self.module)
        if condition is not None:
            raise ValueError("This source takes no condition; got one.")
        require_counts(batch_size=batch_size)
        rows = self.module.mean.new_empty(batch_size, 0)
        if encoding is None:
            return self.State(rows, (), None, None, None)
        if len(encoding.loc) != batch_size:
            raise ValueError(
                f"The walk has {batch_size} rows; got {len(encoding.loc)} rows of encoding."
            )
        return self.State(rows, (), None, (encoding.loc, encoding.scale), encoding.features)

    def group(self, state: State) -> Group:
        """Returns p(z_2), or p(z_1 | z_2) with context z_2, and, given an x, the posterior."""
        q = None if state.posterior is None else diagonal_normal(*state.posterior)
        if state.prior is None:
            return Group(expand(self.module.prior_distribution(), len(state.rows)), q)
        return Group(diagonal_normal(*state.prior), q, state.latents[0])

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state with z_2, then z_1, each with shape ``(B, 50)``."""
        if len(z) != len(state.rows):
            raise ValueError(f"The walk has {len(state.rows)} rows; got {len(z)} rows of z.")
        latents = (*state.latents, z)
        if state.latents:
            return state._replace(latents=latents)
        prior, posterior = self.module.prior_of_z_1(z), None
        if state.features is not None:
            posterior = self.module.posterior_of_z_1(z, state.features)
        return state._replace(latents=latents, prior=prior, posterior=posterior)

    def decode(self, state: State) -> Tensor:
        """Returns the mean of p(x | z_1, z_2), ``(B, 1, 28, 28)``."""
        return self.likelihood(state).mean

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z_1, z_2), over binary images.

        Raises:
            ValueError: If the state does not hold both.
        """
        if len(state.latents) != 2:
            raise ValueError(
                f"Decoding needs z_2 and z_1; this walk has {len(state.latents)} of 2 latents. "
                f"Call advance(state, z)."
            )
        return self.module.likelihood(*state.latents)


class Binarised:
    """Shuffled batches of binary images, drawn anew from grey ones at every pass.

    Arguments:
        images: Grey images in [0, 1], with shape ``(N, ...)``: a pixel's probability of being 1.
        batch_size: Rows per batch; the last, smaller batch is left out.

    Raises:
        ValueError: If there is not one full batch.

    Example:
        >>> batches = Binarised(torch.rand(100, 1, 28, 28), batch_size=30)
        >>> [len(x) for x in batches]
        [30, 30, 30]
    """

    def __init__(self, images: Tensor, batch_size: int) -> None:
        images = floats_of_batch("Binarised", images, "Divide bytes by 255.", (0, 1))
        require_counts(f"[1, {len(images)}]", batch_size=batch_size)
        self.images, self.batch_size = images, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Yields binary images, ``(batch_size, ...)``."""
        rows = torch.randperm(len(self.images)).to(self.images.device)
        for batch in rows[: len(rows) - len(rows) % self.batch_size].split(self.batch_size):
            yield torch.bernoulli(self.images[batch])


def train_vae(
    vae: EIMVAE | ConvEIMVAE,
    images: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    progress: bool = True,
) -> None:
    """Trains a VAE together with its prior on the ELBO of binary images, drawn anew every epoch.

    Adam with a cosine schedule; the VAE ends up in evaluation mode, and LARS's normaliser
    estimated.

    Arguments:
        vae: The VAE, with any prior.
        images: Grey images in [0, 1], with shape ``(N, 1, 28, 28)``.
        epochs: Passes over the images.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        progress: Whether to show a progress bar.

    Raises:
        FloatingPointError: If the ELBO is not finite.
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.

    Example:
        >>> images = torch.rand(64, 1, 28, 28)
        >>> vae = EIMVAE(images.mean(0), LARSPrior())
        >>> train_vae(vae, images, epochs=2, batch_size=32, progress=False)
        >>> vae.training, bool(vae.prior.normaliser > 0)
        (False, True)
    """
    from ncprior.utils.optimise import train

    require_instance("vae", vae, (EIMVAE, ConvEIMVAE), "Make one: EIMVAE(images.mean(0)).")
    require_counts(epochs=epochs, batch_size=batch_size)
    require_numbers("(0, inf)", learning_rate=learning_rate)
    images = floats_of_batch("train_vae", images, "Divide bytes by 255.", (0, 1)).to(vae.mean)

    def negative_elbo(rows: Tensor) -> Tensor:
        loss = vae.negative_elbo(torch.bernoulli(images[rows])).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The negative ELBO is {loss.item()}. Take a smaller learning_rate, or look for "
                f"NaN in the images."
            )
        return loss

    batch_size = min(batch_size, len(images))
    train(
        *(vae, negative_elbo, len(images)),
        steps=epochs * (len(images) // batch_size),
        batch_size=batch_size,
        learning_rate=learning_rate,
        name="VAE" if vae.prior is None else f"VAE + {type(vae.prior).__name__}",
        progress=progress,
    )
    if isinstance(vae.prior, LARSPrior):
        vae.prior.estimate_normaliser()


class _Crop(nn.Module):
    """From 8×8 to 7×7."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :7, :7]


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
    loc, raw = parameters.float().chunk(2, dim=-1)
    return loc, softplus(raw).clamp(min=1e-5)
