"""Nested Python values as JSON and tensors, for checkpoints of a training.

``torch.save`` with ``torch.load(weights_only=True)`` is no substitute: as tried with torch
2.13, it loads a file with a flipped bit without an error, and cannot load NumPy arrays.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
        ValueError: If tree and tensors are not those of :func:`pack`.
    """
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if isinstance(tree, dict) and len(tree) == 1:
        ((kind, value),) = tree.items()
        try:
            match kind:
                case "float":
                    return float(value)
                case "tuple":
                    return tuple(unpack(value, tensors))
                case "dict":
                    return {unpack(k, tensors): unpack(v, tensors) for k, v in value}
                case "tensor":
                    return tensors[value]
                case "array":
                    name, dtype, shape = value
                    return tensors[name].numpy().view(dtype).reshape(shape).copy()
        except (KeyError, TypeError) as error:
            raise ValueError(f"Not a packed state: {kind} cannot hold {value!r}.") from error
    raise ValueError(f"Not a packed state: it holds {tree!r}.")


def _pack(tree: Any, tensors: dict[str, Tensor], where: str) -> Any:  # noqa: ANN401
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach()
        return {"tensor": name}
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biufc":
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
