"""The rule of the fuzz suite: what a call may do, and what is a finding.

A call either returns the documented result or raises an exception of ours. An exception is *ours*
if a ``raise`` in a file of the package raised it, and it is *the user's own* if it comes out of the
user's network. Whatever happens, the VAE stays bit-identical; after an exception the prior and the
files are as before, and if an argument was invalid, so are the global generators.
"""

from __future__ import annotations

import dis
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from fuzz.world import World, modes_of, settings_of, switches
from helpers.toys import everything

import ncprior

PACKAGE = Path(ncprior.__file__).resolve().parent
OURS = (str(PACKAGE), str(PACKAGE.parent / "adapters"))
TESTS = Path(__file__).resolve().parents[1]
USERS = (
    str(TESTS / "helpers"),
    str(TESTS / "fuzz" / "world.py"),
    str(TESTS / "fuzz" / "values.py"),
    str(TESTS / "fuzz" / "kinds.py"),
)

# Python and torch name the user's own function or module.
USERS_WORDS = (
    "no_arguments() takes",
    "<lambda>() ",
    "forward() missing",
    "forward() takes",
    'missing the required "forward" function',
)

TALLY: Counter[str] = Counter()  # of all calls of this process, by outcome

FOUND: list[Finding] = []  # by all calls of this process

# Most severe first.
SEVERITY = (
    "crash",
    "the VAE changed",
    "hang",
    "the prior changed",
    "files changed",
    "switches changed",
    "accepted in silence",
    "cryptic",
    "generators moved",
    "refused though valid",
)


class Hang(BaseException):
    """A call took longer than its limit."""


class Finding(NamedTuple):
    """A call that broke the rule.

    Attributes:
        call: The public name.
        arguments: The names of the replaced arguments.
        kind: One of ``SEVERITY``.
        values: The replaced values, in words.
        detail: The exception or the change.
    """

    call: str
    arguments: tuple[str, ...]
    kind: str
    values: tuple[str, ...]
    detail: str

    def __str__(self) -> str:
        given = ", ".join(f"{a}={v}" for a, v in zip(self.arguments, self.values, strict=True))
        return f"{self.kind}: {self.call}({given}): {self.detail}"


class Outcome(NamedTuple):
    """How a call ended: ``returned``, ``ours``, ``user``, ``memory``, ``cryptic`` or ``hang``."""

    kind: str
    detail: str = ""


@contextmanager
def time_limit(seconds: float, cpu: float) -> Iterator[None]:
    """Raises :class:`Hang` inside after some seconds by the clock, or of the processor."""

    def stop(*_: Any) -> None:
        raise Hang

    before = {number: signal.signal(number, stop) for number in _TIMERS}
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)  # again, should a handler swallow it
    signal.setitimer(signal.ITIMER_PROF, cpu, 0.2)
    try:
        yield
    finally:
        for number, timer in _TIMERS.items():
            _disarm(number, timer, before[number])


_TIMERS = {signal.SIGALRM: signal.ITIMER_REAL, signal.SIGPROF: signal.ITIMER_PROF}


def _disarm(number: int, timer: int, handler: Any) -> None:
    """Switches a timer off, even if it goes off meanwhile, as where much memory is freed."""
    while True:
        with suppress(Hang):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
            return


def attempt(function: Callable[[], Any], limit: float, cpu: float = 0.0) -> Outcome:
    """Calls a function, uses what it returns up, and says how it ended.

    Arguments:
        function: The call.
        limit: Seconds by the clock.
        cpu: Seconds of the processor; 0 for no limit.
    """
    try:
        with warnings.catch_warnings(), time_limit(limit, cpu):
            warnings.simplefilter("ignore")
            use(function())
    except Hang:
        return Outcome("hang", f"longer than {cpu or limit} s")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 (every kind is judged)
        return judged(error)
    return Outcome("returned")


def use(result: Any) -> None:
    """Uses up to five items of an iterator, and enters a context."""
    if isinstance(result, Iterator):
        for _ in zip(range(5), result, strict=False):
            pass
    elif hasattr(result, "__enter__") and not isinstance(result, torch.nn.Module):
        with result:
            pass


