"""Samplers that a configuration can name: entries ``{"kind": name, "config": arguments}``.

Only functions of the table here are called when a file is loaded, with numbers and with samplers
of the same table. All arguments are validated first.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from ncprior.samplers.base import Sampler
from ncprior.samplers.budgeted import budgeted_rejection
from ncprior.samplers.compose import at_temperature, sequence
from ncprior.samplers.identity import Composition
from ncprior.samplers.langevin import langevin
from ncprior.samplers.mixture import within_components
from ncprior.samplers.rejection import independence, rejection
from ncprior.samplers.sir import sir
from ncprior.samplers.smc import tempered_smc
from ncprior.saving.checks import SavedFile, Validators, is_count, is_number
from ncprior.utils.require import described

_SIMPLE = {
    f.__name__: f
    for f in (sir, budgeted_rejection, langevin, tempered_smc, rejection, independence)
}

_COMPOSED = {f.__name__: f for f in (sequence, at_temperature, within_components)}

KINDS: dict[str, Callable[..., Any]] = {**_SIMPLE, **_COMPOSED}

_MOST_PARTS = 16  # samplers in one entry

_NOT_SAVED = ("prior", "log_ratio", "init")  # arguments of a draw

# Larger numbers would seem not to end.
_ARGUMENTS: Validators = {
    "num_proposals": lambda value: is_count(value, 1, 10**6),
    "chunk_size": lambda value: value is None or is_count(value, 1, 2**22),
    "num_steps": lambda value: is_count(value, 0, 10**5),
    "step_size": lambda value: is_number(value, 0) and value > 0,
    "num_particles": lambda value: is_count(value, 1, 10**5),
    "num_moves": lambda value: is_count(value, 1, 10**4),
    "num_leapfrogs": lambda value: is_count(value, 1, 10**4),
    "max_temperatures": lambda value: is_count(value, 1, 10**4),
    "ess_fraction": lambda value: is_number(value, 0, 1) and 0 < value < 1,
    "log_bound": lambda value: is_number(value, -1e300),
    "max_tries": lambda value: is_count(value, 1, 10**6),
    "temperature": lambda value: is_number(value, 0) and value > 0,
    **dict.fromkeys(
        ("share_proposals", "share_particles", "adjusted"), lambda value: type(value) is bool
    ),
}


def sampler_entry(sampler: Sampler) -> dict[str, Any] | None:
    """Returns the entry of a sampler, or ``None`` if none can be written that loading accepts."""
    try:
        entry = _entry(sampler)
        _built(entry, [_MOST_PARTS])
    except (TypeError, ValueError):
        return None
    return entry


def build_sampler(saved: SavedFile, entry: Any) -> Sampler:  # noqa: ANN401
    """Builds a sampler from its entry, after a check of all of it."""
    try:
        return _built(entry, [_MOST_PARTS])
    except (TypeError, ValueError) as error:
        saved.fail(f"its sampler {error}")


def _entry(sampler: Any) -> dict[str, Any]:  # noqa: ANN401
    call = sampler.made_by if isinstance(sampler, Composition) else sampler
    call = call if isinstance(call, partial) else partial(call)
    kind = getattr(call.func, "__name__", "")
    if KINDS.get(kind) is not call.func:
        raise TypeError("is of no kind of the table")
    given = inspect.signature(call.func).bind_partial(*call.args, **call.keywords).arguments
    return {"kind": kind, "config": {name: _plain(value) for name, value in given.items()}}


def _plain(value: Any) -> Any:  # noqa: ANN401
    """An argument as JSON has it; numbers of NumPy become numbers of Python."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, tuple):
        return [_entry(part) for part in value]
    if callable(value):
        return _entry(value)
    whole = hasattr(value, "__index__") or not isinstance(value, Real)
    return operator.index(value) if whole else float(value)


def _built(entry: Any, parts_left: list[int]) -> Sampler:  # noqa: ANN401
    """Builds a sampler; an error names what is wrong with its entry."""
    match entry:
        case {"kind": str(kind), "config": dict(config), **more} if kind in KINDS and not more:
            parts_left[0] -= 1
        case _:
            raise ValueError(f"must be one of {', '.join(KINDS)}; got {described(entry)}")
    if parts_left[0] < 0:
        raise ValueError(f"has more than {_MOST_PARTS} parts")
    _check_names(kind, config)
    given = {name: _argument(name, value, parts_left) for name, value in config.items()}
    if kind in _SIMPLE:
        return partial(_SIMPLE[kind], **given)
    parts = given.pop("then", [])
    return sequence(given["first"], *parts) if kind == "sequence" else _COMPOSED[kind](**given)


def _check_names(kind: str, config: Mapping[str, Any]) -> None:
    """Validates that an entry has the arguments that a kind needs, and no others."""
    parameters = inspect.signature(KINDS[kind]).parameters.items()
    known = {name: p for name, p in parameters if name not in _NOT_SAVED}
    needed = {
        n for n, p in known.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    }
    if unknown := sorted(config.keys() - known.keys()):
        raise ValueError(f"{kind} has unknown arguments: {', '.join(unknown)}")
    if missing := sorted(needed - config.keys()):
        raise ValueError(f"{kind} lacks its {', '.join(missing)}")


def _argument(name: str, value: Any, parts_left: list[int]) -> Any:  # noqa: ANN401
    """Returns an argument of a sampler; an error names the one that is not valid."""
    if name in ("sampler", "first"):
        return _built(value, parts_left)
    if name == "then" and isinstance(value, list):
        return [_built(part, parts_left) for part in value]
    if name not in _ARGUMENTS or not _ARGUMENTS[name](value):
        raise ValueError(f"has no valid {name}; got {described(value)}")
    return value
