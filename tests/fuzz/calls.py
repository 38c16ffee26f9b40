"""The table of public calls, and the engine that replaces their arguments.

The files ``calls_….py`` fill the table: for each public name a valid call on tiny models, which
takes milliseconds, with the kind of each argument.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz.kinds import Kind
from fuzz.rule import Finding, check
from fuzz.values import Value
from fuzz.world import World
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

Build = Callable[[World], tuple[Callable[..., Any], dict[str, Any]]]


@dataclass(frozen=True)
class Call:
    """A public function, class or method.

    Attributes:
        name: The public name, such as ``ncprior.NCPrior.sample``.
        build: Returns the function and the valid arguments; ``"*name"`` is a tuple of positional
            ones.
        kinds: The kind of each argument that is replaced.
        trains: Whether a successful call may change the prior.
        slow: Whether the valid call takes more than some ten milliseconds.
        valid: Whether the call is made with valid arguments, too.
        limit: Seconds before a call counts as hanging.
    """

    name: str
    build: Build
    kinds: Mapping[str, Kind]
    trains: bool = False
    slow: bool = False
    valid: bool = True
    limit: float = 4.0


TABLE: dict[str, Call] = {}


def call(
    name: str, /, *, options: Mapping[str, Any] | None = None, **kinds: Kind
) -> Callable[[Build], Build]:
    """Adds a call to the table.

    Arguments:
        name: The public name.
        options: Fields of :class:`Call`.
        kinds: The kind of each argument.
    """

    def add(build: Build) -> Build:
        assert name not in TABLE, name
        TABLE[name] = Call(name, build, kinds, **(options or {}))
        return build

    return add


class Replacement(NamedTuple):
    """A value in the place of an argument."""

    argument: str
    value: Value


def single_replacements(entry: Call) -> Iterator[tuple[Replacement, ...]]:
    """Every value in the place of every argument, one at a time."""
    for argument, kind in entry.kinds.items():
        for value in kind.pool:
            yield (Replacement(argument, value),)


def make(entry: Call, replacements: tuple[Replacement, ...] = ()) -> list[Finding]:
    """Makes a call with some arguments replaced, and holds it to the rule."""
    world = World()
    try:
        function, arguments = entry.build(world)
        replaced: dict[str, tuple[str, bool | None]] = {}
        for argument, value in replacements:
            try:
                given = value.make(world, arguments.get(argument))
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError):
                return []  # there is no such value for this argument
            kind = entry.kinds[argument]
            valid = verdict_of(kind, given) if value.valid is ... else value.valid
            arguments[argument] = given
            replaced[argument] = (value.name, valid)
        idle = {
            name for name in replaced if entry.kinds[name].is_work and _is_zero(arguments[name])
        }
        if idle:  # a function that returns nonsense is not called
            replaced |= {
                name: (text, valid or None)
                for name, (text, valid) in replaced.items()
                if name not in idle
            }
        world.generators = world.generators_now()  # building the call may have drawn
        return check(
            entry.name,
            world,
            lambda: invoke(function, arguments),
            replaced,
            trains=entry.trains,
            gated=all(entry.kinds[argument].gated for argument, _ in replacements),
            limit=entry.limit,
        )
    finally:
        world.close()


def verdict_of(kind: Kind, value: Any) -> bool | None:
    """Whether a value is valid; it is open for a value that the kind cannot look at."""
    try:
        return kind.verdict(value)
    except (TypeError, ValueError):
        return None


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | np.integer) and value == 0


def invoke(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls a function; the names of positional arguments begin with a star."""
    positional: list[Any] = []
    for name, value in arguments.items():
        if name.startswith("**"):
            positional.append(value)
        elif name.startswith("*"):
            positional.extend(value if isinstance(value, tuple) else (value,))
    keywords = {name: value for name, value in arguments.items() if not name.startswith("*")}
    return function(*positional, **keywords)


def random_values(kind: Kind) -> st.SearchStrategy[Value]:
    """Values of the pool of a kind, and random numbers and tensors where they fit."""
    pools: list[st.SearchStrategy[Value]] = []
    if kind.pool:
        pools.append(st.sampled_from(kind.pool))
    if kind.numbers:
        numbers = st.integers(-5, 40) | st.floats() | st.integers(-(2**70), -(2**31))
        pools.append(numbers.map(lambda n: Value(repr(n), lambda w, v: n)))
    if kind.tensors:
        pools.append(random_tensors())
    return st.one_of(pools)


def random_tensors() -> st.SearchStrategy[Value]:
    """Tensors of any dtype and shape with up to four axes."""
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 24]), max_size=4).map(tuple)
    dtypes = st.sampled_from(
        [torch.float32, torch.float64, torch.int32, torch.bool, torch.float16]
    )

    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        valid = (... if 0 in shape else None) if shape else False  # the kind knows about no rows
        return Value(
            f"torch.ones({shape}, {dtype})", lambda w, v: torch.ones(shape, dtype=dtype), valid
        )

    return st.builds(tensor, shapes, dtypes)


@st.composite
def random_replacements(draw: st.DrawFn, entry: Call) -> tuple[Replacement, ...]:
    """One or two arguments of a call, and values for them."""
    names = [
        name for name, kind in entry.kinds.items() if kind.pool or kind.numbers or kind.tensors
    ]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    return tuple(Replacement(name, draw(random_values(entry.kinds[name]))) for name in chosen)


def explore(entry: Call, *, examples: int = 8, seconds: float | None = None) -> list[Finding]:
    """Makes malformed calls and returns the findings, the smallest of each group.

    Arguments:
        entry: The call.
        examples: The number of random calls; the same ones every time.
        seconds: Instead, the time to spend: first on every single replacement, then on random
            ones.
    """
    found: list[Finding] = []
    if entry.valid:
        found += make(entry)
    if not entry.kinds:
        return smallest(found)
    if seconds is None:
        _try_random(entry, found, examples, 0)
        return smallest(found)
    end = time.perf_counter() + seconds
    for replacements in single_replacements(entry):
        found += make(entry, replacements)
    number = 0
    while time.perf_counter() < end:
        number += 1
        _try_random(entry, found, 25, number)
    return smallest(found)


SETTINGS = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def _try_random(entry: Call, found: list[Finding], examples: int, number: int) -> None:
    @seed(zlib.crc32(entry.name.encode()) + number)
    @settings(SETTINGS, max_examples=examples)
    @given(random_replacements(entry))
    def run(replacements: tuple[Replacement, ...]) -> None:
        found.extend(make(entry, replacements))

    run()


def smallest(found: list[Finding]) -> list[Finding]:
    """One finding of each group of call, arguments and kind: that of the fewest characters.

    A group of two arguments is left out if one of them alone has the same kind of finding.
    """
    groups: dict[tuple[Any, ...], Finding] = {}
    for finding in sorted(found, key=lambda f: (len(f.arguments), len(str(f)))):
        groups.setdefault((finding.call, finding.arguments, finding.kind), finding)
    alone = {(f.call, f.arguments[0], f.kind) for f in groups.values() if len(f.arguments) == 1}
    always = {(f.call, f.kind) for f in groups.values() if not f.arguments}
    return [
        f
        for f in groups.values()
        if (len(f.arguments) < 2 or not any((f.call, a, f.kind) in alone for a in f.arguments))
        and (not f.arguments or (f.call, f.kind) not in always)
    ]
