"""Random states of torch on all devices, NumPy and Python, saved, restored and seeded together."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ACCELERATORS = ("cuda", "xpu", "mps")

_NUMPY_WORDS = 624  # of the Mersenne Twister, in NumPy as in torch

_CPU_STATE = len(torch.Generator().get_state())  # bytes, for torch's generator on the CPU


def random_state() -> dict[str, Any]:
    """Returns the states of the generators of torch (all devices), NumPy and Python."""
    return {
        "torch": torch.get_rng_state(),
        **{name: _get(name) for name in _ACCELERATORS},
        "numpy": list(np.random.get_state(legacy=True)),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores the state of the generators, as returned by :func:`random_state`.

    States of devices that this machine does not have are left out.
    """
    torch.set_rng_state(state["torch"])
    for name in _ACCELERATORS:
        _set(name, state.get(name, []))
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])


def is_random_state(value: Any) -> bool:  # noqa: ANN401
    """Returns whether a value from a file is a whole state of :func:`random_state`.

    No generator is changed. Positions are compared with the length of the state, as the generators
    of torch and NumPy would read outside of it.
    """
    match value:
        case {
            "torch": Tensor() as cpu,
            "numpy": ["MT19937", np.ndarray() as words, int(position), 0 | 1, float()],
            "python": (3, tuple() as numbers, None | float()) as python,
            **devices,
        }:
            sizes = words.shape == (_NUMPY_WORDS,) and 0 <= position <= _NUMPY_WORDS
            whole = {*map(type, numbers)} <= {int} and words.dtype == np.uint32
        case _:
            return False
    try:
        random.Random(0).setstate(python)
    except (OverflowError, TypeError, ValueError):
        return False
    on_cpu = is_generator_state(cpu) and len(cpu) == _CPU_STATE
    return sizes and whole and on_cpu and all(map(_is_device, devices.items()))


def is_generator_state(value: Any) -> bool:  # noqa: ANN401
    """Returns whether a value from a file is the state of a ``torch.Generator`` on any device."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
        return False
    if len(value) != _CPU_STATE:
        return 0 < len(value) < _CPU_STATE  # another device, which compares the length itself
    try:
        torch.Generator().set_state(value.clone())
    except RuntimeError:
        return False
    # As many words are left until the next block as there are behind the position, or fewer.
    left, position = int(value[8:12].view(torch.int32)), int(value[16:24].view(torch.int64))
    return left + position <= _NUMPY_WORDS + 1


def seed_for(purpose: str, seed: int) -> int:
    """Returns a seed of one purpose, derived from a common seed, so that purposes share no noise.

    Example:
        >>> seed_for("training rows", 0) != seed_for("held-out rows", 0)
        True
    """
    digest = hashlib.sha256(f"{purpose}: {seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def permutation(count: int, seed: int) -> Tensor:
    """Returns the numbers below a count in the order of a seed of their own, on the CPU."""
    generator = torch.Generator().manual_seed(int(seed))
    return torch.randperm(count, generator=generator, device="cpu")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context with seeded generators of torch, NumPy and Python; they are restored at the end.

    Devices that torch has not used yet stay as they are: ``torch.manual_seed`` would replace the seed
    that they begin with. One that is used for the first time inside begins anew at the end.

    Arguments:
        seed: The seed, used modulo 2**32.
    """
    outside = random_state()
    seed = int(seed) % 2**32
    torch.default_generator.manual_seed(seed)
    for name in filter(_is_used, _ACCELERATORS):
        _seed(name, seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        set_random_state(outside)
        for name in filter(_is_used, _ACCELERATORS):
            if not outside[name]:
                _seed(name, torch.initial_seed())


def _is_used(name: str) -> bool:
    """Whether torch has generators of a kind of device, which begin with its first use."""
    if name == "mps":
        return torch.backends.mps.is_available()
    return bool(getattr(torch, name).is_initialized())


def _seed(name: str, seed: int) -> None:
    torch.mps.manual_seed(seed) if name == "mps" else getattr(torch, name).manual_seed_all(seed)


def _get(name: str) -> list[Tensor]:
    if not _is_used(name):
        return []
    if name == "mps":
        return [torch.mps.get_rng_state()]
    states: list[Tensor] = getattr(torch, name).get_rng_state_all()
    return states


def _set(name: str, states: list[Tensor]) -> None:
    if name == "mps":
        if states and _is_used(name):
            torch.mps.set_rng_state(states[0])
    elif states:
        devices = getattr(torch, name)
        for i, state in zip(range(devices.device_count()), states, strict=False):
            devices.set_rng_state(state, i)


def _is_device(entry: tuple[Any, Any]) -> bool:
    name, states = entry
    known = name in _ACCELERATORS and isinstance(states, list)
    return known and all(map(is_generator_state, states))


@contextmanager
def reproducible() -> Iterator[None]:
    """Context that restores all generators, with convolutions that depend on no other row."""
    outside, cudnn = random_state(), torch.backends.cudnn
    exact = cudnn.flags(
        enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
    )
    try:
        with exact:
            yield
    finally:
        set_random_state(outside)
