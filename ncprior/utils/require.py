"""The gate for arguments: counts, numbers, choices, objects and tensors of public functions.

Every error names the argument, its allowed values, the given value and the remedy. A value of
the wrong type raises a TypeError, a value out of range a ValueError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")

_READ: WeakSet[nn.Module] = WeakSet()  # models whose first batch on a GPU has been read


def require_counts(interval: str = "[1, inf)", /, **counts: Any) -> None:  # noqa: ANN401
    """Validates whole numbers.

    Arguments:
        interval: The allowed interval in the notation of mathematics, such as ``"[0, inf)"``; with
            ``" or None"`` behind it, ``None`` is allowed too.
        counts: The values by name of the argument.

    Raises:
        TypeError: If a value is not a whole number: ``2.0`` and ``True`` are not.
        ValueError: If a value is outside the interval.
    """
    asked = f"a whole number in {interval}"
    for name, value in counts.items():
        if value is None and interval.endswith(" or None"):
            continue
        if not _is_whole(value):
            raise TypeError(f"{name} must be {asked}; got {described(value)}. Pass an int.")
        _require_within(interval, name, operator.index(value), asked)


def require_numbers(interval: str = "(-inf, inf)", /, **numbers: Any) -> None:  # noqa: ANN401
    """Validates real numbers; NaN is in no interval, infinity only in one that is closed there.

    Arguments:
        interval: The allowed interval, as in :func:`require_counts`, such as ``"(0, 1]"``.
        numbers: The values by name of the argument.

    Raises:
        TypeError: If a value is not a real number: ``True``, a string or a tensor are not.
        ValueError: If a value is outside the interval.
    """
    asked = f"a number in {interval}"
    for name, value in numbers.items():
        if value is None and interval.endswith(" or None"):
            continue
        if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be {asked}; got {described(value)}. Pass a float.")
        _require_within(interval, name, _as_float(value), asked)


def _as_float(value: Real) -> float:
    """A number as a float; infinity, if it is larger than all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def require_flags(**flags: Any) -> None:  # noqa: ANN401
    """Validates that values, by name of the argument, are ``True`` or ``False``."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {described(value)}.")


def require_choice(name: str, value: Any, choices: Iterable[Any]) -> None:  # noqa: ANN401
    """Validates that a value is one of a few.

    Raises:
        ValueError: If it is none of them.
    """
    choices = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {listed}; got {described(value)}.")


def require_instance(
    name: str,
    value: Any,  # noqa: ANN401
    kinds: type[T] | tuple[type[T], ...],
    remedy: str,
) -> T:
    """Returns an object after a check that it is of a type, or of one of several.

    Arguments:
        name: The argument.
        value: The object.
        kinds: The type or types.
        remedy: Remedy for the message, a whole sentence.

    Raises:
        TypeError: If it is of none of the types; the message says so of a class, too.
    """
    if not isinstance(value, kinds):
        names = [kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
        raise TypeError(
            f"{name} must be of type {' or '.join(names)}; got {described(value)}. {remedy}"
        )
    return value


def require_callable(name: str, value: Any, remedy: str) -> None:  # noqa: ANN401
    """Validates that an object can be called and is no class; a module must have ``forward``.

    Raises:
        TypeError: If it cannot, is a class, or is a module without ``forward``.
    """
    without = isinstance(value, nn.Module) and type(value).forward is nn.Module.forward
    if not callable(value) or isinstance(value, type) or without:
        raise TypeError(f"{name} must be a function; got {described(value)}. {remedy}")


def real_tensor(
    name: str,
    value: Any,  # noqa: ANN401
    *,
    ndim: int | None = None,
    rows: int = 1,
    integers: bool = True,
    infinite: bool = False,
    exact: bool = False,
) -> Tensor:
    """Returns finite real numbers as a tensor of floats, from a tensor, an array or a list.

    Arguments:
        name: The argument.
        value: Numbers with shape ``(N, ...)``.
        ndim: The required number of dimensions, or ``None`` for 1 or more.
        rows: The least number N of rows.
        integers: Whether whole numbers are converted to float32; otherwise they raise an error.
        infinite: Whether infinite values are allowed, as for scores; NaN never is.
        exact: Whether whole numbers become float64, on the CPU where the device has none.

    Returns:
        The tensor; a tensor of floats is returned as it is.

    Raises:
        TypeError: If it holds no real numbers.
        ValueError: If its shape is wrong, or a value is NaN or infinite.
    """
    x = _with_values(name, value)
    if x.is_complex() or x.dtype == torch.bool or not (x.is_floating_point() or integers):
        wanted = "real numbers" if integers else "floating-point numbers"
        remedy = (
            "" if integers else " Convert numbers that are no codes of categories by .float()."
        )
        raise TypeError(f"{name} must be {wanted}; got {described(x)}.{remedy}")
    if not x.is_floating_point():
        x = x.cpu() if exact and x.device.type == "mps" else x
        x = x.double() if exact else x.float()
    wrong_ndim = x.ndim < 1 if ndim is None else x.ndim != ndim
    if wrong_ndim or len(x) < rows or (rows > 0 and x.numel() == 0):
        dims = "1 or more dimensions" if ndim is None else f"{ndim} dimensions"
        raise ValueError(f"{name} must have {dims} and {rows} or more rows; got {described(x)}.")
    require_finite(name, x.nan_to_num(math.nan, 0.0, 0.0) if infinite else x)
    return x


def numbers(name: str, value: Any, *, rows: int = 1) -> Tensor:  # noqa: ANN401
    """Returns finite real numbers or codes, from a tensor, an array or a list, in their own dtype.

    Arguments:
        name: The argument.
        value: Numbers with shape ``(N, ...)``.
        rows: The least number N of rows.

    Raises:
        TypeError: If it holds no real numbers.
        ValueError: If it has fewer rows, or a value is NaN or infinite.
    """
    x = _with_values(name, value)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers or codes; got {described(x)}.")
    if x.ndim < 1 or len(x) < rows or (rows > 0 and x.numel() == 0):
        raise ValueError(f"{name} must have {rows} or more rows; got {described(x)}.")
    require_finite(name, x)
    return x


def mask_of(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:  # noqa: ANN401
    """Returns a mask, a tensor of booleans, from a tensor, an array or a list.

    Arguments:
        name: The argument.
        value: The mask.
        shape: The required shape.

    Raises:
        TypeError: If it holds no booleans.
        ValueError: If it has another shape.
    """
    x = _as_tensor(name, value)
    if x.dtype != torch.bool or x.is_meta:
        raise TypeError(f"{name} must be a mask of True and False; got {described(x)}.")
    if x.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {described(x)}.")
    return x


def floats(name: str, value: Any) -> Tensor:  # noqa: ANN401
    """Returns real numbers as a tensor of floats, without a look at the values.

    Raises:
        TypeError: If it holds no real numbers.
    """
    x = _as_tensor(name, value)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers; got {described(x)}.")
    return x if x.is_floating_point() else x.float()


def require_positive(name: str, x: Tensor) -> None:
    """Validates that a tensor is positive and finite; waits for a GPU, and passes meta tensors.

    Raises:
        ValueError: If it is not.
    """
    if not x.is_meta and not ((x > 0) & torch.isfinite(x)).all():
        raise ValueError(f"{name} must be positive and finite everywhere; got other values.")


def require_finite(name: str, x: Tensor) -> None:
    """Validates that a tensor of shape ``(N, ...)`` has no NaN and no infinity; waits for a GPU.

    Tensors on the meta device, which have no values, pass.

    Raises:
        ValueError: If it has; the message counts the rows.
    """
    if x.is_meta:
        return
    wrong = ~torch.isfinite(x)
    if wrong.any():
        rows = int(wrong.flatten(1).any(1).sum()) if x.ndim > 1 else int(wrong.sum())
        raise ValueError(
            f"{name} must be finite; got NaN or infinity in {rows} of {len(x) if x.ndim else 1} "
            f"rows. Remove or mend these rows."
        )


def require_shape(name: str, shape: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Returns a shape as a tuple of whole numbers of at least 1, after a check.

    Arguments:
        name: The argument.
        shape: The shape.

    Raises:
        TypeError: If it is no list of whole numbers.
        ValueError: If a size is below 1.
    """
    sized = hasattr(shape, "__len__") and getattr(shape, "ndim", 1) == 1
    if isinstance(shape, str | bytes | Mapping) or not (sized and isinstance(shape, Iterable)):
        raise TypeError(
            f"{name} must be a list of whole numbers, such as (16,); got {described(shape)}."
        )
    sizes = tuple(shape)
    require_counts(**{f"{name}[{i}]": size for i, size in enumerate(sizes)})
    return tuple(operator.index(size) for size in sizes)


