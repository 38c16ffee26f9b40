"""Ratio heads of every kind, with latents and contexts that fit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ncprior.heads.codes import CategoricalHead
from ncprior.heads.networks import ConvHead, MLPHead

ROWS = 3
CODES = 11


class Case(NamedTuple):
    """A head and what it takes."""

    make: Callable[[], nn.Module]
    event: tuple[int, ...]
    context: tuple[int, ...] | None
    codes: bool = False
    one_hot: bool = False

    def z(self, *lead: int) -> Tensor:
        """Latents of shape (*lead, ROWS, *event)."""
        shape = (*lead, ROWS, *self.event)
        if self.one_hot:
            return nn.functional.one_hot(torch.randint(CODES, shape[:-1]), CODES).float()
        return torch.randint(CODES, shape) if self.codes else torch.randn(shape)

    def c(self) -> Tensor | None:
        """A context of shape (ROWS, ...)."""
        return None if self.context is None else torch.randn(ROWS, *self.context)


def mlp(event: tuple[int, ...], context: tuple[int, ...] | None) -> Case:
    return Case(lambda: MLPHead(event, context_shape=context, width=16), event, context)


def conv(event: tuple[int, ...], context: tuple[int, ...] | None, width: int = 16) -> Case:
    return Case(lambda: ConvHead(event, context_shape=context, width=width), event, context)


def categorical(event: tuple[int, ...], context: tuple[int, ...] | None) -> Case:
    return Case(
        lambda: CategoricalHead(event, CODES, context_shape=context, width=16),
        event,
        context,
        codes=True,
    )


def one_hot(grid: tuple[int, ...], context: tuple[int, ...] | None) -> Case:
    event = (*grid, CODES)
    return Case(
        lambda: CategoricalHead(event, CODES, one_hot=True, context_shape=context, width=16),
        event,
        context,
        one_hot=True,
    )


CASES = {
    "vector": mlp((5,), None),
    "vector, context": mlp((5,), (7,)),
    "vector, map as context": mlp((5,), (2, 3, 3)),
    "scalar": mlp((), None),
    "scalar, context": mlp((), (4,)),
    "matrix": mlp((2, 3), (4,)),
    "map 1x1": conv((4, 1, 1), None),
    "map 1x1, map context": conv((4, 1, 1), (6, 1, 1)),
    "map 2x3": conv((1, 2, 3), (5,)),
    "map 4x4, map context": conv((4, 4, 4), (6, 4, 4)),
    "map 4x4, other map as context": conv((4, 4, 4), (6, 2, 2)),
    "map 8x8": conv((4, 8, 8), None),
    "map 17x9": conv((2, 17, 9), None),
    "map 17x9, map context": conv((2, 17, 9), (3, 17, 9)),
    "map 33x1": conv((2, 33, 1), (4,)),
    "code": categorical((), None),
    "code, context": categorical((), (4,)),
    "grid": categorical((3, 2), None),
    "grid 1x1": categorical((1, 1), (4,)),
    "grid, map context": categorical((9, 9), (2, 9, 9)),
    "sequence": categorical((3,), None),
    "sequence of 20, context": categorical((20,), (4,)),
    "levels of grids, map context": categorical((2, 3, 2), (2, 3, 2)),
    "levels of sequences": categorical((2, 1, 12), None),
    "one-hot vector, context": one_hot((), (4,)),
    "one-hot sequence": one_hot((3,), None),
    "one-hot levels of grids": one_hot((2, 3, 2), (4,)),
}


def trained(head: nn.Module) -> nn.Module:
    """A head whose every parameter has been moved."""
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return head
