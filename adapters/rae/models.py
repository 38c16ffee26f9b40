r"""The VAE and the regularised autoencoder of the RAE paper, to train here: NCP's Table 1.

Two models share an encoder and a decoder of four and of up to three strided convolutions. The VAE
has a Gaussian posterior, and its loss for an image of C channels is

.. math::
    \sum_{h,w} \frac{1}{C} \sum_c (x - \hat x)^2 + \beta \, KL(q(z | x) \,\|\, N(0, I)),

which is β times the negative ELBO, up to a constant, of p(x | z) = N(x̂, σ² I) with σ² = β C / 2.
The regularised autoencoder (RAE) has codes without noise and no prior of its own.

Its training: batches of 100, 70 to 100 epochs of Adam at 1e-4 (VAE), 5e-4 (RAE) or 1e-3 (RAE on
CelebA), halved where the validation loss stalls for 5 epochs. At full width an epoch of CIFAR-10
takes over an hour on one core; at ``width=0.25`` some minutes.

References:
    | From Variational to Deterministic Autoencoders (Ghosh et al., ICLR 2020)
    | https://arxiv.org/abs/1903.12436
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import spectral_norm

from ncprior.adapters.rae.networks import SETTINGS, Networks
from ncprior.utils.precision import at_least_float32
from ncprior.utils.random_state import seeded
from ncprior.utils.require import real_tensor, require_choice, require_instance, require_numbers


class VAE(Networks):
    """The RAE paper's VAE, with log σ between -5 and 5.

    Arguments:
        data: ``"mnist"`` (padded to 32×32), ``"cifar10"``, or ``"celeba"`` (the central 140×140
            pixels scaled to 64×64): gives shapes and β.
        width: Fraction of the paper's filter counts.
        beta: β, if not the paper's for this data.

    Attributes:
        sigma: σ of p(x | z) = N(x̂, σ² I), for which :meth:`loss` is β times the negative ELBO.

    Raises:
        ValueError: If there is no such data, or the width leaves no filter.

    Example:
        >>> vae = VAE("mnist", width=0.05).eval()
        >>> x = pad_to_32(torch.rand(4, 1, 28, 28))
        >>> vae.loss(x).shape, vae.decode(vae.posterior(x).sample()).shape
        (torch.Size([4]), torch.Size([4, 1, 32, 32]))
    """

    def __init__(self, data: str, *, width: float = 1.0, beta: float | None = None) -> None:
        require_numbers("(0, inf) or None", beta=beta)
        super().__init__(data, width)
        self.beta = self.setting.vae if beta is None else beta
        self.sigma = math.sqrt(self.beta * self.setting.channels / 2)
        self.log_sigma = nn.Linear(self.num_features, self.setting.latents)
        self.initialise()

    def prior(self) -> Distribution:
        """Returns p(z) = N(0, I), on the model's device."""
        zeros = torch.zeros(self.latents, device=self.mean.weight.device)
        return Independent(Normal(zeros, torch.ones_like(zeros), validate_args=False), 1)

    def posterior(self, x: Tensor) -> Distribution:
        """Returns q(z | x) for images x in [0, 1], ``(B, C, H, W)``."""
        features = self.features_of(x)
        mean, log_sigma = self.mean(features), 5 * self.log_sigma(features).tanh()
        sigma = at_least_float32(log_sigma).exp()
        return Independent(Normal(at_least_float32(mean), sigma, validate_args=False), 1)

    def likelihood(self, z: Tensor) -> Distribution:
        """Returns p(x | z) = N(x̂, σ² I), a density over images."""
        mean = at_least_float32(self.decode(z))
        sigma = torch.full_like(mean, self.sigma)
        return Independent(Normal(mean, sigma, validate_args=False), 3)

    def loss(self, x: Tensor) -> Tensor:
        """Returns squared error + β KL, ``(B,)``, from one draw of z."""
        x = self.checked(x).to(self.mean.weight.device)
        q = self.posterior(x)
        misfit = (x - self.decode(q.rsample().to(self.mean.weight))).square().mean(1).sum((1, 2))
        return misfit + self.beta * kl_divergence(q, self.prior())


