"""The layers of the RAE paper's networks: a strided encoder, a transposed decoder, their sizes.

References:
    | From Variational to Deterministic Autoencoders (Ghosh et al., ICLR 2020)
    | https://arxiv.org/abs/1903.12436
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ncprior.utils.require import floats_of_batch, require_choice, require_numbers


class Setting(NamedTuple):
    """One data set's networks and weights of the losses."""

    channels: int
    size: int
    kernel: int
    latents: int
    up: tuple[int, ...]  # filters of the decoder's strided layers
    centred: bool  # whether the encoder's input is 2x - 1
    vae: float  # β
    rae: Mapping[str | None, tuple[float, float]]  # β, and the weight of the decoder's L2


SETTINGS = {
    "mnist": Setting(
        *(1, 32, 4, 16, (512, 256), True),
        vae=0.312,
        rae={None: (5e-4, 0.0), "l2": (1e-4, 1e-7), "sn": (9e-3, 0.0)},
    ),
    "cifar10": Setting(
        *(3, 32, 4, 128, (512, 256), True),
        vae=0.024,
        rae={None: (1e-2, 0.0), "l2": (1e-3, 1e-6), "sn": (0.03, 0.0)},
    ),
    "celeba": Setting(
        *(3, 64, 5, 64, (512, 256, 128), False),
        vae=0.09024,
        rae={None: (1e-4, 0.0), "l2": (1e-4, 1e-7), "sn": (2.4e-3, 0.0)},
    ),
}

_DOWN = (128, 256, 512, 1024)


class Networks(nn.Module):
    """Base class of both models: images, encoder up to the features, decoder."""

    def __init__(self, data: str, width: float) -> None:
        super().__init__()
        require_choice("data", data, SETTINGS)
        require_numbers("(0, inf)", width=width)
        if round(width * _DOWN[0]) < 1:
            raise ValueError(
                f"width is a fraction of the filter counts, of which the first is {_DOWN[0]}; "
                f"got {width}."
            )
        self.setting = SETTINGS[data]
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

    def features_of(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(self.checked(x).to(self.mean.weight))
        return features

    def checked(self, x: Tensor) -> Tensor:
        x = floats_of_batch("This model", x, "Divide bytes by 255: x.float() / 255.")
        shape = (self.setting.channels, self.setting.size, self.setting.size)
        if x.ndim != 4 or tuple(x.shape[1:]) != shape:
            remedy = " Pad it: pad_to_32(x)." if tuple(x.shape[1:]) == (1, 28, 28) else ""
            raise ValueError(
                f"These networks take images of shape (B, {', '.join(map(str, shape))}); "
                f"got {tuple(x.shape)}.{remedy}"
            )
        return x

    def initialise(self) -> None:
        """Initialises as Keras does: weights by Glorot's uniform distribution, biases by 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]


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


def _encoder_layers(setting: Setting, filters: list[int]) -> list[nn.Module]:
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


def _decoder_layers(setting: Setting, before: int, filters: list[int]) -> list[nn.Module]:
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
