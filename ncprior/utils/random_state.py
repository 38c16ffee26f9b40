"""Random states of torch, NumPy and Python, saved, restored and seeded together."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Returns the states of the generators of torch (all devices), NumPy and Python."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": list(np.random.get_state(legacy=True)),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores the state of the generators, as returned by :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context with seeded generators of torch, NumPy and Python; they are restored at the end.

    Arguments:
        seed: The seed, used modulo 2**32.
    """
    outside = random_state()
    seed %= 2**32
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        set_random_state(outside)