class RAE(Networks):
    """The regularised autoencoder: codes without noise, a small code norm, a smooth decoder.

    Its loss is mean squared error + β |z|²/D + the regulariser of the decoder.

    Arguments:
        data: ``"mnist"``, ``"cifar10"`` or ``"celeba"``, see :class:`VAE`.
        regulariser: Regulariser of the decoder: ``"l2"`` (RAE-L2, squared weights), ``"sn"`` (RAE-SN, spectral
            normalisation), or ``None`` (RAE, without).
        width: Fraction of the paper's filter counts.
        beta: β, if not the paper's for this data and regulariser.

    Raises:
        ValueError: If there is no such data or regulariser, or the width leaves no filter.

    Example:
        >>> rae = RAE("mnist", width=0.05).eval()
        >>> x = pad_to_32(torch.rand(4, 1, 28, 28))
        >>> rae.loss(x).shape, rae.decode(rae.encode(x)).shape
        (torch.Size([4]), torch.Size([4, 1, 32, 32]))
    """

    def __init__(
        self,
        data: str,
        *,
        regulariser: str | None = "l2",
        width: float = 1.0,
        beta: float | None = None,
    ) -> None:
        require_numbers("[0, inf) or None", beta=beta)
        require_choice("data", data, SETTINGS)
        require_choice("regulariser", regulariser, SETTINGS[data].rae)
        super().__init__(data, width)
        preset, self.decay = self.setting.rae[regulariser]
        self.beta = preset if beta is None else beta
        self.initialise()
        if regulariser == "sn":
            for layer in self._decoder_weights():
                spectral_norm(layer)

    def encode(self, x: Tensor) -> Tensor:
        """Returns the codes, ``(B, D)``, of images x in [0, 1], ``(B, C, H, W)``."""
        z: Tensor = self.mean(self.features_of(x))
        return z

    def loss(self, x: Tensor) -> Tensor:
        """Returns mean squared error + β |z|²/D + the decoder's L2 penalty, ``(B,)``."""
        x = self.checked(x).to(self.mean.weight.device)
        z = self.encode(x)
        misfit = (x - self.decode(z)).square().mean((1, 2, 3))
        weights = [layer.weight.square().sum() for layer in self._decoder_weights()]
        penalty = torch.stack(weights).sum() if self.decay else 0.0
        return misfit + self.beta * z.square().mean(1) + self.decay * penalty

    def _decoder_weights(self) -> list[nn.Linear | nn.ConvTranspose2d]:
        layers = self.decoder.modules()
        return [layer for layer in layers if isinstance(layer, nn.Linear | nn.ConvTranspose2d)]


def pad_to_32(x: Tensor) -> Tensor:
    """Pads images of 28×28 pixels with zeros, as RAE does MNIST's.

    Arguments:
        x: Images, with shape ``(B, C, 28, 28)``.

    Returns:
        Images, with shape ``(B, C, 32, 32)``.

    Raises:
        ValueError: If the images have another size.

    Example:
        >>> pad_to_32(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 1, 32, 32])
    """
    x = real_tensor("x", x)
    if x.ndim != 4 or tuple(x.shape[2:]) != (28, 28):
        raise ValueError(f"Images of shape (B, C, 28, 28) are padded; got {tuple(x.shape)}.")
    return pad(x, (2, 2, 2, 2))


@torch.no_grad()
def settle(model: VAE | RAE, images: Tensor) -> None:
    """Recomputes the batch statistics under the final weights, and sets evaluation mode.

    The moving averages of the networks keep 99 % per step: after a short training they lag behind,
    and decoded images are grey.

    Arguments:
        model: The trained model; the statistics of its batch normalisation are replaced.
        images: Some thousands of training images, as the model takes them, ``(N, C, H, W)``.

    Example:
        >>> model = VAE("mnist", width=0.05)
        >>> settle(model, torch.rand(200, 1, 32, 32))
        >>> model.training
        False
    """
    require_instance("model", model, (VAE, RAE), "Pass a VAE or a RAE of ncprior.adapters.rae.")
    images = model.checked(images)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    model.train()
    try:
        with seeded(0):
            for batch in images.tensor_split(max(1, len(images) // 100)):  # of equal weight
                model.loss(batch)
        model.eval()
    except BaseException:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        for module, mode in modes.items():
            module.training = mode
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
