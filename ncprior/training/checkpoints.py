"""Checks of a checkpoint, all of which it passes before anything of a training is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import length_hint
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ncprior.data.generators import own_generators
from ncprior.data.stream import Stream
from ncprior.utils.random_state import is_generator_state, is_random_state

Validators: TypeAlias = Mapping[str, Callable[[Any], bool]]  # by key: is its value valid?

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam and AdamW, per parameter


def require_valid(saved: Mapping[str, Any], validators: Validators) -> None:
    """Validates the content of a checkpoint.

    Raises:
        ValueError: If an entry is missing or not valid. The message names all of them.
    """
    wrong = [k for k, valid in validators.items() if k not in saved or not valid(saved[k])]
    if wrong:
        raise ValueError(
            f"The checkpoint is damaged or belongs to another training: its {', '.join(wrong)} "
            f"cannot be used here. Build the heads or the energy as they were, or pass another "
            f"checkpoint file."
        )


def is_like(value: Any, template: Any) -> bool:  # noqa: ANN401
    """Returns whether a value has the keys, lengths, types, shapes and dtypes of another."""
    if isinstance(template, Tensor):
        return (
            isinstance(value, Tensor)
            and value.shape == template.shape
            and value.dtype == template.dtype
        )
    if isinstance(template, Mapping):
        same = isinstance(value, dict) and value.keys() == template.keys()
        return same and all(is_like(value[key], part) for key, part in template.items())
    if isinstance(template, list | tuple):
        same = type(value) is type(template) and len(value) == len(template)
        return same and all(map(is_like, value, template))
    return type(value) is type(template)


def is_finite(tensors: Mapping[Any, Any]) -> bool:
    """Returns whether all tensors of floating-point numbers are finite."""
    floats = (t for t in tensors.values() if isinstance(t, Tensor) and t.is_floating_point())
    return all(bool(torch.isfinite(t).all()) for t in floats)


def is_step(value: Any, last: int) -> bool:  # noqa: ANN401
    """Returns whether a value is the number of a step up to the last one."""
    return type(value) is int and 0 <= value <= last


def is_plain(value: Any) -> bool:  # noqa: ANN401
    """Returns whether a value holds no tensors or arrays, which cannot be compared by ``==``."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def is_table(value: Any, width: int, whole: Sequence[int]) -> bool:  # noqa: ANN401
    """Returns whether a value is a history as a table, with whole numbers in some columns."""
    if not isinstance(value, Tensor) or value.dtype != torch.float64:
        return False
    if value.ndim != 2 or value.shape[1] != width:
        return False
    counts = value[:, list(whole)]
    return bool((counts.isfinite() & (counts == counts.round()) & (counts >= 0)).all())


def fits_optimizer(value: Any, optimizer: torch.optim.Optimizer, last: int) -> bool:  # noqa: ANN401
    """Returns whether a value has a state of Adam for parameters of an optimizer, up to a step.

    A fused step of Adam would write outside of states of other shapes. Hyperparameters are not
    looked at: those of the optimizer stay.
    """
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    return all(
        type(i) is int and i in parameters and _is_adam(state, parameters[i], last)
        for i, state in value["state"].items()
    )


def _is_adam(state: Any, parameter: Tensor, last: int) -> bool:  # noqa: ANN401
    template = {"step": torch.zeros(()), **dict.fromkeys(_MOMENTS, parameter)}
    if not is_like(state, template) or not is_finite(state):
        return False
    step = float(state["step"])
    return 0 <= step <= last and step.is_integer() and not bool((state["exp_avg_sq"] < 0).any())


def fits_stream(value: Any, stream: Stream, last: int) -> bool:  # noqa: ANN401
    """Returns whether a value is a place in data, with at most so many batches since its epoch."""
    match value:
        case {"epoch_start": {"generators": generators, "own": list(own)}, "taken": int(taken)}:
            has_rows = not isinstance(getattr(stream.loader, "dataset", None), IterableDataset)
            most = min(last, length_hint(stream.loader, last)) if has_rows else last
            whole = fits_loader(own, stream) and 0 <= taken <= most
            return whole and is_random_state(generators)
    return False


def fits_loader(value: Any, stream: Stream) -> bool:  # noqa: ANN401
    """Returns whether a value is a list of states of the own generators of a stream's loader."""
    mine = [generator.get_state() for generator in own_generators(stream.loader)]
    return is_like(value, mine) and all(map(is_generator_state, value))


def are_generators(value: Any, ranks: int) -> bool:  # noqa: ANN401
    """Returns whether a value is a list of the random states of so many ranks."""
    return isinstance(value, list) and len(value) == ranks and all(map(is_random_state, value))


def are_numbers(value: Any, length: int, kinds: Iterable[type] = (float,)) -> bool:  # noqa: ANN401
    """Returns whether a value is a list of so many numbers; they may be infinite."""
    return isinstance(value, list) and len(value) == length and {*map(type, value)} <= {*kinds}


def is_duration(value: Any) -> bool:  # noqa: ANN401
    """Returns whether a value is a number of seconds."""
    return type(value) is float and 0 <= value < math.inf
