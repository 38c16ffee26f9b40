"""Switches: one bool per group, and contexts in which an object is off for its own thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from ncprior.utils.require import described


class Switches(Sequence[bool]):
    """A list of bools of fixed length, whose items can be set.

    Arguments:
        name: The name in error messages.
        values: The bools, also of NumPy or as a tensor.
        count: The required number of them.

    Raises:
        TypeError: If a value is not True or False.
        ValueError: If the number of values is wrong.

    Example:
        >>> active = Switches("active", [True, True], 2)
        >>> active[1] = False
        >>> active
        [True, False]
    """

    def __init__(self, name: str, values: Iterable[Any], count: int) -> None:
        if hasattr(values, "tolist"):  # an array or a tensor
            values = values.tolist()
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"{name} must be a list of {count} bools; got {described(values)}.")
        values = list(values)
        for value in values:
            if not isinstance(value, bool | np.bool_):
                raise TypeError(
                    f"{name} must be a list of {count} bools, True or False per group; "
                    f"got {described(value)} in it."
                )
        if len(values) != count:
            raise ValueError(
                f"{name} must have one bool per group: there are {count} groups, got {len(values)}."
            )
        self._name, self._values = name, [bool(value) for value in values]

    def __getitem__(self, i: Any) -> Any:  # noqa: ANN401
        return self._values[i]

    def __setitem__(self, i: Any, value: Any) -> None:  # noqa: ANN401
        values: list[Any] = list(self._values)
        values[i] = value
        self._values = Switches(self._name, values, len(self))._values

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return self._values == (other._values if isinstance(other, Switches) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._values)


_OFF: ContextVar[tuple[int, ...]] = ContextVar("off", default=())


@contextmanager
def switched_off(thing: object) -> Iterator[None]:
    """Context in which :func:`is_switched_off` is true of an object, in this thread or task alone."""
    _OFF.set((*_OFF.get(), id(thing)))
    try:
        yield
    finally:
        left = list(_OFF.get())
        left.remove(id(thing))
        _OFF.set(tuple(left))


def is_switched_off(thing: object) -> bool:
    """Returns whether the current thread is inside :func:`switched_off` of this object."""
    return id(thing) in _OFF.get()
