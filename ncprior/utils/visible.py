"""Tensors that an object holds or its functions refer to: which are shared, and on which devices."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 6  # of attributes, functions and containers inside each other

_LIBRARIES = ("torch", "numpy")  # their functions refer to nothing of the user's

_MOST = 100  # items of a container that are looked at


def visible_tensors(thing: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Yields the tensors of an object as far as they can be seen, each once.

    They are parameters and buffers of modules, and tensors in attributes, containers, bound methods,
    and the variables that functions refer to.

    Arguments:
        thing: Any object, such as a source.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> sum(1 for _ in visible_tensors(lambda z: layer(z)))
        2
    """
    return _tensors(thing, _DEPTH, set())


def _tensors(thing: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:  # noqa: ANN401
    if depth == 0 or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    for part in _parts(thing, seen):
        yield from _tensors(part, depth - 1, seen)


def _parts(thing: Any, seen: set[int]) -> list[Any]:  # noqa: ANN401
    """Parts of an object, or variables of a function."""
    match thing:
        case nn.Module():
            seen.update(map(id, thing.modules()))
            own = [value for name, value in vars(thing).items() if name[0] != "_"]
            return [*thing.parameters(), *thing.buffers(), *own]
        case Mapping():
            return list(islice(thing.values(), _MOST))
        case tuple() | list():
            return list(thing[:_MOST])
        case MethodType():
            return [thing.__self__, thing.__func__]
        case functools.partial():
            return [thing.func, *thing.args, *thing.keywords.values()]
        case FunctionType():
            return _variables(thing)
    if isinstance(thing, type) or inspect.ismodule(thing):
        return []
    return list(getattr(thing, "__dict__", {}).values())


def _variables(function: FunctionType) -> list[Any]:
    """Values of the variables from outside that a function uses."""
    values = []
    if (function.__module__ or "").split(".")[0] not in _LIBRARIES:
        names = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
        values = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that has no value yet
            values.append(cell.cell_contents)
    return values


def require_apart(module: nn.Module, source: object, whose: str) -> None:
    """Validates that a trained module shares no parameter with a VAE, which would be trained too.

    Arguments:
        module: The module.
        source: The source, whose functions are looked into as well.
        whose: The module's name in the message.

    Raises:
        ValueError: If it shares a parameter; the message names it.
    """
    theirs = {_address(t) for t in visible_tensors(source)}
    for name, parameter in module.named_parameters():
        if _address(parameter) in theirs:
            raise ValueError(
                f"{whose} must not share parameters with what stays frozen, the VAE or, for an energy, "
                f"the heads; {name} is a tensor of theirs. Give it a copy, copy.deepcopy(layer); or pass the frozen layers "
                f"as features, SingleGroup(..., features=vae.decoder[:2])."
            )


def _address(tensor: Tensor) -> int:
    """Address of a tensor's memory; its identity if it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, ValueError):  # sparse, or not made yet
        return id(tensor)


@contextmanager
def naming_devices(**parts: Any) -> Iterator[None]:  # noqa: ANN401
    """Context in which an error of torch names the devices of these parts, if they are several."""
    try:
        yield
    except RuntimeError as error:
        found = {
            name: sorted({str(t.device) for t in visible_tensors(parts[name])}) for name in parts
        }
        if len({device for on in found.values() for device in on}) < 2 or isinstance(
            error, torch.cuda.OutOfMemoryError
        ):
            raise
        listed = ", ".join(f"{name} on {' and '.join(on)}" for name, on in found.items() if on)
        raise ValueError(
            f"Base, VAE and heads must be on one device; got {listed}. Move the others to the VAE's, "
            f"as by prior.to(device). torch says: {error}"
        ) from error
