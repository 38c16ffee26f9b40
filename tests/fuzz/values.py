"""Values to put in the place of an argument: each has a name in words, and is made anew."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz.world import World
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

HUGE = 10**12


class Value(NamedTuple):
    """A value to put in the place of a valid one.

    Attributes:
        name: The value in words.
        make: ``make(world, valid)`` returns it.
        valid: Whether it is valid, ``None`` for unsure, or ``...`` to ask the kind of the argument.
    """

    name: str
    make: Callable[[World, Any], Any]
    valid: Any = ...


def constant(name: str, value: Any, valid: Any = ...) -> Value:
    """A value that does not depend on anything."""
    return Value(name, lambda world, valid: value, valid)


class Frame:
    """A table such as a DataFrame: its items are columns, and it converts to NumPy."""

    columns = ("a", "b", "c")

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, name: str) -> Any:
        if name not in self.columns:
            raise KeyError(name)
        return self._rows[:, self.columns.index(name)].numpy()

    def to_numpy(self) -> Any:
        """The rows."""
        return self._rows.numpy()


class Batch(UserDict[str, Tensor]):
    """A mapping of a type of its own."""


class Endless(IterableDataset[Tensor]):
    """Rows without an end."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.zeros(3)


def no_arguments() -> None:
    """A function of the wrong arity."""


class Layer(nn.Linear):
    """A network of the user's, whose errors are the user's."""

    def forward(self, *inputs: Any) -> Tensor:
        """The layer."""
        return super().forward(*inputs)


SCALARS = (
    constant("None", None),
    constant("'text'", "text"),
    constant("''", ""),
    constant("b'bytes'", b"bytes"),
    constant("True", True),
    constant("False", False),
    constant("nan", math.nan),
    constant("inf", math.inf),
    constant("-inf", -math.inf),
    constant("-1", -1),
    constant("0", 0),
    constant("1", 1),
    constant("3", 3),
    constant("2.5", 2.5),
    constant("2.0", 2.0),
    constant("-0.5", -0.5),
    constant("0.5", 0.5),
    constant("1e-30", 1e-30),
    constant("1+2j", 1 + 2j),
    constant("np.int64(2)", np.int64(2)),
    constant("np.float32(0.5)", np.float32(0.5)),
    constant("np.bool_(True)", np.bool_(True)),
)

CONTAINERS = (
    Value("[]", lambda w, v: []),
    Value("[1.0, 2.0]", lambda w, v: [1.0, 2.0]),
    Value("[None]", lambda w, v: [None]),
    constant("()", ()),
    Value("{}", lambda w, v: {}),
    Value("{'x': 1}", lambda w, v: {"x": 1}),
    Value("iter([])", lambda w, v: iter([])),
    Value("np.array(3)", lambda w, v: np.array(3)),
    Value("an array of objects", lambda w, v: np.array(["a", None], dtype=object)),
    Value("torch.tensor(0.5)", lambda w, v: torch.tensor(0.5)),
    Value("torch.tensor(3)", lambda w, v: torch.tensor(3)),
    Value("torch.empty(0)", lambda w, v: torch.empty(0)),
    Value("torch.ones(3, 2)", lambda w, v: torch.ones(3, 2)),
)

OBJECTS = (
    Value("object()", lambda w, v: object()),
    constant("a function of no arguments", no_arguments),
    constant("the class Normal", Normal),
    Value("a VAE", lambda w, v: w.vae),
    Value("a source", lambda w, v: w.source),
    Value("a prior", lambda w, v: w.prior),
    Value("a distribution", lambda w, v: w.base),
    Value("a linear layer", lambda w, v: Layer(1, 1)),
    Value("a generator", lambda w, v: torch.Generator()),
    Value("a table", lambda w, v: Frame(w.x)),
)

COMMON = (*SCALARS, *CONTAINERS, *OBJECTS)


def with_bad(x: Tensor, number: float) -> Tensor:
    """A copy whose second row holds a number."""
    x = x.clone()
    x.view(len(x), -1)[min(1, len(x) - 1), 0] = number
    return x


def of_tensor(
    *,
    nan: Any = False,
    infinite: Any = ...,
    empty: Any = False,
    rank: Any = False,
    array: Any = None,
    whole: Any = None,
    rows: Any = None,
    width: Any = None,
    cast: Any = None,
    complex_numbers: Any = False,
) -> tuple[Value, ...]:
    """Tensors made from a valid one of shape ``(N, ...)``, with whether each is valid."""
    return (
        Value("with NaN in a row", lambda w, v: with_bad(v, math.nan), nan),
        Value(
            "with infinity in a row",
            lambda w, v: with_bad(v, math.inf),
            nan if infinite is ... else infinite,
        ),
        Value("no rows", lambda w, v: v[:0], empty),
        Value("one row", lambda w, v: v[:1], None),
        Value("one row less", lambda w, v: v[:-1], rows),
        Value("twice the rows", lambda w, v: torch.cat([v, v]), rows),
        Value("without its first axis", lambda w, v: v[0], rank),
        Value("with another axis at the end", lambda w, v: v[..., None], rank),
        Value("with another axis in front", lambda w, v: v[None], rank),
        Value("one column more", lambda w, v: torch.cat([v, v[..., :1]], -1), width),
        Value("as complex numbers", lambda w, v: v.to(torch.complex64), complex_numbers),
        Value("as bool", lambda w, v: v > 0, complex_numbers),
        Value("as float64", lambda w, v: v.double(), cast),
        Value("as float16", lambda w, v: v.half(), cast),
        Value("as bfloat16", lambda w, v: v.bfloat16(), cast),
        Value("as int64", lambda w, v: (10 * v).long(), whole),
        Value("as uint8", lambda w, v: (10 * v).abs().byte(), whole),
        Value("as an array", lambda w, v: v.numpy(), array),
        Value("as an array of float64", lambda w, v: v.double().numpy(), array),
        Value("as a read-only array", lambda w, v: _read_only(v), array),
        Value("as a list", lambda w, v: v.tolist(), array),
        Value("as a tuple of rows", lambda w, v: tuple(v), None),
        Value("as strings", lambda w, v: np.array(v.tolist()).astype(str), complex_numbers),
        Value("with a gradient", lambda w, v: v.clone().requires_grad_(), None),
        Value("expanded", lambda w, v: v[:1].expand_as(v), None),
    )


