"""Pytrees of tensors: their rows, copies, and equality."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Tree: TypeAlias = Any  # a pytree of tensors whose first axis is the batch


def take(tree: Tree, rows: list[int]) -> Tree:
    """Returns some rows of every tensor."""
    return tree_map_only(Tensor, lambda t: t[rows], tree)


def clone(tree: Tree) -> Tree:
    """Returns a copy of every tensor."""
    return tree_map_only(Tensor, torch.clone, tree)


def same(a: Tree, b: Tree, tolerance: float = 0.0) -> bool:
    """Returns whether two pytrees are equal, floats up to a relative tolerance.

    Example:
        >>> same([torch.ones(2), "a"], [torch.ones(2), "a"]), same(torch.ones(2), torch.zeros(2))
        (True, False)
    """
    first, second = tree_leaves(a), tree_leaves(b)
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(_same(p, q, tolerance) for p, q in pairs)


def _same(a: Any, b: Any, tolerance: float) -> bool:  # noqa: ANN401
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(b[torch.isfinite(b)].abs().mean().nan_to_num()) if tolerance else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
