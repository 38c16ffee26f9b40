"""Nested Python values as JSON and tensors, for checkpoints of a training.

``torch.save`` with ``torch.load(weights_only=True)`` is no substitute: as tried with torch
2.13, it loads a file with a flipped bit without an error, and cannot load NumPy arrays.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncprior.utils.texts import printable

_DTYPE = re.compile(r"[<>|=][biufc]\d{1,2}")  # the numeric ones of NumPy


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:  # noqa: ANN401
    """Splits a nested state into a JSON tree and tensors; :func:`unpack` restores it exactly.

    Arguments:
        tree: Nested dict (keys of any type below), list, tuple, str, int, float, bool, None,
            Tensor (detached) and numeric NumPy array. An ``OrderedDict`` comes back as a dict.

    Returns:
        The JSON tree, and the tensors by name.

    Raises:
        TypeError: If the tree holds anything else. The message names the place.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(tree, tensors, "state"), tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    """Joins a JSON tree and tensors of :func:`pack`; the tensors stay on their device.

    Raises:
        ValueError: If tree and tensors are not those of :func:`pack`, which uses each tensor once.
    """
    unused = dict(tensors)
    try:
        state = _unpack(tree, unused)
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        reason = printable(f"{type(error).__name__}: {error}", longest=100)
        raise ValueError(f"It holds no state that was packed ({reason}).") from error
    if unused:
        raise ValueError(f"It holds {len(unused)} tensors that belong to no part of its state.")
    return state


def _unpack(tree: Any, unused: dict[str, Tensor]) -> Any:  # noqa: ANN401
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case list():
            return [_unpack(item, unused) for item in tree]
        case {"float": str(value), **rest} if not rest:
            return float(value)
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_unpack(item, unused) for item in items)
        case {"dict": list(items), **rest} if not rest:
            return {_unpack(k, unused): _unpack(v, unused) for k, v in items}
        case {"tensor": str(name), **rest} if not rest:
            return unused.pop(name)
        case {"array": [str(name), str(dtype), list(shape)], **rest} if not rest:
            if _DTYPE.fullmatch(dtype):
                return unused.pop(name).numpy().view(dtype).reshape(shape).copy()
    raise ValueError(f"a {type(tree).__name__} stands for no value")


def _pack(tree: Any, tensors: dict[str, Tensor], where: str) -> Any:  # noqa: ANN401
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach()
        return {"tensor": name}
    if isinstance(tree, np.ndarray) and _DTYPE.fullmatch(tree.dtype.str):
        name = str(len(tensors))
        tensors[name] = torch.from_numpy(np.frombuffer(tree.tobytes(), np.uint8).copy())
        return {"array": [name, tree.dtype.str, list(tree.shape)]}
    if tree is None or type(tree) in (bool, int, str):
        return tree
    if type(tree) is float:
        return tree if math.isfinite(tree) else {"float": repr(tree)}
    if type(tree) in (list, tuple):
        items = [_pack(item, tensors, f"{where}[{i}]") for i, item in enumerate(tree)]
        return items if type(tree) is list else {"tuple": items}
    if type(tree) in (dict, OrderedDict):
        return {
            "dict": [
                [_pack(key, tensors, f"{where}, key"), _pack(value, tensors, f"{where}[{key!r}]")]
                for key, value in tree.items()
            ]
        }
    raise TypeError(
        f"Cannot save {where}, a {type(tree).__name__}. Make it of dict, list, tuple, str, int, "
        f"float, bool, None, Tensor and numeric NumPy arrays."
    )
