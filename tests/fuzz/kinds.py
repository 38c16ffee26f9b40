"""Kinds of arguments: what is valid for each, and the values to try.

A kind says of a value that it is valid (``True``), invalid (``False``) or that the documentation
leaves it open (``None``): then the call may do either, but must not hang or fail with an exception
that is not ours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz.values import (
    BATCHES,
    COMMON,
    CONTAINERS,
    DATASETS,
    DISTRIBUTIONS,
    HUGE,
    LAYERS,
    TO_LOG_R,
    TO_ROWS,
    Value,
    constant,
    of_tensor,
)
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ncprior import LatentSource, NCPrior

Verdict = Callable[[Any], bool | None]


@dataclass(frozen=True)
class Kind:
    """A kind of argument.

    Attributes:
        name: Name.
        verdict: Whether a value is valid; ``None`` if that is open.
        pool: The values to try.
        numbers: Whether random numbers are tried too.
        tensors: Whether random tensors are tried too.
        gated: Whether what is invalid can be seen before any work is done.
        is_work: Whether it counts steps, so that with 0 the functions of the call are never called.
    """

    name: str
    verdict: Verdict
    pool: tuple[Value, ...] = COMMON
    numbers: bool = False
    tensors: bool = False
    gated: bool = True
    is_work: bool = False

    def without(self, *names: str) -> Kind:
        """The kind without some values."""
        return replace(self, pool=tuple(v for v in self.pool if v.name not in names))

    def also(self, *values: Value) -> Kind:
        """The kind with more values."""
        return replace(self, pool=(*values, *self.pool))


def is_bool(value: Any) -> bool:
    """Whether a value is a bool of Python or NumPy."""
    return isinstance(value, bool | np.bool_)


def count(low: int = 1, high: float = math.inf, *, none: bool = False, huge: bool = True) -> Kind:
    """A whole number; ``huge`` adds one that no memory holds."""

    def verdict(value: Any) -> bool | None:
        if value is None:
            return none
        if isinstance(value, Tensor) and value.numel() == 1 and value.dtype == torch.int64:
            return None if low <= value.item() <= high else False
        if isinstance(value, np.ndarray) and value.ndim == 0:
            return None
        if is_bool(value) or not isinstance(value, int | np.integer):
            return False
        if not low <= value <= high:
            return False
        return None if value > 64 else True

    more = (constant("10**12", HUGE, None),) if huge else ()
    return Kind(f"a whole number from {low}", verdict, (*more, *COMMON), numbers=True)


def steps(*, none: bool = False) -> Kind:
    """A number of steps, which can be 0."""
    return replace(count(0, huge=False, none=none), name="a number of steps", is_work=True)


def _is_seed(value: Any) -> bool | None:
    verdict = count(-(2**63), huge=False).verdict(value)
    return None if verdict is not False and value is not None and value < 0 else verdict


SEED = Kind("a seed", _is_seed, count(huge=False).pool, numbers=True)


def number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    none: bool = False,
    also: tuple[Any, ...] = (),
    left_open: tuple[Any, ...] = (),
) -> Kind:
    """A finite real number in an interval, or one of ``also``; what is in ``left_open`` is open."""

    def verdict(value: Any) -> bool | None:
        if value is None:
            return none
        if any(type(value) is type(other) and value == other for other in also):
            return True
        if any(type(value) is type(other) and value == other for other in left_open):
            return None
        if is_bool(value) or not isinstance(value, Real):
            scalar = isinstance(value, Tensor | np.ndarray) and value.ndim == 0
            return None if scalar else False
        value = float(value)
        if math.isnan(value) or math.isinf(value):
            return False
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if not (above and below):
            return False
        return True if 1e-3 < abs(value) < 100 else None

    return Kind(f"a number from {low} to {high}", verdict, COMMON, numbers=True)


DROPOUT = number(0, 1, left_open=(1,))
MAX_NORM = number(0, open_low=True, none=True, left_open=(math.inf, 0))
FLAG = Kind("a flag", lambda v: True if isinstance(v, bool) else None if is_bool(v) else False)


def choice(*choices: Any) -> Kind:
    """One of a few texts or dtypes."""

    def verdict(value: Any) -> bool:
        return any(type(value) is type(c) and value == c for c in choices)

    return Kind("a choice", verdict)


PRECISION = choice(torch.float32, torch.bfloat16).also(
    constant("torch.float16", torch.float16),
    constant("torch.float64", torch.float64),
    constant("torch.int64", torch.int64),
    constant("'bf16'", "bf16"),
)


def instance(*kinds: Any, none: bool = False, more: tuple[Value, ...] = ()) -> Kind:
    """An object of a class; another object of that class is left open."""

    def verdict(value: Any) -> bool | None:
        if value is None:
            return none
        return None if isinstance(value, kinds) else False

    return Kind(f"a {kinds[0].__name__}", verdict, (*more, *COMMON))


PRIOR = instance(NCPrior)
SOURCE = Kind("a source", lambda v: None if LatentSource in type(v).__mro__ else False)
PRIOR_OR_SOURCE = Kind(
    "a prior or a source",
    lambda v: None if isinstance(v, NCPrior) or LatentSource in type(v).__mro__ else False,
)
MODULE = instance(nn.Module)
OPTIONAL_MODULE = instance(nn.Module, none=True)


def is_path(value: Any) -> bool | None:
    """Whether a value can be a path; which files are there is open."""
    if isinstance(value, bytes):
        return None
    return None if isinstance(value, str | os.PathLike) else False


PATH = (
    Kind("a path", is_path)
    .without("'text'", "''")
    .also(
        Value("a folder", lambda w, v: w.folder),
        Value("a file of other content", lambda w, v: w.folder / "mine.txt"),
        Value("a path under a file", lambda w, v: w.folder / "mine.txt" / "x"),
        Value("a missing path", lambda w, v: w.folder / "missing" / "x"),
        Value("a path under /proc", lambda w, v: "/proc/nowhere/x"),
    )
)
OPTIONAL_PATH = Kind("a path or None", lambda v: True if v is None else is_path(v), PATH.pool)
TEXT = Kind("a text", lambda v: None if isinstance(v, str) else False)
OPTIONAL_TEXT = Kind("a text or None", lambda v: None if isinstance(v, str | None) else False)


def function(*outputs: Value, none: bool = False) -> Kind:
    """A function of the user's, and some with wrong results."""

    def verdict(value: Any) -> bool | None:
        if value is None:
            return none
        return None if callable(value) and not isinstance(value, type) else False

    return Kind("a function", verdict, (*outputs, *COMMON), gated=False)


