"""Fingerprints of modules and base priors, to check that heads are used with the right VAE."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform
from torch.distributions.utils import lazy_property

from ncprior.utils.require import require_instance
from ncprior.utils.states import tensors_of


def _has_tensors(base: object) -> bool:
    """Whether a base is a fitted one without a density, such as flow matching.

    Stored latents have no configuration: they are drawn anew, from one distribution.
    """
    return all(callable(getattr(base, name, None)) for name in ("tensors", "config"))


def module_fingerprint(module: nn.Module) -> str | None:
    """Returns the fingerprint ``"<dtype>:<SHA-256>"`` of a module.

    Arguments:
        module: The module. The names, shapes and values (in float32) of its parameters and
            buffers count, sorted by name, and its extra state if there is any. The names that
            ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put in front do not
            count.

    Returns:
        The fingerprint; its first part names the dtypes of the module, such as ``"float32"``.
        ``None`` if a tensor is on the meta device, without values.

    Example:
        >>> module_fingerprint(torch.nn.Linear(1, 1)).split(":")[0]
        'float32'
    """
    require_instance("module", module, nn.Module, "Pass the VAE.")
    digest = hashlib.sha256()
    dtypes = set()
    for name, value in sorted(_unwrapped(module.state_dict()).items()):
        for place, leaf in _leaves(value, name):
            if not isinstance(leaf, Tensor):
                digest.update(f"{place}={leaf}".encode())
                continue
            if leaf.is_meta:
                return None
            digest.update(f"{place}{tuple(leaf.shape)}".encode() + _bytes(leaf))
            if leaf.is_floating_point():
                dtypes.add(str(leaf.dtype).removeprefix("torch."))
    return f"{'+'.join(sorted(dtypes)) or 'none'}:{digest.hexdigest()}"


def base_fingerprint(base: object) -> str | None:
    """Returns the fingerprint ``"<type>:<SHA-256>"`` of a base's types, shapes and values.

    Values are in float32. Only constructor arguments of the distribution count, not attributes
    derived from them.

    Arguments:
        base: A prior. Its parameters are its attributes, including those of nested distributions
            and transforms; or those of a fitted base that is not a ``Distribution``.

    Returns:
        The fingerprint, or ``None`` if ``base`` has neither, or a tensor is on the meta device,
        without values.
    """
    if isinstance(base, Distribution):
        named = _named_tensors(base, "base")
    elif _has_tensors(base):
        fitted: Any = base
        named = iter(sorted(fitted.tensors().items()))
    else:
        return None
    digest = hashlib.sha256()
    for name, value in named:
        if value.is_meta:
            return None
        digest.update(f"{name}{tuple(value.shape)}".encode() + _bytes(value))
    return f"{type(base).__name__}:{digest.hexdigest()}"


def held_by(function: object) -> list[Any]:
    """Returns the values in the closure of a function, without variables that have no value yet.

    Example:
        >>> held_by(lambda: None)
        []
    """
    held = []
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return held


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state under the names that it has without wrappers of the module."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _leaves(value: object, name: str) -> Iterator[tuple[str, Tensor | str]]:
    """Yields the tensors of an entry of a state, and descriptions of all else in its extra state.

    The same state has the same descriptions in every process.
    """
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield from _leaves(value[key], f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    elif value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        yield name, repr(value)
    else:
        yield name, type(value).__name__


def _bytes(tensor: Tensor) -> bytes:
    """Returns the values of a tensor of any layout and dtype, in float32."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to("cpu", torch.float32).contiguous().numpy().tobytes()


def _named_tensors(
    value: object, name: str, inside: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors and numbers that a distribution holds, sorted by name.

    They are found in nested distributions, transforms and modules, in lists and dicts, and in objects
    and arguments of functions. Tensors derived from others do not count.
    """
    if id(value) in inside:
        return
    inside = (*inside, id(value))
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.array(value))
    if isinstance(value, Tensor | int | float):
        yield name, torch.as_tensor(value)
    elif isinstance(value, nn.Module):
        for key, tensor in sorted(tensors_of(value).items()):
            yield f"{name}.{key}", tensor
    elif isinstance(value, Distribution | Transform):
        name = f"{name}.{type(value).__name__}"
        yield f"{name}{tuple(getattr(value, 'event_shape', ()))}", torch.empty(0)
        for key, item in sorted(vars(value).items()):
            derived = isinstance(getattr(type(value), key, None), lazy_property)
            if not derived and _is_own(value, key, item):
                yield from _named_tensors(item, f"{name}.{key}", inside)
    else:
        for key, item in _parts(value):
            yield from _named_tensors(item, f"{name}.{key}", inside)


_INVERSES = ("_InverseTransform", "Inverse")  # of torch and zuko: `_inv` is what they invert

_PRIVATE = (
    Tensor,
    Distribution,
    Transform,
    nn.Module,
    np.ndarray,
    partial,
    MethodType,
    FunctionType,
)


def _is_own(value: object, key: str, item: object) -> bool:
    """Whether an attribute of a distribution or transform counts, and is no cache or known otherwise.

    Private numbers and containers may change with use.
    """
    if key == "_inv":
        return type(value).__name__ in _INVERSES
    if key.startswith("_"):
        return isinstance(item, _PRIVATE)
    return key != "spline"  # the sizes of a fitted flow, whose weights count


def _parts(value: object) -> Iterable[tuple[str, object]]:
    """The items of a container, or the object and arguments of a function, by name."""
    if isinstance(value, list | tuple):
        return ((str(i), item) for i, item in enumerate(value))
    if isinstance(value, Mapping):
        return sorted((repr(key), item) for key, item in value.items())
    if isinstance(value, partial):
        return [("func", value.func), *_parts(value.args), *_parts(value.keywords)]
    if isinstance(value, MethodType):
        return [("self", value.__self__)]
    if isinstance(value, FunctionType):
        return [
            *_parts(held_by(value)),
            *_parts(value.__defaults__ or ()),
            *_parts(value.__kwdefaults__ or {}),
        ]
    return ()