def _read_only(x: Tensor) -> Any:
    array = x.numpy().copy()
    array.setflags(write=False)
    return array


BATCHES = (  # a user's loader yields such, instead of a tensor
    Value("a tuple with labels", lambda w, v: (v, torch.arange(len(v))), None),
    Value("a dict", lambda w, v: {"x": v}, None),
    Value("a mapping of its own type", lambda w, v: Batch(x=v), None),
    Value("a dict with a number", lambda w, v: {"x": v, "t": torch.tensor(3.0)}, None),
    Value("a table of its rows", lambda w, v: Frame(v), None),
)

DATASETS = (
    Value("a dataset", lambda w, v: TensorDataset(v), None),
    Value("a loader", lambda w, v: DataLoader(TensorDataset(v), 8), None),
    Value("a list of batches", lambda w, v: list(v.split(8)), None),
    Value("a one-shot iterator", lambda w, v: iter(list(v.split(8))), None),
    Value("a dataset without an end", lambda w, v: Endless(), None),
    Value("a loader without an end", lambda w, v: DataLoader(Endless(), 8), None),
    Value("a list of batches of unlike widths", lambda w, v: [v[:8], v[8:16, :2]], None),
    Value("a list with None", lambda w, v: [v[:8], None], False),
)

LAYERS = (
    constant("a function of nothing", no_arguments, None),
    Value("a function to None", lambda w, v: lambda *a, **k: None, False),
    Value("a function to a number", lambda w, v: lambda *a, **k: 1.0, False),
    Value("a function to text", lambda w, v: lambda *a, **k: "text", False),
    Value("a function to a tuple", lambda w, v: lambda *a, **k: (v(*a, **k),), False),
    Value("a function that raises", lambda w, v: raising, None),
)


def raising(*_: Any, **__: Any) -> None:
    """A user's function with a bug of its own."""
    raise ZeroDivisionError("the user's own")


def altered(change: Callable[[Tensor], Any]) -> Callable[[World, Any], Any]:
    """A function whose result is that of the valid one, changed."""

    def make(world: World, valid: Any) -> Any:
        return lambda *arguments, **options: change(valid(*arguments, **options))

    return make


TO_LOG_R = (
    Value("to a scalar tensor", altered(lambda t: t.sum()), False),
    Value("to one row less", altered(lambda t: t[..., :-1]), False),
    Value("to a column", altered(lambda t: t[..., None]), False),
    Value("to NaN", altered(lambda t: t * math.nan), False),
    Value("to an array", altered(lambda t: t.detach().numpy()), None),
    Value("to complex numbers", altered(lambda t: t.to(torch.complex64)), None),
    Value("to whole numbers", altered(lambda t: t.long()), None),
    Value("to float64", altered(lambda t: t.double()), None),
    Value("without a gradient", altered(lambda t: t.detach()), None),
)

TO_ROWS = (
    Value("to a scalar tensor", altered(lambda t: t.sum()), False),
    Value("to one row less", altered(lambda t: t[:-1]), False),
    Value("to NaN", altered(lambda t: t * math.nan), False),
    Value("to an array", altered(lambda t: t.detach().numpy()), None),
    Value("to complex numbers", altered(lambda t: t.to(torch.complex64)), None),
    Value("to whole numbers", altered(lambda t: t.long()), None),
    Value("to float64", altered(lambda t: t.double()), None),
    Value("without a gradient", altered(lambda t: t.detach()), None),
)


def normal(*shape: int) -> Independent:
    """N(0, I) of a shape, as one event."""
    return Independent(Normal(torch.zeros(shape), torch.ones(shape)), len(shape))


class Wrong:
    """A prior of a type of its own, whose samples are not tensors."""

    def sample(self, sample_shape: Any = ()) -> Any:
        """Nothing."""
        return None


DISTRIBUTIONS = (
    Value("with a batch shape", lambda w, v: Normal(torch.zeros(2), 1.0), None),
    Value("of another width", lambda w, v: normal(3), None),
    Value("of a scalar", lambda w, v: Normal(0.0, 1.0), None),
    Value("of codes", lambda w, v: Categorical(logits=torch.zeros(4)), None),
    Value("whose samples are None", lambda w, v: Wrong(), None),
)
