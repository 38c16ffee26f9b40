r"""The networks of the RAE paper, to train here, and their walk: the setting of NCP's Table 1.

Two models share an encoder and a decoder of four and of up to three strided convolutions. The VAE
has a Gaussian posterior, and its loss for an image of C channels is

.. math::
    \sum_{h,w} \frac{1}{C} \sum_c (x - \hat x)^2 + \beta \, KL(q(z | x) \,\|\, N(0, I)),

which is β times the negative ELBO, up to a constant, of p(x | z) = N(x̂, σ² I) with σ² = β C / 2.
The regularised autoencoder (RAE) has codes without noise and no prior of its own. For both, the
paper fits a mixture of ten Gaussians to the codes of the training set:

    source = RAESource(vae)
    closer = rebase(source, fit_mixture(latents_of(source, x, of="means"), 10))

Its training: batches of 100, 70 to 100 epochs of Adam at 1e-4 (VAE), 5e-4 (RAE) or 1e-3 (RAE on
CelebA), halved where the validation loss stalls for 5 epochs. At full width an epoch of CIFAR-10
takes over an hour on one core; at ``width=0.25`` some minutes.

References:
    | From Variational to Deterministic Autoencoders (Ghosh et al., ICLR 2020)
    | https://arxiv.org/abs/1903.12436
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import spectral_norm

from ncprior.bases.empirical import NoPrior
from ncprior.distributions import Sampleable
from ncprior.single_group import SingleGroup
from ncprior.utils.require import (
    described,
    floats_of_batch,
    real_tensor,
    require_choice,
    require_flags,
    require_instance,
    require_numbers,
)


class _Setting(NamedTuple):
    """One data set's networks and weights of the losses."""

    channels: int
    size: int
    kernel: int
    latents: int
    up: tuple[int, ...]  # filters of the decoder's strided layers
    centred: bool  # whether the encoder's input is 2x - 1
    vae: float  # β
    rae: Mapping[str | None, tuple[float, float]]  # β, and the weight of the decoder's L2


_SETTINGS = {
    "mnist": _Setting(
        *(1, 32, 4, 16, (512, 256), True),
        vae=0.312,
        rae={None: (5e-4, 0.0), "l2": (1e-4, 1e-7), "sn": (9e-3, 0.0)},
    ),
    "cifar10": _Setting(
        *(3, 32, 4, 128, (512, 256), True),
        vae=0.024,
        rae={None: (1e-2, 0.0), "l2": (1e-3, 1e-6), "sn": (0.03, 0.0)},
    ),
    "celeba": _Setting(
        *(3, 64, 5, 64, (512, 256, 128), False),
        vae=0.09024,
        rae={None: (1e-4, 0.0), "l2": (1e-4, 1e-7), "sn": (2.4e-3, 0.0)},
    ),
}

_DOWN = (128, 256, 512, 1024)


