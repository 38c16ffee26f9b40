"""Energy networks E(x) of VAEBM: small residual networks on images, smooth and unnormalised.

An energy is any ``nn.Module`` that maps x, with shape ``(B, ...)``, to E(x) in nats, with shape
``(B,)``. For vectors, use a :class:`~ncprior.heads.MLPHead`. A new network returns exactly 0, with
which the model is the VAE itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, silu

from ncprior.utils.precision import at_least_float32, in_full
from ncprior.utils.require import described, require_counts

_SMALLEST = 4  # feature maps are halved until they are at most this large


class EnergyNet(nn.Module):
    """Energy network on images: residual cells of 3×3 convolutions, with average pooling to 4×4.

    SiLU activations make the energy smooth, as Langevin dynamics requires. There are no batch
    statistics, so that E(x) depends on x alone. The first convolution halves images of more than
    16 pixels per side.

    Arguments:
        image_shape: Shape ``(C, H, W)`` of x without batch, such as (1, 28, 28), (3, 32, 32) or
            (3, 64, 64). Pixels are expected in [0, 1].
        width: Channels of the first cell; each halving adds ``width`` channels, up to 4 ×
            ``width``.

    Raises:
        ValueError: If the shape is not (C, H, W), or a size is below 1. For vectors, use
            ``MLPHead``.
        TypeError: If a size is not a whole number.

    References:
        Swish: Searching for Activation Functions (Ramachandran et al., 2017).

    Example:
        >>> EnergyNet((3, 32, 32), width=8)(torch.rand(5, 3, 32, 32))
        tensor([0., 0., 0., 0., 0.], grad_fn=<SqueezeBackward1>)
    """

    def __init__(self, image_shape: Sequence[int], *, width: int = 32) -> None:
        super().__init__()
        require_counts(width=width)
        if not isinstance(image_shape, tuple | list) or len(image_shape) != 3:
            got = image_shape if isinstance(image_shape, tuple | list) else described(image_shape)
            raise ValueError(
                f"image_shape must be a shape (C, H, W); got {got}. For vectors, use MLPHead((D,)) "
                f"as the energy."
            )
        for name, size in zip("CHW", image_shape, strict=True):
            require_counts(**{f"{name} of image_shape": size})
        self.image_shape, self.width = tuple(map(int, image_shape)), int(width)
        channels, size = self.image_shape[0], max(self.image_shape[1:])
        stride = 2 if size > 16 else 1
        self.stem = nn.Conv2d(channels, width, 3, padding=1, stride=stride)
        size, channels, cells = -(-size // stride), width, list[nn.Module]()
        while size > _SMALLEST:
            wider = min(channels + width, 4 * width)
            cells.append(_Cell(channels, wider))
            size, channels = -(-size // 2), wider
        self.cells = nn.Sequential(*cells)
        self.out = nn.Linear(channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Energy of images.

        Arguments:
            x: Images, with shape ``(B, C, H, W)``.

        Returns:
            E(x) in nats, with shape ``(B,)``, in float32 or better.

        Raises:
            ValueError: If x is no tensor, is on another device, or has another shape than
                ``image_shape``.
        """
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(
                f"This energy takes images of shape (B, {', '.join(map(str, self.image_shape))}); "
                f"got {described(x)}."
            )
        if x.device != self.out.weight.device:
            raise ValueError(
                f"Images and energy must be on one device; got {x.device} and "
                f"{self.out.weight.device}. Move one of them."
            )
        x = x.to(self.out.weight.dtype, memory_format=torch.channels_last)
        h = silu(self.cells(self.stem(2 * x - 1)))
        return in_full(self.out, reduce(at_least_float32(h), "b c h w -> b c", "sum")).squeeze(-1)

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON."""
        return {"image_shape": list(self.image_shape), "width": self.width}


class _Cell(nn.Module):
    """Residual cell that halves the feature maps."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(before, after, 1)
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        h = self.skip(h) + self.second(silu(self.first(silu(h))))
        return avg_pool2d(h, 2, ceil_mode=True)