def judged(error: BaseException) -> Outcome:
    """Whose an exception is."""
    frames = [(tb.tb_frame.f_code.co_filename, tb) for tb in _frames(error.__traceback__)]
    ours = [i for i, (file, _) in enumerate(frames) if is_ours(file)]
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if ours:
        file, tb = frames[ours[-1]]
        place = f"{Path(file).relative_to(PACKAGE.parent)}:{tb.tb_lineno}"
        text = f"{text} [{place}]"
    if is_out_of_memory(error):
        return Outcome("memory", text)
    if isinstance(error, SystemExit) or (isinstance(error, OSError) and error.filename):
        return Outcome("ours", text)  # argparse, or the operating system, which names the file
    if any(file.startswith(USERS) for file, _ in frames[(ours[-1] if ours else 0) :]):
        return Outcome("user", text)
    if ours and ours[-1] == len(frames) - 1 and _is_raise(frames[-1][1]) and str(error):
        return Outcome("ours", text)
    if any(words in str(error) for words in USERS_WORDS):
        return Outcome("user", text)
    return Outcome("cryptic", text)


def is_ours(file: str) -> bool:
    """Whether a file is of the package."""
    return str(Path(file).resolve()).startswith(OURS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused."""
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _frames(tb: TracebackType | None) -> Iterator[TracebackType]:
    while tb is not None:
        yield tb
        tb = tb.tb_next


def _is_raise(tb: TracebackType) -> bool:
    return dis.opname[tb.tb_frame.f_code.co_code[tb.tb_lasti]] == "RAISE_VARARGS"


class State(NamedTuple):
    """What a call must leave as it is."""

    vae: Any
    heads: Any
    settings: Any
    modes: Any
    files: Any
    switches: Any

    @classmethod
    def of(cls, world: World) -> State:
        """Takes the state of a world."""
        # A float becomes its text: NaN is then equal to NaN.
        return cls(
            repr(everything(world.vae)),
            repr([(n, t.tolist()) for n, t in world.prior.heads.state_dict().items()]),
            settings_of(world.prior),
            modes_of(world.prior),
            world.files(),
            switches(),
        )


def check(
    call: str,
    world: World,
    function: Callable[[], Any],
    replaced: dict[str, tuple[str, bool | None]],
    *,
    trains: bool,
    gated: bool,
    limit: float,
) -> list[Finding]:
    """Makes a call and holds it to the rule.

    Arguments:
        call: The public name.
        world: The world of the call.
        function: The call.
        replaced: By argument, the value in words and whether it is valid (``None``: unsure).
        trains: Whether the call may change the prior if it succeeds.
        gated: Whether an invalid argument is one that can be seen before any work.
        limit: Seconds.
    """
    huge = any("10**12" in text or "an end" in text for text, _ in replaced.values())
    before, started = State.of(world), time.perf_counter()
    outcome = attempt(function, 0.3 if huge else limit)
    after = State.of(world)
    TALLY["calls"] += 1
    TALLY["malformed"] += any(valid is False for _, valid in replaced.values())
    TALLY[outcome.kind] += 1
    TALLY["milliseconds"] += round(1000 * (time.perf_counter() - started))
    failed = outcome.kind != "returned"
    # A FloatingPointError says that training diverged; what was best until then is kept.
    stopped = outcome.kind in ("ours", "cryptic") and "FloatingPointError" not in outcome.detail
    invalid = any(valid is False for _, valid in replaced.values())
    all_valid = all(valid for _, valid in replaced.values())
    leftovers = set(after.files or ()) - set(before.files or ())
    broken = {
        "the VAE changed": before.vae != after.vae,
        "hang": outcome.kind == "hang" and not huge,
        "the prior changed": (not trains or stopped)
        and (before.heads, before.settings) != (after.heads, after.settings)
        or (not trains and before.modes != after.modes),  # training begins with training mode
        "files changed": (stopped and before.files != after.files)
        or any(name.endswith(".tmp") for name in leftovers),
        "switches changed": before.switches != after.switches and outcome.kind != "hang",
        "accepted in silence": invalid and not failed,
        "cryptic": outcome.kind == "cryptic" or (outcome.kind == "memory" and not huge),
        "generators moved": invalid
        and gated
        and outcome.kind == "ours"
        and world.generators_moved(),
        "refused though valid": all_valid and outcome.kind in ("ours", "cryptic"),
    }
    names, values = tuple(replaced), tuple(text for text, _ in replaced.values())
    found = [
        Finding(call, names, kind, values, outcome.detail)
        for kind, is_so in broken.items()
        if is_so
    ]
    if any(finding.kind == "cryptic" for finding in found):
        found = [f for f in found if f.kind != "refused though valid"]
    return found
