"""Kinds of data: rows of tensors and arrays, datasets, batches; and the one gate for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sized
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ncprior.utils.batches import tensor_of
from ncprior.utils.require import described

_KINDS = "a tensor, an array, a dataset, a DataLoader or an iterable of batches"


class RowData:
    """Base class of data besides tensors that is indexed by a tensor of row numbers or a slice.

    Example:
        >>> from ncprior.data import Stream
        >>> class Squares(RowData):
        ...     device = torch.device("cpu")
        ...     def __len__(self):
        ...         return 10
        ...     def __getitem__(self, rows):
        ...         return torch.arange(10)[rows] ** 2
        >>> len(next(Stream(Squares(), batch_size=4)))
        4
    """

    device: torch.device

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, rows: Any) -> Any:  # noqa: ANN401
        """Returns rows."""
        raise NotImplementedError

    def prefetch(self, rows: Tensor) -> None:
        """Is called with the numbers of rows of a later batch; may begin to read them."""


class Rows(RowData):
    """Rows of a tensor or of an array, such as a memory-mapped file, without a copy of them all.

    Arguments:
        values: The tensor or array, with shape ``(N, ...)``.
        numbers: Numbers of the rows to use, in this order; ``None`` uses all.
    """

    def __init__(self, values: Tensor | np.ndarray, numbers: Tensor | None = None) -> None:
        self.values = values
        self.device = values.device if isinstance(values, Tensor) else torch.device("cpu")
        self.numbers = None if numbers is None else numbers.to(self.device)

    def __len__(self) -> int:
        return len(self.values if self.numbers is None else self.numbers)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Returns rows as a tensor; rows of a float64 array in torch's default dtype."""
        chosen = rows if self.numbers is None else self.numbers[rows]
        if isinstance(self.values, Tensor):
            return self.values[chosen]
        return tensor_of(self.values[chosen.numpy() if isinstance(chosen, Tensor) else chosen])

    def take(self, numbers: Tensor) -> Rows:
        """Returns some of these rows, by their numbers."""
        return Rows(self.values, numbers if self.numbers is None else self.numbers[numbers])


def as_data(data: Any) -> Any:  # noqa: ANN401
    """Returns data in a form that batches are made of: the gate of all that takes data.

    Tables, arrays and nested lists of numbers become :class:`Rows`; data sets of the package
    datasets, streamed or not, yield tensors; anything else stays.

    Raises:
        TypeError: If it is no data, or looks like rows where batches are expected.
    """
    if hasattr(data, "to_numpy"):  # a table of pandas or polars
        data = data.to_numpy()
    if hasattr(data, "with_format") and not _has_format(data):
        data = data.with_format("torch")
    if isinstance(data, list | tuple) and len(data) > 0:
        if _is_number(data[0]) or (_is_list(data[0]) and all(map(_is_number, data[0]))):
            data = _as_array(data)
        else:
            _require_batches(data)
    if isinstance(data, np.ndarray):
        data = Rows(_with_numbers(data))
    if isinstance(data, Tensor | Rows) and _ndim(data) == 0:
        raise TypeError(f"Data must have rows; got {described(data)}. Pass a batch of rows.")
    is_text = isinstance(data, str | bytes | os.PathLike | Mapping)
    if is_text or not (isinstance(data, RowData | Iterable) or is_map_style(data)):
        raise TypeError(
            f"Data must be {_KINDS}; got {described(data)}. Pass one of these; of batches or rows "
            f"that are dicts, a list of batches or a dataset."
        )
    return data


def _has_format(data: Any) -> bool:  # noqa: ANN401
    """Returns whether a data set of the package datasets has a format, such as torch, already."""
    if is_map_style(data):
        return bool(data.format["type"])
    return getattr(data, "_formatting", None) is not None  # a stream has nothing public


def column_names(data: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Returns the names of the columns of a table of pandas or polars; none of other data."""
    return tuple(map(str, getattr(data, "columns", ()))) if hasattr(data, "to_numpy") else ()


def is_map_style(data: Any) -> bool:  # noqa: ANN401
    """Returns whether data is a dataset with a length whose rows are taken by their number."""
    return (
        isinstance(data, Sized)
        and hasattr(data, "__getitem__")
        and not isinstance(data, DataLoader | IterableDataset | list | tuple | Mapping)
    )


def _require_batches(data: list[Any] | tuple[Any, ...]) -> None:
    """Validates that a list or tuple does not hold rows, or the columns of one data set."""
    first, second = (*data, None)[:2]
    if any(batch is None for batch in data):
        raise TypeError(f"A {type(data).__name__} must hold batches; got None among them.")
    single = isinstance(first, Tensor | np.ndarray) and first.ndim == 0
    if single or (_is_list(first) and any(map(_is_number, first))):
        raise TypeError(
            f"A list must hold batches; got single rows, of which the first is "
            f"{described(first)}. Pass DataLoader(data, batch_size, shuffle=True)."
        )
    if isinstance(first, Tensor | np.ndarray) and isinstance(second, Tensor | np.ndarray):
        unlike = (first.dtype, first.ndim) != (second.dtype, second.ndim)
        if unlike or (isinstance(data, tuple) and first.shape[1:] != second.shape[1:]):
            raise TypeError(
                f"A {type(data).__name__} must hold batches of one kind; got {described(first)} "
                f"and {described(second)}. Pass torch.utils.data.TensorDataset(x, y) for rows of "
                f"several parts."
            )


def _as_array(data: list[Any] | tuple[Any, ...]) -> np.ndarray:
    try:
        return np.array(data)
    except ValueError as error:
        raise TypeError(
            f"A list of numbers must be a table; got rows of different lengths. Pass {_KINDS}."
        ) from error


def _with_numbers(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise TypeError(
            f"An array or table must hold real numbers; got {described(array)}. Encode text and "
            f"categories as numbers, or pass only columns of numbers."
        )
    return array


def _ndim(data: Tensor | Rows) -> int:
    return data.ndim if isinstance(data, Tensor) else data.values.ndim


def _is_list(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list | tuple) and len(value) > 0


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Real | np.generic)
