"""Training data and held-out data for early stopping."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import Subset

from ncprior.data.batches import iter_is_self
from ncprior.data.rows import Rows, as_data, is_map_style
from ncprior.utils.random_state import permutation
from ncprior.utils.require import require_counts, require_numbers


@overload
def split(data: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]: ...


@overload
def split(data: Any, fraction: float, seed: int) -> tuple[Any, Any] | None: ...  # noqa: ANN401


def split(data: Any, fraction: float, seed: int) -> tuple[Any, Any] | None:
    """Splits a tensor or a map-style dataset, shuffled, into a training and a held-out part.

    Arguments:
        data: The data, as for :class:`Stream`. Rows of an array are not copied.
        fraction: Fraction of held-out rows, between 0 and 1; there is at least one.
        seed: Seed of the shuffle.

    Returns:
        The two parts, or ``None`` for data without an index.

    Example:
        >>> [len(part) for part in split(torch.arange(100), 0.05, seed=0)]
        [95, 5]
    """
    require_numbers("(0, 1)", fraction=fraction)
    require_counts("(-1e18, 1e18)", seed=seed)
    data = as_data(data)
    if not isinstance(data, Tensor) and not is_map_style(data):
        return None
    rows = permutation(len(data), seed)
    count = max(1, round(fraction * len(data)))
    if count >= len(data):
        raise ValueError(f"{len(data)} rows cannot be split. Pass held_out= or more data.")
    held_out, train = rows[:count], rows[count:]
    if isinstance(data, Tensor):
        return data[train.to(data.device)], data[held_out.to(data.device)]
    if isinstance(data, Rows):
        return data.take(train), data.take(held_out)
    return Subset(data, train.tolist()), Subset(data, held_out.tolist())


def with_held_out(name: str, data: Any, held_out: Any = None) -> tuple[Any, Any]:  # noqa: ANN401
    """Returns training data and held-out data, which are 5 % of the data if none are given.

    Arguments:
        name: The trained model with its article, for messages.
        data: The data, as for :class:`~ncprior.data.Stream`.
        held_out: The held-out data, or ``None``.

    Raises:
        TypeError: If the data can be read only once.
        ValueError: If nothing is given and nothing can be held out.
    """
    if iter_is_self(data):
        raise TypeError(
            f"{name} reads its data many times; got a one-shot {type(data).__name__}. Pass a "
            f"tensor, a dataset, a DataLoader or a list of batches."
        )
    if held_out is not None:
        return data, held_out
    both: tuple[Any, Any] | None = split(data, 0.05, seed=int(torch.randint(2**31, ())))
    if both is None:
        raise ValueError(
            f"No rows of a {type(data).__name__} can be held out. Pass held_out=, or a tensor or "
            f"map-style dataset."
        )
    return both
