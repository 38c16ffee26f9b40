"""Ratio heads for codes: whole numbers, or one-hot vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ncprior.heads.networks import ConvHead, Head, MLPHead, checked_event
from ncprior.utils.require import described, require_flags

_MOST_AXES = 3


class CategoricalHead(Head):
    """Embedding of codes followed by an :class:`MLPHead` or a :class:`ConvHead`.

    Every level of a stack of grids has an embedding of its own, and the embeddings at one place are
    added, as the codebook vectors of a residual VQ-VAE are.

    Arguments:
        event_shape: Shape of the codes without batch: ``()`` for one code, ``(L,)`` for a
            sequence, ``(H, W)`` for a grid, ``(D, H, W)`` for D levels of grids; of one-hot
            vectors, the same with ``num_categories`` as a last axis.
        num_categories: Number of values of a code.
        one_hot: Whether z is one-hot vectors, such as those of ``OneHotCategorical``.
        context_shape: Shape of the context without batch, or ``None``. ``(C, H, W)`` of a grid
            ``(H, W)``, or ``(C, 1, L)`` of a sequence, is joined as a map, any other as a vector.
        width: Features of the embedding and of the hidden layers, a multiple of 8 for a grid.
        depth: Number of residual blocks or cells.
        dropout: Dropout probability, while training.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, or codes have more than three axes.

    Example:
        >>> head = CategoricalHead((4, 4), 512)
        >>> head(torch.randint(512, (3, 2, 4, 4))).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_categories: int,
        *,
        one_hot: bool = False,
        context_shape: Sequence[int] | None = None,
        width: int = 64,
        depth: int = 2,
        dropout: float = 0.0,
    ) -> None:
        require_flags(one_hot=one_hot)
        super().__init__(
            event_shape=event_shape,
            num_categories=num_categories,
            one_hot=one_hot,
            context_shape=context_shape,
            width=width,
            depth=depth,
            dropout=dropout,
        )
        width, count = self._config["width"], self._config["num_categories"]
        self.one_hot, self.num_categories = one_hot, count
        if one_hot and self.event_shape[-1:] != (count,):
            raise ValueError(
                f"One-hot vectors of {count} categories have event shape (..., {count}); got "
                f"{self.event_shape}."
            )
        self.grid = self.event_shape[:-1] if one_hot else self.event_shape
        if len(self.grid) > _MOST_AXES:
            raise ValueError(
                f"CategoricalHead takes codes of event shape (), (L,), (H, W) or (D, H, W); "
                f"got {self.grid}. Pass a head of your own for other shapes."
            )
        levels = self.grid[0] if len(self.grid) == _MOST_AXES else 1
        self.embedding = nn.Embedding(levels * count, width)
        shape = (1, *self.grid) if len(self.grid) == 1 else self.grid[-2:]  # a sequence is a row
        kind = ConvHead if self.grid else MLPHead
        self.head = kind(
            (width, *shape),
            context_shape=context_shape,
            width=width,
            depth=depth,
            dropout=dropout,
        )

    def fit_scale(self, z: Tensor | None, context: Tensor | None) -> None:
        """Sets the standardisation of the context; codes have none."""
        self.head.fit_scale(None, context)

    def rescale(self, slope: float, offset: float) -> None:
        """Replaces log r by slope · log r + offset, in place; the offset is in nats."""
        self.head.rescale(slope, offset)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns log r(z, c) in nats, with shape ``(*, B)``."""
        log_r: Tensor = self.head(self.embed(z), context)
        return log_r

    def embed(self, z: Tensor) -> Tensor:
        """Returns the features of codes, with shape ``(*, B, width)`` or ``(*, B, width, H, W)``."""
        z = checked_event(z, self.event_shape)
        if not self.one_hot and z.is_floating_point():
            raise TypeError(f"CategoricalHead takes codes, whole numbers; got {described(z)}.")
        if len(self.grid) == _MOST_AXES:
            tables = self.embedding.weight.reshape(self.grid[0], self.num_categories, -1)
            levels = z.unbind(-len(self.event_shape))
            pairs = zip(levels, tables, strict=True)
            h = torch.stack([self._look_up(*pair) for pair in pairs]).sum(0)
        else:
            h = self._look_up(z, self.embedding.weight)
        if len(self.grid) == 1:
            h = h.unsqueeze(-3)
        return h.movedim(-1, -3) if self.grid else h

    def _look_up(self, z: Tensor, table: Tensor) -> Tensor:
        """Embeddings from one table, with shape ``(*, width)``."""
        if self.one_hot:
            return z.to(table.dtype) @ table
        try:
            return nn.functional.embedding(z.long(), table)
        except IndexError as error:  # a GPU has an assertion of its own
            raise ValueError(
                f"CategoricalHead takes codes from 0 to {self.num_categories - 1}; got others."
            ) from error
