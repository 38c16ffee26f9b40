"""Streams of batches, epoch after epoch, whose position can be saved and restored exactly."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from ncprior.data.batches import iter_is_self, shuffled
from ncprior.data.generators import own_generators
from ncprior.utils.random_state import random_state, seeded, set_random_state
from ncprior.utils.require import require_flags

_END = object()


class Stream:
    """An endless iterator over the batches of ``data``, shuffled anew every epoch.

    The randomness of the data (order, transforms) has generator states of its own, separate from
    the caller's. The position is their state at the start of the epoch and the number of batches
    since: to restore it, the epoch is started again from that state and batches are skipped.

    Arguments:
        data: A tensor or map-style dataset, which is split into batches; or a ``DataLoader`` or any
            other iterable of batches.
        batch_size: Rows per batch, where batches are made.
        resumable: Whether the position must be restorable.

    Raises:
        TypeError: If the data is none of these, or must be resumable and is a one-shot iterator.
        ValueError: If it must be resumable and is a ``DataLoader`` with persistent workers, whose
            generators cannot be saved.

    Example:
        >>> stream = Stream(torch.arange(10), batch_size=4)
        >>> [len(next(stream)) for _ in range(5)]
        [4, 4, 4, 4, 4]
    """

    def __init__(self, data: Any, batch_size: int, *, resumable: bool = False) -> None:  # noqa: ANN401
        require_flags(resumable=resumable)
        self.loader = shuffled(data, batch_size)
        if resumable:
            require_restartable(data)
        self._iterator: Iterator[Any] = iter(())
        self._epoch_start: dict[str, Any] | None = None
        self._taken = 0
        with seeded(int(torch.randint(2**31, ()))):
            self._generators = random_state()  # the data's, between batches

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:  # noqa: ANN401
        """Returns the next batch; stops only at the end of a one-shot iterator."""
        outside = random_state()
        set_random_state(self._generators)
        try:
            batch = self._draw()
        finally:
            self._generators = random_state()
            set_random_state(outside)
        if batch is _END:
            if self._taken == 0:
                raise ValueError("The data has no batches.")
            raise StopIteration
        self._taken += 1
        return batch

    def _draw(self) -> Any:  # noqa: ANN401
        if self._epoch_start is None:
            self._start_epoch()
        batch = next(self._iterator, _END)
        if batch is _END and not iter_is_self(self.loader):
            self._start_epoch()
            batch = next(self._iterator, _END)
        return batch

    def state(self) -> dict[str, Any]:
        """Returns the position in the data."""
        return {"epoch_start": self._epoch_start, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position that :meth:`state` returned."""
        start = state["epoch_start"]
        self._generators = start["generators"]
        for generator, own in zip(own_generators(self.loader), start["own"], strict=True):
            generator.set_state(own)
        for _ in range(state["taken"]):
            next(self)

    def _start_epoch(self) -> None:
        self._epoch_start = {
            "generators": random_state(),
            "own": [generator.get_state() for generator in own_generators(self.loader)],
        }
        self._iterator, self._taken = iter(self.loader), 0


def require_restartable(data: Any) -> None:  # noqa: ANN401
    """Validates that an epoch of the data can be read again exactly, as a checkpoint needs it.

    Raises:
        TypeError: If the data is a one-shot iterator.
        ValueError: If it is a ``DataLoader`` with persistent workers.
    """
    if iter_is_self(data):
        raise TypeError(
            f"A checkpoint needs data that can be read again from its start; got a one-shot "
            f"{type(data).__name__}. Pass a tensor, a dataset, a DataLoader or a list."
        )
    if isinstance(data, DataLoader) and data.num_workers > 0 and data.persistent_workers:
        raise ValueError(
            "A checkpoint needs a DataLoader with new workers in every epoch, as the random state "
            "of persistent workers cannot be saved; got persistent_workers=True. Pass "
            "persistent_workers=False, or no checkpoint."
        )
