"""Checks of conditions: tensors of which every row belongs to a row of the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ncprior.utils.require import described


def tensors_of(tree: Any) -> list[Tensor]:  # noqa: ANN401
    """Returns the tensors in a condition or a batch."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


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
