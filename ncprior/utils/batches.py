"""Operations on batches: tensors in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:  # noqa: ANN401
    """Returns a batch with a function applied to every tensor in it.

    Mappings and dataclasses that are no pytrees to torch, such as the ``UserDict`` of a tokenizer
    or the batches of pythae, keep their type.

    Arguments:
        function: The function.
        batch: A tensor, or tensors in tuples, lists, mappings, dataclasses or pytrees of torch.

    Example:
        >>> from collections import UserDict
        >>> batch = map_tensors(torch.exp, (UserDict(image=torch.zeros(1)), "a name"))
        >>> batch[0]["image"], batch[1]
        (tensor([1.]), 'a name')
    """
    if isinstance(batch, Mapping):
        return _refilled(batch, {k: map_tensors(function, v) for k, v in batch.items()})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch) if field.init]
        values = {name: map_tensors(function, vars(batch)[name]) for name in names}
        return dataclasses.replace(batch, **values)
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        return type(batch)([map_tensors(function, item) for item in batch])
    if isinstance(batch, tuple):
        return type(batch)(*(map_tensors(function, item) for item in batch))
    return tree_map_only(Tensor, function, batch)


def to_device(batch: Any, device: torch.device) -> Any:  # noqa: ANN401
    """Returns a batch with every tensor in it on a device.

    Example:
        >>> to_device({"image": torch.zeros(2)}, torch.device("meta"))["image"].device
        device(type='meta')
    """
    is_ahead = device.type == "cuda"  # a copy to the CPU could be read before it has arrived
    return map_tensors(lambda t: t.to(device, non_blocking=is_ahead), batch)


def _refilled(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the same type with other values; a plain dict where it cannot be changed."""
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return values
    new = copy(batch)
    for key, value in values.items():
        new[key] = value
    return new