CALLBACK = function(*LAYERS[:1], *LAYERS[-1:], none=True)
NETWORK = function(*LAYERS, *TO_ROWS)
OPTIONAL_NETWORK = function(*LAYERS, *TO_ROWS, none=True)
LOG_RATIO = function(*LAYERS, *TO_LOG_R)
TO_DISTRIBUTION = function(
    *LAYERS,
    Value("to the prior's class", lambda w, v: lambda *a: Distribution, False),
    Value("to a distribution of one row", lambda w, v: lambda *a: _one_row(v(*a)), False),
)
OPTIONAL_TO_DISTRIBUTION = function(
    *(value._replace(valid=None) for value in TO_DISTRIBUTION.pool[:8]), none=True
)


def _one_row(q: Distribution) -> Distribution:
    return Independent(Normal(q.mean[:1], 1.0), 1)


def _is_base(value: Any) -> bool | None:
    return None if hasattr(value, "sample") and not isinstance(value, type) else False


BASE = Kind("a distribution", _is_base, (*DISTRIBUTIONS, *COMMON))
BASE_OR_FUNCTION = Kind(
    "a base",
    lambda v: None if _is_base(v) is None or (callable(v) and not isinstance(v, type)) else False,
    (*DISTRIBUTIONS, *COMMON),
)
SAMPLER = function(
    *LAYERS[:4],
    Value("a sampler to NaN", lambda w, v: lambda p, r: _nan_draw(v(p, r)), False),
    Value(
        "a sampler to one row", lambda w, v: lambda p, r: v(p, r)._replace(z=v(p, r).z[:1]), False
    ),
    Value("a sampler to None as z", lambda w, v: lambda p, r: v(p, r)._replace(z=None), False),
)
OPTIONAL_SAMPLER = function(*SAMPLER.pool[:7], none=True)


def _nan_draw(draw: Any) -> Any:
    return draw._replace(z=draw.z * math.nan)


def tensor(*, none: bool = False, **options: Any) -> Kind:
    """Numbers with shape ``(N, ...)``; see :func:`fuzz.values.of_tensor`."""
    may_be_empty = "empty" in options and options["empty"] is None

    def verdict(value: Any) -> bool | None:
        if value is None:
            return none
        has_numbers = isinstance(value, Tensor) and (value.numel() > 0 or may_be_empty)
        if has_numbers and not value.is_complex():
            return None
        if isinstance(value, np.ndarray) and value.dtype != object and value.ndim:
            return None
        if isinstance(value, list) and value == [1.0, 2.0]:
            return None
        return False if not hasattr(value, "to_numpy") else None

    return Kind("a tensor", verdict, (*of_tensor(**options), *COMMON), tensors=True, gated=False)


