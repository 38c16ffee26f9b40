"""Samplers of a loader, and random generators that it has of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def samplers_of(loader: Any) -> tuple[Any, Any, Any]:  # noqa: ANN401
    """Returns the sampler, the batch sampler and its sampler of a loader; ``None`` where it has none."""
    batches = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)


def own_generators(loader: Any) -> list[torch.Generator]:  # noqa: ANN401
    """Returns a loader's own generators, which the global state does not cover."""
    owners = (loader, *samplers_of(loader))
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners)}
    return [g for g in found.values() if isinstance(g, torch.Generator)]


@contextmanager
def own_generators_restored(loader: Any) -> Iterator[list[torch.Generator]]:  # noqa: ANN401
    """Context after which a loader's own generators, which it yields, are as they were."""
    own = [(generator, generator.get_state()) for generator in own_generators(loader)]
    try:
        yield [generator for generator, _ in own]
    finally:
        for generator, state in own:
            generator.set_state(state)
