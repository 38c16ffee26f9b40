"""Rows of tables, arrays and tensors as features, with equal columns for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncprior.evaluation.metrics import checked
from ncprior.utils.precision import at_least_float32
from ncprior.utils.require import described

_MOST_CATEGORIES = 1000  # of one column


def features_of(**rows: Any) -> list[Tensor]:  # noqa: ANN401
    """Returns the rows of several tables as features with equal columns, ``(N, F)`` each, in float64.

    Numbers in tensors and arrays are features as they are; more axes are flattened. In a table, which is a DataFrame or an
    array of objects, a column of numbers is divided by its standard deviation in the first table,
    and a column with texts in any table is one of categories: two rows with different categories
    have distance 1 there.

    Arguments:
        rows: The tables by name of the argument.

    Raises:
        TypeError: If one has no rows of numbers or categories.
        ValueError: If the columns differ, a value is missing, NaN or infinite, there are fewer
            than two rows, or a column has too many categories.
    """
    _check_names({name: getattr(value, "columns", None) for name, value in rows.items()})
    arrays = {name: _array(value) for name, value in rows.items()}
    if any(_is_table(value) for value in (*rows.values(), *arrays.values())):
        arrays = _encoded({name: _as_numpy(value) for name, value in arrays.items()})
    first, *others = arrays.items()
    like = checked(first[1], first[0])
    return [like, *(checked(value, name, like=like) for name, value in others)]


def _array(value: Any) -> Any:  # noqa: ANN401
    """Returns a table as an array, truth values as 0 and 1, and events of more axes as flat."""
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        value = value.byte()
    if isinstance(value, np.ndarray) and value.dtype == bool:
        value = value.astype(np.uint8)
    if isinstance(value, Tensor | np.ndarray) and value.ndim > 2 and len(value) > 0:
        return value.reshape(len(value), -1)
    return value


def _as_numpy(value: Any) -> Any:  # noqa: ANN401
    """Rows beside a table, which may be a tensor or a list, as an array."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    return at_least_float32(value).detach().cpu().numpy()


def _is_table(value: Any) -> bool:  # noqa: ANN401
    return hasattr(value, "columns") or (
        isinstance(value, np.ndarray) and value.dtype.kind in "OSU"
    )


def _check_names(names: dict[str, Any]) -> None:
    """Validates that the tables that name their columns name them equally."""
    given = {
        name: [str(c) for c in columns] for name, columns in names.items() if columns is not None
    }
    for name, columns in given.items():
        first = next(iter(given))
        if columns != given[first]:
            raise ValueError(
                f"{first} and {name} must have the same columns in the same order; got "
                f"{given[first]} and {columns}. Pass {name}[{first}.columns]."
            )


def _encoded(tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tables, ``(N, C)``, as features, ``(N, F)``."""
    widths = {table.shape[1:] for table in tables.values()}
    if len(widths) > 1 or any(table.ndim != 2 for table in tables.values()):
        shapes = {name: table.shape for name, table in tables.items()}
        raise ValueError(f"All tables must be (N, C) with the same columns; got shapes {shapes}.")
    ends = np.cumsum([len(table) for table in tables.values()])
    pooled = np.concatenate([table.astype(object) for table in tables.values()])
    columns = [_column(f"column {c}", values, ends[0]) for c, values in enumerate(pooled.T)]
    parts = np.split(np.concatenate(columns, axis=1), ends[:-1]) if columns else tables.values()
    return dict(zip(tables, parts, strict=True))


def _column(name: str, values: np.ndarray, num_first: int) -> np.ndarray:
    """Features of one column: numbers, ``(N, 1)``, or one per category, ``(N, categories)``."""
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError):
        return _categories(name, values)
    if any(isinstance(value, str) for value in values):  # such as zip codes
        return _categories(name, values)
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{name} has missing values, NaN or infinity. Fill them, or remove these rows."
        )
    spread = numbers[:num_first].std()
    scaled: np.ndarray = numbers[:, None] / (spread if spread > 0 else 1.0)
    return scaled


def _categories(name: str, values: np.ndarray) -> np.ndarray:
    missing = [value for value in values if _is_missing(value)]
    if missing:
        raise ValueError(
            f"{name} has {len(missing)} missing values, such as {described(missing[0])}. Fill "
            f"them, for instance with a category of their own."
        )
    labels, codes = np.unique(values.astype(str), return_inverse=True)
    if len(labels) > _MOST_CATEGORIES:
        raise ValueError(
            f"{name} has {len(labels)} different texts, such as {labels[0]!r:.60}; at most "
            f"{_MOST_CATEGORIES} are categories. Drop it, or convert it to numbers."
        )
    hot = np.zeros((len(values), len(labels)))
    hot[np.arange(len(values)), codes] = 0.5**0.5  # a distance of 1 from another category
    return hot


def _is_missing(value: Any) -> bool:  # noqa: ANN401
    return not isinstance(value, str) and str(value) in ("None", "nan", "NaT", "<NA>")
