"""Operations on batches: tensors in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from ncprior.utils.require import described

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_PINNED = 2**26  # bytes of the largest tensor that is copied through pinned memory, which is kept


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:  # noqa: ANN401
    """Returns a batch with a function applied to every tensor in it.

    Mappings and dataclasses that are no pytrees to torch, such as the ``UserDict`` of a tokenizer
    or the batches of pythae, keep their type. Arrays of numbers become tensors.

    Arguments:
        function: The function.
        batch: A tensor or array, or tensors in tuples, lists, mappings, dataclasses or pytrees of torch.

    Example:
        >>> from collections import UserDict
        >>> batch = map_tensors(torch.exp, (UserDict(image=torch.zeros(1)), "a name"))
        >>> batch[0]["image"], batch[1]
        (tensor([1.]), 'a name')
    """
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "fiub":
        return function(tensor_of(batch))
    if isinstance(batch, Mapping):
        return _refilled(batch, {k: map_tensors(function, v) for k, v in batch.items()})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch) if field.init]
        values = {name: map_tensors(function, getattr(batch, name)) for name in names}
        return dataclasses.replace(batch, **values)
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        return type(batch)([map_tensors(function, item) for item in batch])
    if isinstance(batch, tuple):
        return type(batch)(*(map_tensors(function, item) for item in batch))
    return tree_map_only(Tensor, function, batch)


def tensors_of(batch: Any) -> list[Tensor]:  # noqa: ANN401
    """Returns the tensors in a batch, or in a condition, in order.

    Example:
        >>> tensors_of(("a name", {"x": torch.zeros(2)}))
        [tensor([0., 0.])]
    """
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(add, batch)
    return found


def is_finite(batch: Any) -> bool:  # noqa: ANN401
    """Returns whether no number in the tensors of a batch is NaN or infinite; waits for a GPU.

    Sparse, nested and quantised tensors are not looked at.

    Example:
        >>> is_finite((torch.zeros(2), "a name")), is_finite([torch.tensor(torch.inf)])
        (True, False)
    """
    numbers = (
        x
        for x in tensors_of(batch)
        if x.dtype in _FLOATS and x.layout == torch.strided and not x.is_nested
    )
    return all(bool(x.isfinite().all()) for x in numbers)


def to_device(batch: Any, device: torch.device) -> Any:  # noqa: ANN401
    """Returns a batch with every tensor in it on a device.

    Example:
        >>> to_device({"image": torch.zeros(2)}, torch.device("meta"))["image"].device
        device(type='meta')
    """
    return map_tensors(lambda t: moved(t, device), batch)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; a copy to a GPU does not wait for it.

    Example:
        >>> moved(torch.zeros(2), torch.device("meta")).device
        device(type='meta')
    """
    if device.type != "cuda":  # a copy to the CPU could be read before it has arrived
        return tensor.to(device)
    if tensor.device.type == "cpu" and tensor.nbytes <= _PINNED:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def own_batch(x: Any, device: torch.device, name: str = "x") -> Any:  # noqa: ANN401
    """Returns one batch of a user on a device, with arrays and tables of numbers as tensors.

    Arguments:
        x: One batch, as the user's loader yields it, or a list of numbers, such as labels; arrays of
            float64, the default of NumPy, are converted to torch's default dtype.
        device: The device.
        name: Its name in messages.

    Raises:
        TypeError: If x is no batch, such as a ``DataLoader``.
        ValueError: If x has no rows.

    Example:
        >>> own_batch([np.zeros((5, 3)), "labels"], torch.device("cpu"))[0].dtype
        torch.float32
    """
    if x is None or isinstance(x, type | str | Number | DataLoader | Dataset):
        remedy = "Take one batch, next(iter(loader)) or dataset[:256]."
        if name != "x":
            remedy = "Pass tensors with one row per row of the batch."
        raise TypeError(
            f"{name} must be one batch, a tensor or what a DataLoader yields; got {described(x)}. {remedy}"
        )
    x = x.to_numpy() if hasattr(x, "to_numpy") else x
    if isinstance(x, list) and x and all(isinstance(row, Number) for row in x):
        x = np.array(x)
    x = to_device(x, device)
    if isinstance(x, Tensor) and (x.ndim == 0 or len(x) == 0):
        raise ValueError(
            f"{name} must have 1 or more rows; got {described(x)}. Pass rows of data."
        )
    return x


def take_rows(batch: Any, rows: slice | Tensor) -> Any:  # noqa: ANN401
    """Returns some rows of every tensor of a batch; tensors without axes stay."""

    def take(t: Tensor) -> Tensor:
        if t.ndim == 0:
            return t
        return t[rows.to(t.device) if isinstance(rows, Tensor) else rows]

    return map_tensors(take, batch)


def shuffle_rows(batch: Any, count: int, generator: torch.Generator) -> Any:  # noqa: ANN401
    """Returns a batch with its rows in random order, the same for all of its tensors.

    For batches whose rows are divided: in data whose classes take turns, every other row is of one class.

    Arguments:
        batch: The batch; tensors without axes stay.
        count: Number of its rows.
        generator: Source of the order, on the CPU.

    Example:
        >>> batch = {"x": torch.arange(4), "label": torch.arange(4)}
        >>> mixed = shuffle_rows(batch, 4, torch.Generator().manual_seed(0))
        >>> bool((mixed["x"] == mixed["label"]).all()), sorted(mixed["x"].tolist())
        (True, [0, 1, 2, 3])
    """
    return take_rows(batch, torch.randperm(count, generator=generator, device="cpu"))


def tile_rows(batch: Any, count: int) -> Any:  # noqa: ANN401
    """Returns a batch with all of its rows repeated, one copy after the other.

    Example:
        >>> tile_rows({"x": torch.tensor([1, 2])}, 2)["x"]
        tensor([1, 2, 1, 2])
    """
    return map_tensors(lambda t: t.repeat(count, *(1,) * (t.ndim - 1)) if t.ndim else t, batch)


def tensor_of(array: np.ndarray) -> Tensor:
    """Returns an array of numbers as a tensor; float64 becomes torch's default dtype, at least float32.

    Example:
        >>> tensor_of(np.zeros(2)).dtype
        torch.float32
    """
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    if array.dtype.kind == "f" and array.dtype.itemsize > dtype.itemsize:
        array = array.astype(str(dtype).removeprefix("torch."))
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _refilled(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the same type with other values; a plain dict where it cannot be changed."""
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return values
    new = copy(batch)
    for key, value in values.items():
        new[key] = value
    return new


def data_of(batch: Any) -> Tensor:  # noqa: ANN401
    """Returns the data x of a batch: the batch itself, or the first item of a tuple or a mapping.

    Raises:
        TypeError: If that is no tensor of real numbers.
        ValueError: If it is empty.
    """
    x = batch
    if isinstance(batch, Mapping):
        x = next(iter(batch.values()), None)
    elif isinstance(batch, tuple | list):
        x = batch[0] if batch else None
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(
            f"A batch must be a tensor x of real numbers, or a tuple or mapping whose first item is "
            f"x; got {described(batch)} with {described(x)}. Pass such batches."
        )
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"A batch must have 1 or more rows of x; got {described(x)}.")
    return x
