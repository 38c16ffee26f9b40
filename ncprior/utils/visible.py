"""Tensors that an object holds: which are shared, and on which devices they are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_DEPTH = 8  # of attributes and containers inside each other

_MOST = 100  # items of a container that are looked at


def visible_tensors(thing: Any, besides: Iterable[object] = ()) -> Iterator[Tensor]:  # noqa: ANN401
    """Yields the tensors that an object holds, as far as they can be seen.

    They are parameters and buffers of modules, and tensors in attributes and containers. A bound
    method shows those of its object; a plain function shows none. A prior or VAEBM inside of the
    object is left out with its heads.

    Arguments:
        thing: Any object, such as a source.
        besides: Objects that are left out, too.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> sum(1 for _ in visible_tensors([layer.forward]))
        2
    """
    yield from _tensors(thing, _DEPTH, set(map(id, besides)))


def frozen_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields a module and its submodules by name, except for those of a prior or VAEBM among them.

    Example:
        >>> [name for name, _ in frozen_modules(torch.nn.Sequential(torch.nn.Tanh()))]
        ['', '0']
    """
    models = (m for m in module.modules() if m is not module and _is_trained(m))
    trained = {id(part) for model in models for part in model.modules()}
    yield from ((name, m) for name, m in module.named_modules() if id(m) not in trained)


def require_apart(module: nn.Module, frozen: object, whose: str) -> None:
    """Validates that a trained module shares no parameter with a VAE, which would be trained too.

    Arguments:
        module: The trained module. An object with a method that the source uses may hold it or
            its children as they are, but the VAE, ``source.module``, may not.
        frozen: The source, or several objects in a tuple.
        whose: The module's name in the message.

    Raises:
        ValueError: If it shares a parameter; the message names it.
    """
    own = [module, *module.children()] if isinstance(module, nn.ModuleList) else [module]
    vaes = [getattr(part, "module", None) for part in _several(frozen)]
    theirs = {_address(t) for t in (*visible_tensors(frozen, own), *visible_tensors(vaes))}
    for name, parameter in module.named_parameters():
        if _address(parameter) in theirs:
            raise ValueError(
                f"{whose} must not share parameters with what stays frozen, the VAE or, for an energy, "
                f"the heads; {name} is a tensor of theirs. Give it a copy, copy.deepcopy(layer); or "
                f"pass the frozen layers as features, SingleGroup(..., features=vae.decoder[:2])."
            )


def _several(thing: object) -> tuple[object, ...]:
    return thing if isinstance(thing, tuple) else (thing,)


def _is_trained(thing: object) -> bool:
    """Whether an object is a prior or a VAEBM: it registers heads or an energy, and no source."""
    is_model = isinstance(thing, nn.Module) and "source" in vars(thing)
    return is_model and (hasattr(thing, "heads") or hasattr(thing, "energy"))


def _tensors(thing: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:  # noqa: ANN401
    if depth == 0 or id(thing) in seen or _is_trained(thing):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        for held in (thing._parameters, thing._buffers, thing._modules):
            for part in held.values():
                yield from _tensors(part, depth, seen)
    for part in _parts(thing):
        yield from _tensors(part, depth - 1, seen)


def _parts(thing: Any) -> Iterable[Any]:  # noqa: ANN401
    """Items of a container, and attributes of an object."""
    match thing:
        case Mapping():
            return islice(thing.values(), _MOST)
        case tuple() | list():
            return thing[:_MOST]
        case MethodType():
            return [thing.__self__]
        case functools.partial():
            return [thing.func, *thing.args, *thing.keywords.values()]
        case Tensor() | FunctionType() | type():
            return []
    held = {} if inspect.ismodule(thing) else getattr(thing, "__dict__", {})
    internal = ("_parameters", "_buffers", "_modules") if isinstance(thing, nn.Module) else ()
    return [value for name, value in held.items() if name not in internal]


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


def require_eval(*parts: object) -> None:
    """Raises an error for a VAE in training mode, as dropout and batch statistics change q(z | x).

    Raises:
        ValueError: If any submodule is in training mode, except for heads of a prior in it.

    Example:
        >>> require_eval(torch.nn.Linear(1, 1).eval())
    """
    for part in parts:
        for name, submodule in frozen_modules(part) if isinstance(part, nn.Module) else ():
            if submodule.training and type(submodule) not in _CONTAINERS:
                raise ValueError(
                    f"The VAE must be in evaluation mode; {name or type(submodule).__name__} is in "
                    f"training mode. Call vae.eval(); leave out module= where that is impossible, "
                    f"as for a module of torch.export."
                )


# Their own flag changes nothing.
_CONTAINERS = (
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential),
    *(DataParallel, DistributedDataParallel),
)
