"""Checks of conditions: tensors of which every row belongs to a row of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncprior.utils.batches import tensors_of
from ncprior.utils.require import described


def require_condition(c: Any, rows: int, *, is_taken: bool) -> None:  # noqa: ANN401
    """Validates that a condition is given exactly where a source takes one, with so many rows.

    Raises:
        TypeError: If it holds no tensor.
        ValueError: If there is none or one too many, or it has other rows.
    """
    if (c is None) == is_taken:
        needs, got = ("needs a", "none") if c is None else ("takes no", "one")
        raise ValueError(
            f"This source {needs} condition; got {got}. A condition is picked out of a batch by the "
            f"source's argument condition=, and given to sample(..., condition=...)."
        )
    if c is None:
        return
    require_tensors(c)
    for leaf in tensors_of(c):
        if leaf.shape[:1] != (rows,):
            got = f"{len(leaf)} rows" if leaf.ndim > 0 else "a single number"
            raise ValueError(f"The walk has {rows} rows; got {got} of condition.")


def require_tensors(c: Any) -> None:  # noqa: ANN401
    """Validates that a condition holds a tensor.

    Raises:
        TypeError: If it holds none.
    """
    if not tensors_of(c):
        raise TypeError(
            f"A condition must be a tensor, or tensors in a tuple or dict, with one row per row "
            f"of the batch; got {described(c)}. Embed texts, and number the classes of names."
        )


def require_rows_of_x(c: Any, x: Any) -> None:  # noqa: ANN401
    """Validates that a condition has the rows of x, where x has one number of rows.

    Raises:
        ValueError: If it has others.
    """
    rows = {len(leaf) for leaf in tensors_of(x) if leaf.ndim > 0}
    found = {leaf.shape[:1].numel() if leaf.ndim else 0 for leaf in tensors_of(c)}
    if c is not None and len(rows) == 1 and found != rows:
        raise ValueError(
            f"condition(batch) must return one row per row of x; got {max(found)} rows for "
            f"{rows.pop()} of x. Batches must hold the condition, as those of TensorDataset(x, c) do."
        )


def called(name: str, function: Callable[..., Any], c: Any, *before: Tensor) -> Any:  # noqa: ANN401
    """Returns a function of a condition, and of the latents before; its error names the condition.

    Raises:
        ValueError: If the function fails.
    """
    try:
        return function(c, *before)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        got = ", ".join(map(described, tensors_of(c)[:2]))
        raise ValueError(
            f"{name} failed on a condition, {got}. Check its values, shape and dtype: classes are "
            f"whole numbers from 0, as in labels.long(). {str(error).partition(chr(10))[0]}"
        ) from error


def context_of(function: Callable[..., Any], c: Any, *before: Tensor, rows: int) -> Tensor:  # noqa: ANN401
    """Returns the context of a head, with shape ``(B, ...)``, from a condition and the latents before.

    Raises:
        ValueError: If the function fails, or returns something else.
    """
    seen = called("context(c)", function, c, *before)
    if not isinstance(seen, Tensor) or seen.is_complex() or seen.shape[:1] != (rows,):
        raise ValueError(
            f"context(c) must return one tensor of real numbers, with one row for each of the "
            f"{rows} rows of c; got {described(seen)}."
        )
    return seen
