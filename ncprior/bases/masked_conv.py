"""Masked convolutions over a grid of codes, and their evaluation place by place.

The places of a grid are in raster order. The logits of the code at a place are a function of the
codes before it: a layer sees those places of a window that come before its centre, and all but the
first layer also the centre itself. Drawing therefore computes every layer at one place after the
other from stored features, at the cost of one evaluation of the whole grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, pad, silu

from ncprior.heads.contexts import Standardise
from ncprior.utils.require import require_counts, require_numbers, require_shape

_CONVOLUTIONS = (conv1d, conv1d, conv2d, conv3d)  # by the number of axes of the grid

_STORED = 2**24  # numbers: features of all layers at all places, for the rows drawn at once


class MaskedConvNet(nn.Module):
    """Autoregressive network of masked convolutions: logits of every code given those before it.

    Gated layers with residual connections, as in PixelCNN, over a grid of up to three axes.

    Arguments:
        event_shape: Shape of the codes without batch: ``()`` to ``(D, H, W)``.
        num_categories: V, the number of values of a code.
        context_shape: Shape of a context without batch, or ``None``: ``(C, *event)`` is seen place
            by place, any other as a vector.
        width: Features of the hidden layers.
        depth: Number of layers after the first.
        kernel_size: Side of the windows, an odd number.
        dropout: Dropout probability of hidden features, while training.

    References:
        | Conditional Image Generation with PixelCNN Decoders (van den Oord et al., NeurIPS 2016)

    Example:
        >>> net = MaskedConvNet((4, 4), 512, width=32)
        >>> net(torch.randint(512, (3, 4, 4))).shape
        torch.Size([3, 4, 4, 512])
    """

    windows: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        num_categories: int,
        *,
        context_shape: Sequence[int] | None = None,
        width: int = 64,
        depth: int = 4,
        kernel_size: int = 5,
        dropout: float = 0.0,
    ) -> None:
        shape = require_shape("event_shape", event_shape)
        require_counts(num_categories=num_categories, width=width, kernel_size=kernel_size)
        require_counts("[0, inf)", depth=depth)
        require_numbers("[0, 1)", dropout=dropout)
        if len(shape) > len(_CONVOLUTIONS) - 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"A network over codes takes up to three axes and an odd kernel_size; got "
                f"{shape} and {kernel_size}."
            )
        given = None if context_shape is None else require_shape("context_shape", context_shape)
        super().__init__()
        self.event_shape, self.num_categories = Size(shape), int(num_categories)
        self.context_shape, self.grid = given, Size(shape or (1,))
        self.width, self.depth, self.kernel = int(width), int(depth), int(kernel_size)
        before = self.kernel ** len(self.grid) // 2  # places of a window in front of its centre
        self.embedding = nn.Embedding(self.num_categories, self.width)
        self.position = nn.Parameter(torch.zeros(*self.grid, self.width))
        seen = (before, *(before + 1 for _ in range(self.depth)))
        self.layers = nn.ModuleList(_Gated(self.width, count, dropout) for count in seen)
        self.context = None
        if given is not None:
            self.context = _Context(given, self.grid, self.width, len(self.layers))
        self.out = nn.Linear(self.width, self.num_categories)

    def config(self) -> dict[str, Any]:
        """Returns the sizes to save besides the tensors, ready for JSON."""
        return {
            "event_shape": list(self.event_shape),
            "num_categories": self.num_categories,
            "context_shape": None if self.context_shape is None else list(self.context_shape),
            "width": self.width,
            "depth": self.depth,
            "kernel_size": self.kernel,
        }

    def forward(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the logits of every code, with shape ``(B, *event, V)``.

        Arguments:
            codes: Codes, with shape ``(B, *event)``.
            context: Contexts of the rows, with shape ``(B, ...)``, or ``None``.
        """
        c = self.embed_context(context)
        codes = codes.reshape(-1, *self.grid)
        h = self.embedding(codes).movedim(-1, 1)
        position = self.position.movedim(-1, 0)
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            shift = 0.0 if c is None else c[i].movedim(-1, 1)
            new = layer(self._convolve(h, layer.weight), shift)
            h = new + (h if i > 0 else position)
        logits: Tensor = self.out(silu(h.movedim(1, -1)))
        return logits.reshape(-1, *self.event_shape, self.num_categories)

    def embed_context(self, context: Tensor | None) -> Tensor | None:
        """Returns the embedding of a context for each layer, ``(layers, B, *grid or ones, 2 width)``."""
        if (context is None) != (self.context is None):
            needs, got = ("no", "one") if self.context is None else ("a", "none")
            raise ValueError(f"This network over codes takes {needs} context; got {got}.")
        return None if self.context is None else self.context(context)

    @torch.no_grad()
    def draw(self, count: int, context: Tensor | None = None) -> Tensor:
        """Draws codes place by place, with shape ``(count, B, *event)``; B is 1 without a context.

        Arguments:
            count: Number of draws per row.
            context: Contexts of the rows, with shape ``(B, ...)``, or ``None``.
        """
        c = self.embed_context(context)
        rows = 1 if context is None else len(context)
        stored = len(self.layers) * self.width * math.prod(n + self.kernel - 1 for n in self.grid)
        at_once = max(1, _STORED // stored)
        c = None if c is None else c.expand(-1, -1, *self.grid, -1).flatten(2, -2)
        found = [torch.empty(0, self.grid.numel(), dtype=torch.long, device=self.position.device)]
        for first in range(0, count * rows, at_once):
            some = torch.arange(first, min(first + at_once, count * rows), device=found[0].device)
            found.append(self._draw(len(some), None if c is None else c[:, some % rows]))
        return torch.cat(found).reshape(count, rows, *self.event_shape)

    def _draw(self, rows: int, c: Tensor | None) -> Tensor:
        """Draws rows of codes, ``(rows, places)``, given their embedded contexts at every place."""
        windows, padded = self._windows()
        layers: Any = self.layers
        stored = [self.position.new_zeros(rows, padded, self.width) for _ in layers]
        weights = [layer.weight.permute(2, 1, 0).flatten(0, 1) for layer in layers]
        position, codes = self.position.reshape(-1, self.width), []
        for place, window in enumerate(windows):
            h = position[place]
            for i, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
                seen = stored[i].index_select(1, window[: layer.weight.shape[2]])
                shift = 0.0 if c is None else c[i, :, place]
                h = h + layer(seen.flatten(1) @ weight, shift)
                if i + 1 < len(layers):
                    stored[i + 1][:, window[len(window) // 2]] = h
            p = self.out(silu(h)).softmax(-1)
            codes.append(torch.multinomial(p, 1).squeeze(1))
            stored[0][:, window[len(window) // 2]] = self.embedding(codes[-1])
        return torch.stack(codes, 1)

    def _convolve(self, h: Tensor, weight: Tensor) -> Tensor:
        """Convolution with the first half of a kernel: the weights behind those given are 0."""
        axes, half = len(self.grid), self.kernel // 2
        shape = (half + 1, *[self.kernel] * (axes - 1))
        kernel = pad(weight, (0, math.prod(shape) - weight.shape[2])).unflatten(2, shape)
        h = pad(
            h, [half] * (2 * axes - 1) + [0]
        )  # nothing behind the last place of the first axis
        return _CONVOLUTIONS[axes](h, kernel)

    def _windows(self) -> tuple[Tensor, int]:
        """Places of the window around every place, in the grid with margins; and their number."""
        shape = [n + self.kernel - 1 for n in self.grid]
        places = torch.arange(math.prod(shape), device=self.position.device).reshape(shape)
        for axis in range(len(self.grid)):
            places = places.unfold(axis, self.kernel, 1)
        return places.reshape(math.prod(self.grid), -1), math.prod(shape)


class _Gated(nn.Module):
    """Gate behind a masked convolution, whose weight has shape ``(2 width, width, places seen)``."""

    def __init__(self, width: int, places: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * width, width, places))
        self.bias = nn.Parameter(torch.zeros(2 * width))
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        if places > 0:
            nn.init.normal_(self.weight, std=1 / math.sqrt(width * places))

    def forward(self, a: Tensor, shift: Tensor | float) -> Tensor:
        """The update of the features, from the convolution's output with features on axis 1."""
        extra = (1,) * (a.ndim - 2)
        a, b = (a + self.bias.reshape(-1, *extra) + shift).chunk(2, 1)
        h = self.dropout(a.tanh() * b.sigmoid())
        return self.out(h.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]


class _Context(nn.Module):
    """Embedding of a context, a shift of the features of each layer."""

    def __init__(self, shape: tuple[int, ...], grid: Size, width: int, layers: int) -> None:
        super().__init__()
        self.shape, self.grid, self.layers = shape, grid, layers
        self.is_map = len(shape) > 1 and Size(shape[1:]) == grid
        channels = shape[0] if self.is_map else math.prod(shape)
        self.scale = Standardise((channels, *(1 for _ in grid)) if self.is_map else shape)
        window = 3 ** len(grid) if self.is_map else 1
        self.weight = nn.Parameter(torch.empty(width, channels, window))
        nn.init.normal_(self.weight, std=1 / math.sqrt(channels * window))
        self.bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, 2 * width * layers)

    def forward(self, context: Tensor) -> Tensor:
        if tuple(context.shape[1:]) != self.shape:
            raise ValueError(
                f"This network over codes takes a context of shape (B, ...) with ... = "
                f"{self.shape}; got {tuple(context.shape[1:])}."
            )
        x, axes = self.scale(context), len(self.grid)
        if self.is_map:
            kernel = self.weight.reshape(*self.weight.shape[:2], *[3] * axes)
            h = _CONVOLUTIONS[axes](x, kernel, self.bias, padding=1).movedim(1, -1)
        else:
            h = (x.flatten(1) @ self.weight.squeeze(2).mT + self.bias).unflatten(
                0, (-1, *[1] * axes)
            )
        return torch.stack(self.out(silu(h)).chunk(self.layers, -1))
