"""First layers of ratio heads: standardised inputs, and embeddings of the context."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ncprior.utils.optimise import one_if_constant
from ncprior.utils.require import described

_IGNORED = 1e30  # the sd of an input that is left out: divided by it, all numbers are about 0

LARGEST = 8  # height and width of the maps that heads work on


class Standardise(nn.Module):
    """Standardisation (z - mean) / sd of an input, with fixed buffers."""

    mean: Tensor
    sd: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(tuple(shape)))
        self.register_buffer("sd", torch.ones(tuple(shape)))

    def forward(self, z: Tensor) -> Tensor:
        return (z.to(self.mean.dtype) - self.mean) / self.sd  # bf16 backbones, float32 heads

    def fit(self, z: Tensor) -> None:
        """Sets mean and standard deviation from a batch; axes of size 1 here are averaged over."""
        axes = [0, *(i + 1 for i, size in enumerate(self.mean.shape) if size == 1)]
        z = z.to(self.mean)
        if not torch.isfinite(z).all():
            raise FloatingPointError("The probed latents or context are not finite.")
        sd = z.std(axes, keepdim=True, correction=0)[0]
        self.mean.copy_(z.mean(axes, keepdim=True)[0])
        self.sd.copy_(one_if_constant(sd, self.mean))

    def leave_out(self, inputs: Tensor) -> None:
        """Sets some inputs, given as a mask of their shape, to 0 for every z."""
        self.sd.masked_fill_(inputs, _IGNORED)

    def left_out(self) -> Tensor:
        """Returns the mask of the inputs that are left out."""
        return self.sd > _IGNORED / 2  # also after a change of dtype


class VectorContext(nn.Module):
    """Embedding of a context as one feature vector per row; 0 without a context."""

    def __init__(self, shape: Sequence[int] | None, width: int, *, spatial: bool = False) -> None:
        super().__init__()
        self.shape = None if shape is None else tuple(shape)
        self.spatial = spatial
        if self.shape is not None:
            self.scale = Standardise(self.shape)
            self.linear = nn.Linear(math.prod(self.shape), width)

    def forward(self, context: Tensor | None) -> Tensor | float:
        if _checked_context(context, self.shape) is None:
            return 0.0
        h: Tensor = self.linear(rearrange(self.scale(context), "b ... -> b (...)"))
        return rearrange(h, "b c -> b c 1 1") if self.spatial else h


def map_stem(shape: Sequence[int], width: int) -> nn.Module:
    """Returns the first layers for a feature map: 3×3, or strided 5×5 convolutions down to 8×8.

    Arguments:
        shape: Shape ``(C, H, W)`` of the map without batch.
        width: Channels of the result.
    """
    channels, size = shape[0], max(shape[1:])
    if size <= LARGEST:
        return nn.Conv2d(channels, width, 3, padding=1)
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 5, stride=2, padding=2)]
    while (size := -(-size // 2)) > LARGEST:
        layers += [nn.SiLU(), nn.Conv2d(width, width, 5, stride=2, padding=2)]
    return nn.Sequential(*layers)


class MapContext(nn.Module):
    """Embedding of a context as one feature map per row."""

    def __init__(self, shape: Sequence[int], width: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.scale = Standardise((shape[0], 1, 1))
        self.stem = map_stem(self.shape, width)

    def forward(self, context: Tensor | None) -> Tensor:
        _checked_context(context, self.shape)
        h: Tensor = self.stem(self.scale(context))
        return h


def require_context(context: object) -> None:
    """Validates that a context is a tensor of real numbers with rows, or ``None``."""
    real = isinstance(context, Tensor) and context.ndim > 0 and not context.is_complex()
    if context is None or real:
        return
    raise TypeError(
        f"context must be a tensor of real numbers of shape (B, ...), or None; got {described(context)}. Pass a tensor."
    )


def check_rows(z: Tensor, event_shape: tuple[int, ...], context: Tensor | None) -> None:
    """Validates a context, and that it has the rows of the latents."""
    require_context(context)
    rows = z.shape[z.ndim - len(event_shape) - 1]
    if context is not None and len(context) != rows:
        raise ValueError(
            f"z and context must have the same rows: z (*, B, *event), context (B, ...); "
            f"got {rows} rows of z and {len(context)} of context."
        )


def _checked_context(context: Tensor | None, shape: tuple[int, ...] | None) -> Tensor | None:
    got = None if context is None else tuple(context.shape[1:])
    if got != shape:
        raise ValueError(
            f"The head was made for a context of shape (B, ...) with ... = {shape}; got {got}."
        )
    return context
