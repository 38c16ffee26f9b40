"""Training data and held-out data for early stopping."""

from __future__ import annotations

from typing import Any

import torch

from ncprior.data.stream import iter_is_self, split


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
