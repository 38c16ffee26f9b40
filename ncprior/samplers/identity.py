"""Identity of a sampler: the call that made it as text, for people, for files and to compare jobs."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from dis import get_instructions
from functools import lru_cache, partial, wraps
from types import CodeType, FunctionType
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ncprior.distributions import Sampleable
from ncprior.samplers.base import Draw, LogRatio, Sampler
from ncprior.utils.fingerprints import base_fingerprint, held_by, module_fingerprint

P = ParamSpec("P")

_FUNCTIONS = (FunctionType, type(lru_cache(len)))  # without and with a cache

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in a repr: another one in every process

_VALUES = (
    bool,
    int,
    float,
    complex,
    str,
    tuple,
    frozenset,
    torch.dtype,
    np.generic,
    np.ndarray,
    Tensor,
)


class Composition:
    """Sampler made of samplers, which keeps the call that made it, to be described and saved.

    Attributes:
        made_by: The call, such as ``partial(at_temperature, sampler, 0.5)``.
    """

    def __init__(self, made_by: partial[Sampler], sampler: Sampler) -> None:
        self.made_by, self._sampler = made_by, sampler

    def __call__(self, prior: Sampleable, log_ratio: LogRatio) -> Draw:
        """Draws z."""
        return self._sampler(prior, log_ratio)

    def __reduce__(self) -> tuple[partial[Sampler], tuple[()]]:
        return self.made_by, ()

    def __repr__(self) -> str:
        return describe(self)


def composition(function: Callable[P, Sampler]) -> Callable[P, Sampler]:
    """Decorator of functions that return a sampler; they then return a :class:`Composition`."""

    @wraps(function)
    def compose(*args: P.args, **keywords: P.kwargs) -> Sampler:
        sampler = function(*args, **keywords)
        given = inspect.signature(function).bind(*args, **keywords)
        return Composition(partial(compose, *given.args), sampler)

    return compose


def describe(sampler: Any) -> str:  # noqa: ANN401
    """Description of a sampler and its options as text, the same in every process.

    Arguments:
        sampler: A sampler function, a ``functools.partial`` of one, or a composition of samplers.

    Returns:
        The description: functions by name, with their options and the values in their closures;
        other callable objects by their type alone.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> from ncprior.samplers import at_temperature
        >>> describe(partial(sir, num_proposals=50))
        'sir(num_proposals=50)'
        >>> describe(at_temperature(partial(sir, num_proposals=50), 0.5))
        'at_temperature(sir(num_proposals=50), 0.5)'
    """
    return _described(sampler, {}, exact=False)


def identity_of(sampler: Any) -> str:  # noqa: ANN401
    """Description of a sampler that differs for functions of one name with another code.

    It is the same in every process of one version of Python. Tensors and arrays are known by their
    values, decorated functions by the decorator, too, bound methods by their object, and functions by
    the numbers, tensors, samplers, functions and objects of their own file that they use. Functions of
    this package are known by their names. An object is known by its type, by the functions that make and call it,
    and by the values that it was made with, if its attributes have the names of the arguments.
    """
    return _described(sampler, {}, exact=True)


def _name(function: Any) -> str:  # noqa: ANN401
    name = str(getattr(function, "__qualname__", type(function).__qualname__))
    return name.replace(".<locals>", "")


def _name_with_code(function: Any, describe: Callable[[Any], str]) -> str:  # noqa: ANN401
    if isinstance(function, nn.Module):
        return f"{_name(function)}#{module_fingerprint(function)}"
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None or _package(function) == "ncprior":
        return _name(function)
    given = [*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    defaults = sorted(f"{name}={describe(value)}" for name, value in given)
    used = [f"{name}={describe(value)}" for name, value in _used(function, code)]
    text = "\n".join([*_parts(code, function.__doc__), *defaults, *used])
    return f"{_name(function)}#{_digest(text.encode())}"


def _used(function: Any, code: CodeType) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Values, samplers, and functions and objects of its own file that a function uses, by name."""
    known = getattr(function, "__func__", function).__globals__
    for name in sorted(set(_globals_of(code)) & set(known)):
        value = known[name]
        is_own = type(value).__module__ == known.get("__name__")
        if isinstance(value, _FUNCTIONS):
            is_own = getattr(inspect.unwrap(value), "__globals__", None) is known
        if is_own or isinstance(value, (*_VALUES, partial, Composition, nn.Module)):
            yield name, value


def _globals_of(code: CodeType) -> Iterator[str]:
    """Names of the globals that a function and the functions in it read, and do not write."""
    steps = [(step.opname, step.argval) for step in get_instructions(code)]
    written = {name for operation, name in steps if operation == "STORE_GLOBAL"}
    yield from {name for operation, name in steps if operation == "LOAD_GLOBAL"} - written
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _package(function: Any) -> str:  # noqa: ANN401
    """The package whose code a function is: a decorated one has the ``__module__`` of another."""
    known = getattr(getattr(function, "__func__", function), "__globals__", {})
    return str(known.get("__name__", "")).partition(".")[0]


