"""Random generators that a loader has of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def own_generators(loader: Any) -> list[torch.Generator]:  # noqa: ANN401
    """Returns a loader's own generators, which the global state does not cover."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
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
