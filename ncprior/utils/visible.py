"""Tensors that an object holds or its functions refer to: which are shared, and on which devices."""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, islice, pairwise
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 8  # of attributes, functions and containers inside each other

_LIBRARIES = ("torch", "numpy")  # their functions refer to nothing of the user's

_MOST = 100  # items of a container that are looked at

_LOADS = re.compile("LOAD_(FAST|DEREF|CLOSURE|GLOBAL)")  # opcodes that read a variable


def visible_tensors(thing: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Yields the tensors of an object as far as they can be seen, each once.

    They are parameters and buffers of modules, and tensors in attributes, containers, and the
    variables that functions refer to; of an object with methods, the attributes that a method
    uses. A prior or VAEBM that such an object holds, too, is left out.

    Arguments:
        thing: Any object, such as a source.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> sum(1 for _ in visible_tensors(lambda z: layer(z)))
        2
    """
    return _tensors(thing, _DEPTH, set())


def is_trained(thing: object) -> bool:
    """Returns whether an object is a prior or a VAEBM: it registers what is trained, not its source."""
    is_model = isinstance(thing, nn.Module) and "source" in vars(thing)
    return is_model and (hasattr(thing, "heads") or hasattr(thing, "energy"))


def _tensors(thing: Any, depth: int, seen: set[Any]) -> Iterator[Tensor]:  # noqa: ANN401
    is_method = isinstance(thing, MethodType)
    key = (id(thing.__func__), id(thing.__self__)) if is_method else id(thing)
    if depth == 0 or key in seen or is_trained(thing):
        return
    seen.add(key)
    if isinstance(thing, Tensor):
        yield thing
        return
    for part in _parts(thing, seen):
        yield from _tensors(part, depth - 1, seen)


def _parts(thing: Any, seen: set[Any]) -> list[Any]:  # noqa: ANN401
    """Parts of an object, or variables of a function."""
    match thing:
        case nn.Module():
            modules = [module for _, module in frozen_modules(thing)]
            seen.update(map(id, modules))
            held = [{**m._parameters, **m._buffers}.values() for m in modules]
            own = [value for name, value in vars(thing).items() if name[0] != "_"]
            return [*chain.from_iterable(held), *own]
        case Mapping():
            return list(islice(thing.values(), _MOST))
        case tuple() | list():
            return list(thing[:_MOST])
        case MethodType():
            function = inspect.unwrap(thing.__func__)
            return [*_used(function, 0, thing.__self__), function]
        case functools.partial():
            return [thing.func, *thing.args, *thing.keywords.values()]
        case FunctionType():
            return _variables(thing)
    if isinstance(thing, type) or inspect.ismodule(thing):
        return []
    return list(getattr(thing, "__dict__", {}).values())


def frozen_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields a module and its submodules by name, except for those of a prior or VAEBM among them.

    Example:
        >>> [name for name, _ in frozen_modules(torch.nn.Sequential(torch.nn.Tanh()))]
        ['', '0']
    """
    models = (m for m in module.modules() if m is not module and is_trained(m))
    trained = {id(part) for model in models for part in model.modules()}
    yield from ((name, m) for name, m in module.named_modules() if id(m) not in trained)


def _variables(function: FunctionType) -> list[Any]:
    """Values of the variables from outside that a function uses."""
    values: dict[str, Any] = {}
    if not _is_of_a_library(function):
        names = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
        values = {name: function.__globals__.get(name) for name in names}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a variable that has no value yet
            values[name] = cell.cell_contents
    return [part for name, value in values.items() for part in _used(function, name, value)]


def _used(function: Any, variable: str | int, value: Any) -> list[Any]:  # noqa: ANN401
    """The value of a function's variable, or the attributes of it that are all the function reads."""
    if not isinstance(function, FunctionType) or _is_of_a_library(function):
        return [value]
    code = function.__code__
    if isinstance(variable, int):
        if code.co_argcount == 0:
            return [value]
        variable = code.co_varnames[variable]
    parts: list[Any] = []
    for step, after in pairwise(dis.get_instructions(function)):
        read = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if not _LOADS.search(step.opname) or variable not in read:
            continue
        if read[-1] != variable or after.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return [value]
        parts.append(_attribute(value, after.argval))
    return parts


def _attribute(owner: Any, name: str) -> Any:  # noqa: ANN401
    """An attribute of an object, a method or property as a bound method, else the object."""
    held = dict(getattr(owner, "__dict__", {}))
    if isinstance(owner, nn.Module):
        held |= owner._parameters | owner._buffers
        held |= owner._modules
    if name in held:
        return held[name]
    found = inspect.getattr_static(type(owner), name, None)
    if isinstance(found, property | functools.cached_property):
        found = found.fget if isinstance(found, property) else found.func
    return MethodType(found, owner) if isinstance(found, FunctionType) else owner


def _is_of_a_library(function: FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] in _LIBRARIES


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