def _parts(code: CodeType, doc: str | None = None) -> Iterator[str]:
    """The instructions, names and constants of a function and of the functions in it."""
    yield f"{code.co_code!r} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
        elif isinstance(constant, frozenset):  # without an order of its own
            yield str(sorted(map(repr, constant)))
        elif constant != doc or doc is None:
            yield repr(constant)


def _described(
    sampler: Any,  # noqa: ANN401
    seen: dict[int, tuple[Any, str]],
    *,
    exact: bool,
) -> str:
    """Description of a sampler; objects seen before have theirs, which is kept by their address."""
    if id(sampler) not in seen:
        seen[id(sampler)] = sampler, "..."  # of a function that calls itself
        seen[id(sampler)] = (
            sampler,
            _text(sampler, partial(_described, seen=seen, exact=exact), exact),
        )
    return seen[id(sampler)][1]


def _text(sampler: Any, describe_inner: Callable[[Any], str], exact: bool) -> str:  # noqa: ANN401
    if isinstance(sampler, Composition):
        sampler = sampler.made_by
    if isinstance(sampler, partial):
        words = [describe_inner(a) for a in sampler.args]
        words += [f"{name}={describe_inner(a)}" for name, a in sorted(sampler.keywords.items())]
        return f"{describe_inner(sampler.func)}({', '.join(words)})"
    if isinstance(sampler, tuple | list):
        return f"({', '.join(map(describe_inner, sampler))})"
    if isinstance(sampler, type):
        return _name(sampler)
    if not callable(sampler):
        return _value(sampler, describe_inner, exact=exact)
    function = _undecorated(sampler) if exact else _innermost(sampler)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and _package(function) == "torch":  # its code changes with torch
        inner = [wrapped, *(_owned(function, exact) if inspect.ismethod(function) else ())]
        return f"{function.__code__.co_name}({', '.join(map(describe_inner, inner))})"
    held = [*_owned(function, exact), *held_by(function)]
    if wrapped is not None and all(wrapped is not it for it in held):
        held.insert(0, wrapped)
    name = _name_with_code(function, describe_inner) if exact else _name(function)
    return f"{name}({', '.join(map(describe_inner, held))})" if held else name


def _owned(function: Any, exact: bool) -> Iterator[Any]:  # noqa: ANN401
    """The object of a method, and attributes, which are a part of the exact identity alone."""
    owner = function.__self__ if inspect.ismethod(function) else function
    if exact and owner is not function:
        yield owner
    if exact and not isinstance(owner, type | Distribution | FunctionType):
        yield from _made_of(owner)


def _made_of(owner: Any) -> Iterator[Any]:  # noqa: ANN401
    """The user's functions that make and call an object, and the values that it was made with."""
    for name in ("__init__", "__call__", "forward"):
        function = getattr(type(owner), name, None)
        if isinstance(function, FunctionType) and _package(function) not in ("ncprior", "torch"):
            yield function
    if attributes := _attributes(owner):
        yield attributes


def _attributes(owner: Any) -> dict[str, Any]:  # noqa: ANN401
    """The values and functions that an object was made with, by the names of its arguments."""
    try:
        arguments = inspect.signature(type(owner)).parameters
    except (TypeError, ValueError):  # a type without a signature
        return {}
    held = {
        name: value for name, value in getattr(owner, "__dict__", {}).items() if name in arguments
    }
    return {
        name: value
        for name, value in sorted(held.items())
        if isinstance(value, (*_VALUES, list, dict, set, type(None))) or callable(value)
    }


def _undecorated(function: Any) -> Any:  # noqa: ANN401
    """A function of this package without its decorators, which are of torch or of this package."""
    inner = inspect.unwrap(function, stop=lambda it: _package(it) not in ("ncprior", "torch"))
    return inner if _package(inner) == "ncprior" else function


def _innermost(function: Any) -> Any:  # noqa: ANN401
    """A function without its decorators; a decorated partial or composition keeps the last of them."""

    def is_last(it: Any) -> bool:  # noqa: ANN401
        return isinstance(it.__wrapped__, partial | Composition)

    return inspect.unwrap(function, stop=is_last)


def _value(value: Any, describe: Callable[[Any], str], *, exact: bool) -> str:  # noqa: ANN401
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, dict):
        items = (f"{key!r}: {describe(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if exact and isinstance(value, Tensor | np.ndarray):
        return _array(value, describe)
    if exact and isinstance(value, Distribution):
        return base_fingerprint(value) or _ADDRESS.sub("", repr(value))
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(describe, value)))}}}"
    return _ADDRESS.sub("", repr(value))


def _array(value: Tensor | np.ndarray[Any, Any], describe: Callable[[Any], str]) -> str:
    """Dtype, shape and digest of the values of a tensor or an array."""
    kind = f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        is_plain = not value.dtype.hasobject
        return f"{kind}#{_digest(value.tobytes())}" if is_plain else describe(value.tolist())
    if value.is_meta:
        return kind
    dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
    flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return f"{kind}#{_digest(flat.view(torch.uint8).numpy().tobytes())}"