def tensor_of_batch(x: Any) -> Tensor:  # noqa: ANN401
    """Returns x of a batch, a tensor or an array itself, or the first item of a tuple or list.

    Raises:
        TypeError: If x is neither a tensor nor an array.
        ValueError: If it has no rows, or rows without numbers.
    """
    tensor = _as_tensor("x", x[0] if isinstance(x, tuple | list) and len(x) > 0 else x)
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise ValueError(f"x must have 1 or more rows of numbers; got {described(tensor)}.")
    return tensor


def floats_of_batch(
    whose: str,
    x: Any,  # noqa: ANN401
    remedy: str,
    limits: tuple[float, float] | None = None,
    model: nn.Module | None = None,
    check: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Returns x of a batch as :func:`tensor_of_batch`, after a check that it holds floats in a range.

    Arguments:
        whose: The source or model, for the message.
        x: The batch.
        remedy: Remedy for numbers of another kind or range, for the message, a whole sentence.
        limits: The least and the largest number that x may hold, or ``None``; waits for a GPU.
        model: A model, of which only the first batch on a GPU is compared with the limits: no
            later batch waits.
        check: A further validation of the numbers, made where they are compared with the limits.

    Raises:
        TypeError: If x is neither a tensor nor an array.
        ValueError: If it has no rows, holds no floats, a number outside the range, or NaN.
    """
    tensor = tensor_of_batch(x)
    if not tensor.is_floating_point():
        raise ValueError(f"{whose} takes x as floats; got {described(tensor)}. {remedy}")
    if model is not None and tensor.device.type != "cpu":
        limits = None if model in _READ else limits
    if limits is not None and tensor.numel() > 0:
        least, most = torch.stack(tensor.detach().aminmax()).tolist()  # one synchronisation
        if not limits[0] <= least <= most <= limits[1]:
            require_finite("x", tensor)
            raise ValueError(
                f"{whose} takes x in [{limits[0]:g}, {limits[1]:g}]; got numbers from {least:.4g} "
                f"to {most:.4g}. {remedy}"
            )
        if check is not None:
            check(tensor)
    if model is not None and limits is not None and tensor.device.type != "cpu":
        _READ.add(model)
    return tensor


def described(value: Any) -> str:  # noqa: ANN401
    """Returns a short description of an object for an error message, on one line."""
    match value:
        case type():
            return f"the class {value.__name__}"
        case Tensor():
            kind = "meta " if value.is_meta else "sparse " if _is_sparse(value) else ""
            dtype = str(value.dtype).removeprefix("torch.")
            return f"a {kind}tensor of {dtype}, {tuple(value.shape)}"
        case np.ndarray():
            return f"an array of {value.dtype}, {value.shape}"
        case None | bool() | int() | float() | complex() | str() | np.generic() | torch.dtype():
            text = repr(value)
            return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return f"an object of type {type(value).__name__}"


_LONGEST = 60  # characters of a value in a message


def _is_sparse(x: Tensor) -> bool:
    return x.layout is not torch.strided


def _with_values(name: str, value: Any) -> Tensor:  # noqa: ANN401
    x = _as_tensor(name, value)
    if x.is_meta:
        raise ValueError(f"{name} must have values; got {described(x)}.")
    return x


def _as_tensor(name: str, value: Any) -> Tensor:  # noqa: ANN401
    if isinstance(value, Tensor) and _is_sparse(value):
        raise TypeError(f"{name} must be dense; got {described(value)}. Pass its to_dense().")
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "to_numpy"):  # a table of pandas or polars
        value = value.to_numpy()
    try:
        if isinstance(value, list | tuple) and any(isinstance(row, Tensor) for row in value):
            return torch.stack(list(value))
        if isinstance(value, np.ndarray | list | tuple | Real):
            return torch.from_numpy(np.array(value))  # a copy: arrays may be read-only
    except (RuntimeError, TypeError, ValueError):
        pass
    raise TypeError(
        f"{name} must be a tensor or an array of numbers; got {described(value)}. Pass a tensor."
    )


def _is_whole(value: Any) -> bool:  # noqa: ANN401
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool | np.ndarray)


def _require_within(interval: str, name: str, value: float, asked: str) -> None:
    """Validates a value against an interval such as ``[0, 1)``, with or without `` or None``."""
    bounds = interval.removesuffix(" or None")
    low, high = (float(bound) for bound in bounds[1:-1].split(","))
    above = value >= low if bounds[0] == "[" else value > low
    below = value <= high if bounds[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} must be {asked}; got {described(value)}.")