class _Networks(nn.Module):
    """Base class of both models: images, encoder up to the features, decoder."""

    def __init__(self, data: str, width: float) -> None:
        super().__init__()
        require_choice("data", data, _SETTINGS)
        require_numbers("(0, inf)", width=width)
        if round(width * _DOWN[0]) < 1:
            raise ValueError(
                f"width is a fraction of the filter counts, of which the first is {_DOWN[0]}; "
                f"got {width}."
            )
        self.setting = _SETTINGS[data]
        down, up = ([round(width * n) for n in counts] for counts in (_DOWN, self.setting.up))
        self.features = nn.Sequential(*_encoder_layers(self.setting, down), nn.Flatten())
        self.num_features = down[-1] * (self.setting.size // 16) ** 2
        self.mean = nn.Linear(self.num_features, self.setting.latents)
        self.decoder = nn.Sequential(*_decoder_layers(self.setting, down[-1], up))

    @property
    def latents(self) -> int:
        """D, the number of latents."""
        return self.setting.latents

    def decode(self, z: Tensor) -> Tensor:
        """Returns images in [0, 1], ``(B, C, H, W)``, for z of shape ``(B, D)``."""
        image: Tensor = self.decoder(z)
        return image

    def _features_of(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(self._checked(x).to(self.mean.weight))
        return features

    def _checked(self, x: Tensor) -> Tensor:
        x = floats_of_batch("This model", x, "Divide bytes by 255: x.float() / 255.")
        shape = (self.setting.channels, self.setting.size, self.setting.size)
        if x.ndim != 4 or tuple(x.shape[1:]) != shape:
            remedy = " Pad it: pad_to_32(x)." if tuple(x.shape[1:]) == (1, 28, 28) else ""
            raise ValueError(
                f"These networks take images of shape (B, {', '.join(map(str, shape))}); "
                f"got {tuple(x.shape)}.{remedy}"
            )
        return x

    def _initialise(self) -> None:
        """Initialises as Keras does: weights by Glorot's uniform distribution, biases by 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]


class VAE(_Networks):
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
        self._initialise()

    def prior(self) -> Distribution:
        """Returns p(z) = N(0, I), on the model's device."""
        zeros = torch.zeros(self.latents, device=self.mean.weight.device)
        return Independent(Normal(zeros, torch.ones_like(zeros), validate_args=False), 1)

    def posterior(self, x: Tensor) -> Distribution:
        """Returns q(z | x) for images x in [0, 1], ``(B, C, H, W)``."""
        features = self._features_of(x)
        mean, log_sigma = self.mean(features).float(), 5 * self.log_sigma(features).tanh()
        return Independent(Normal(mean, log_sigma.float().exp(), validate_args=False), 1)

    def likelihood(self, z: Tensor) -> Distribution:
        """Returns p(x | z) = N(x̂, σ² I), a density over images."""
        mean = self.decode(z).float()
        sigma = torch.full_like(mean, self.sigma)
        return Independent(Normal(mean, sigma, validate_args=False), 3)

    def loss(self, x: Tensor) -> Tensor:
        """Returns squared error + β KL, ``(B,)``, from one draw of z."""
        q = self.posterior(x)
        misfit = (x - self.decode(q.rsample().to(self.mean.weight))).square().mean(1).sum((1, 2))
        return misfit + self.beta * kl_divergence(q, self.prior())


class RAE(_Networks):
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
        require_choice("data", data, _SETTINGS)
        require_choice("regulariser", regulariser, _SETTINGS[data].rae)
        super().__init__(data, width)
        preset, self.decay = self.setting.rae[regulariser]
        self.beta = preset if beta is None else beta
        self._initialise()
        if regulariser == "sn":
            for layer in self._decoder_weights():
                spectral_norm(layer)

    def encode(self, x: Tensor) -> Tensor:
        """Returns the codes, ``(B, D)``, of images x in [0, 1], ``(B, C, H, W)``."""
        z: Tensor = self.mean(self._features_of(x))
        return z

    def loss(self, x: Tensor) -> Tensor:
        """Returns mean squared error + β |z|²/D + the decoder's L2 penalty, ``(B,)``."""
        z = self.encode(x)
        misfit = (x - self.decode(z)).square().mean((1, 2, 3))
        weights = [layer.weight.square().sum() for layer in self._decoder_weights()]
        penalty = torch.stack(weights).sum() if self.decay else 0.0
        return misfit + self.beta * z.square().mean(1) + self.decay * penalty

    def _decoder_weights(self) -> list[nn.Linear | nn.ConvTranspose2d]:
        layers = self.decoder.modules()
        return [layer for layer in layers if isinstance(layer, nn.Linear | nn.ConvTranspose2d)]


class RAESource(SingleGroup):
    """A :class:`VAE` or a :class:`RAE` as a latent source.

    The prior of a VAE is N(0, I). A RAE has none: fit one and :func:`~ncprior.bases.rebase`. Its
    codes are deterministic, so that no ratio of densities exists; ``noise`` is added to them.

    Arguments:
        model: The VAE or RAE, in evaluation mode when it is used.
        noise: Standard deviation of q(z | x) around a RAE's code, in units of z; a tenth of the
            codes' own standard deviation is little for the decoder. A VAE takes none.
        maps: Whether the input of the ratio heads is the 8×8 feature map of the decoder's first
            layer in place of z. On CIFAR-10's 128 latents heads then learn much faster.

    Raises:
        TypeError: If the model is neither.
        ValueError: If a RAE comes without noise, or a VAE with it.

    Example:
        >>> from ncprior.bases import fit_mixture, latents_of, rebase
        >>> source = RAESource(RAE("mnist", width=0.05).eval(), noise=0.1)
        >>> z = latents_of(source, pad_to_32(torch.rand(50, 1, 28, 28)))
        >>> closer = rebase(source, fit_mixture(z, 2))
        >>> closer.group(closer.start(5)).prior.sample().shape
        torch.Size([5, 16])
    """

    def __init__(
        self, model: VAE | RAE, *, noise: float | None = None, maps: bool = False
    ) -> None:
        prior: Sampleable
        posterior: Callable[[Tensor], Distribution]
        likelihood: Callable[[Tensor], Distribution]
        require_flags(maps=maps)
        if isinstance(model, VAE):
            if noise is not None:
                raise ValueError(
                    f"noise is for codes without any; the VAE's posterior has its own. Got {noise}."
                )
            prior, posterior, likelihood = model.prior(), model.posterior, model.likelihood
        elif isinstance(model, RAE):
            prior = NoPrior("A RAE has no prior of its own.", (model.latents,))
            posterior, likelihood = partial(_around_code, model, _checked(noise)), _refuse
        else:
            raise TypeError(
                f"RAESource takes a VAE or a RAE of ncprior.adapters.rae; got {described(model)}. "
                f"Wrap another VAE in SingleGroup."
            )
        super().__init__(
            *(prior, posterior, model.decode),
            module=model,
            likelihood=likelihood,
            features=model.decoder[:2] if maps else None,
        )

    def encode(self, x: Any) -> SingleGroup.Encoding:  # noqa: ANN401
        """Encodes one batch of images in [0, 1]: the parameters of q(z | x)."""
        return super().encode(
            floats_of_batch("RAESource", x, "Divide bytes by 255.", (0, 1), self.module)
        )


def _around_code(model: RAE, noise: float, x: Tensor) -> Distribution:
    code = model.encode(x).float()
    scale = torch.full_like(code, noise)
    return Independent(Normal(code, scale, validate_args=False), 1)


def _checked(noise: float | None) -> float:
    require_numbers("(0, inf) or None", noise=noise)
    if noise is None:
        raise ValueError(
            "A RAE's codes have no noise, and NCE needs a density q(z | x): pass noise=, the "
            "standard deviation of q(z | x) in units of z. Try a tenth of model.encode(x).std()."
        )
    return noise


def _refuse(_: Tensor) -> NoReturn:
    raise ValueError(
        "A RAE is no probability model: its squared error has no scale, so that p(x | z) is not "
        "known. Likelihoods need a VAE."
    )


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
    images = model._checked(images)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    model.train()
    for batch in images.split(100):
        model.loss(batch)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class _Centre(nn.Module):
    """From [0, 1] to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - 1


class _Crop(nn.Module):
    """Drops the last rows and columns."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : x.shape[-2] - self.count, : x.shape[-1] - self.count]


def _encoder_layers(setting: _Setting, filters: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = [_Centre()] if setting.centred else []
    before = setting.channels
    first, last = _same(setting.kernel, stride=2)
    for after in filters:
        layers += [
            nn.ZeroPad2d((first, last, first, last)),
            nn.Conv2d(before, after, setting.kernel, stride=2),
            *_normalise(after),
        ]
        before = after
    return layers


def _decoder_layers(setting: _Setting, before: int, filters: list[int]) -> list[nn.Module]:
    layers = [nn.Linear(setting.latents, 64 * before), nn.Unflatten(1, (before, 8, 8))]
    for after in filters:
        layers += [*_transposed(before, after, setting.kernel, stride=2), *_normalise(after)]
        before = after
    last = _transposed(before, setting.channels, setting.kernel, stride=1)
    return [*layers, *last, nn.Sigmoid()]


def _transposed(before: int, after: int, kernel: int, *, stride: int) -> list[nn.Module]:
    first, last = _same(kernel, stride=stride)
    layer = nn.ConvTranspose2d(before, after, kernel, stride=stride, padding=first)
    return [layer, _Crop(last - first)]


def _normalise(filters: int) -> tuple[nn.Module, nn.Module]:
    """Batch normalisation with Keras' defaults."""
    return nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01), nn.ReLU()


def _same(kernel: int, *, stride: int) -> tuple[int, int]:
    """TensorFlow's 'same' padding of an even size, in front and behind, which may differ by 1."""
    total = kernel - stride
    return total // 2, total - total // 2