LATENTS = tensor()
# Of functions inside of loops, which neither wait for a GPU nor look at every type.
INNER = Kind(
    "a tensor",
    lambda v: None,
    of_tensor(nan=None, empty=None, rank=None, complex_numbers=None),
    gated=False,
)
FEATURES = tensor(array=True, whole=True)


def _is_batch(value: Any) -> bool | None:
    if isinstance(value, Tensor):
        return None if value.ndim and value.numel() else False
    if isinstance(value, np.ndarray):
        return None if value.ndim and value.dtype != object else False
    if isinstance(value, list | tuple | dict):
        return None if value and type(value) is dict else False
    return None if hasattr(value, "__len__") and not isinstance(value, str | bytes) else False


_ROWS = of_tensor(infinite=None, rank=None, complex_numbers=None)  # a VAE may take infinity
X = Kind("a batch", _is_batch, (*_ROWS, *BATCHES, *COMMON), tensors=True, gated=False)
DATA = Kind("data", _is_batch, (*_ROWS, *BATCHES, *DATASETS, *COMMON), gated=False)
OPTIONAL_DATA = Kind(
    "data or None", lambda v: True if v is None else _is_batch(v), DATA.pool, gated=False
)
ENCODINGS = Kind("an encoding or a state", lambda v: None, (), gated=False)
NO_CONDITION = Kind("None", lambda v: True if v is None else None, COMMON, gated=False)

LIST_OF_LATENTS = Kind(
    "a list of latents",
    lambda v: None if isinstance(v, list | tuple | Tensor) and len(v) == 1 else False,
    (
        Value("one too many", lambda w, v: [*v, *v], False),
        Value("with None", lambda w, v: [None], False),
        Value("with NaN", lambda w, v: [v[0] * math.nan], None),
        Value("of no rows", lambda w, v: [v[0][:0]], None),
        Value("of another width", lambda w, v: [v[0][:, :1]], False),
        Value("as arrays", lambda w, v: [v[0].numpy()], None),
        Value("of whole numbers", lambda w, v: [v[0].long()], None),
        Value("of float64", lambda w, v: [v[0].double()], None),
        *(v for v in COMMON if v.name not in ("torch.tensor(0.5)", "torch.tensor(3)")),
    ),
    gated=False,
)


def _is_shape(value: Any) -> bool | None:
    if isinstance(value, Tensor | np.ndarray):
        return None
    if not isinstance(value, tuple | list):
        return False
    return all(isinstance(n, int) and not is_bool(n) and n > 0 for n in value) or False


SHAPE = Kind(
    "a shape",
    lambda v: None if _is_shape(v) else _is_shape(v),
    (
        constant("(-1,)", (-1,)),
        constant("(0,)", (0,)),
        constant("(2.5,)", (2.5,)),
        constant("('a',)", ("a",)),
        constant("(True,)", (True,), False),
        constant("(10**12,)", (HUGE,), None),
        *COMMON,
    ),
)
OPTIONAL_SHAPE = Kind(
    "a shape or None",
    lambda v: True if v is None else None if _is_shape(v) else _is_shape(v),
    SHAPE.pool,
)
MAPPING = Kind("a dict", lambda v: None if isinstance(v, dict) else False)
SEQUENCE = Kind(
    "a sequence", lambda v: None if isinstance(v, list | tuple | Tensor | np.ndarray) else False
)
ANYTHING = Kind("anything", lambda v: None, COMMON, gated=False)
INDICES = Kind(
    "row numbers",
    lambda v: None,
    (
        constant("[-1000]", torch.tensor([-1000]), None),
        constant("[1000]", torch.tensor([1000]), None),
        *CONTAINERS,
    ),
    gated=False,
)


def only_invalid(kind: Kind) -> Kind:
    """The kind with its certainly invalid values only, for calls that are slow or go to the net."""
    pool = tuple(
        value
        for value in kind.pool
        if value.valid is False
        or (value.valid is ... and kind.verdict(value.make(_Nobody(), None)) is False)
    )
    return replace(kind, pool=pool, numbers=False, tensors=False)


class _Nobody:
    """A world for values that need none."""

    def __getattr__(self, name: str) -> Any:
        known = {"x": torch.ones(2, 3), "folder": Path("nowhere")}
        return known[name] if name in known else nn.Linear(1, 1)


def unsure(kind: Kind) -> Kind:
    """The kind with what is valid left open, as another argument decides it."""
    return replace(kind, verdict=lambda value: kind.verdict(value) and None)


def opened(kind: Kind) -> Kind:
    """The kind with everything left open but what is no object of any use."""
    pool = tuple(
        value if value.valid is ... else value._replace(valid=None) for value in kind.pool
    )
    useless = type(None) | bool | int | float | complex | type
    return replace(kind, pool=pool, verdict=lambda v: False if isinstance(v, useless) else None)
