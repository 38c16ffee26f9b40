"""Streams of batches, epoch after epoch, whose position can be saved and restored exactly."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from ncprior.data.rows import RowData, Rows, as_data, is_map_style
from ncprior.source import num_rows
from ncprior.utils.batches import map_tensors, moved, to_device
from ncprior.utils.random_state import permutation, random_state, seeded, set_random_state
from ncprior.utils.require import require_counts, require_flags, require_numbers

_END = object()

_MOST_ROWS = 2**17  # of held-out data without a length, which may be endless

_AHEAD = 2  # batches, which are read from the disk while another one is in use

_PROBED = 64  # rows, spread over the data, that tell whether data is the same


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
        self.loader = _batches(data, batch_size)
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


def own_generators(loader: Any) -> list[torch.Generator]:  # noqa: ANN401
    """Returns a loader's own generators, which the global state does not cover."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners)}
    return [g for g in found.values() if isinstance(g, torch.Generator)]


@overload
def split(data: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]: ...


@overload
def split(data: Any, fraction: float, seed: int) -> tuple[Any, Any] | None: ...  # noqa: ANN401


def split(data: Any, fraction: float, seed: int) -> tuple[Any, Any] | None:
    """Splits a tensor or a map-style dataset, shuffled, into a training and a held-out part.

    Arguments:
        data: The data, as for :class:`Stream`. Rows of an array are not copied.
        fraction: Fraction of held-out rows, between 0 and 1; there is at least one.
        seed: Seed of the shuffle.

    Returns:
        The two parts, or ``None`` for data without an index.

    Example:
        >>> [len(part) for part in split(torch.arange(100), 0.05, seed=0)]
        [95, 5]
    """
    require_numbers("(0, 1)", fraction=fraction)
    require_counts("(-1e18, 1e18)", seed=seed)
    data = as_data(data)
    if not isinstance(data, Tensor) and not is_map_style(data):
        return None
    rows = permutation(len(data), seed)
    count = max(1, round(fraction * len(data)))
    if count >= len(data):
        raise ValueError(f"{len(data)} rows cannot be split. Pass held_out= or more data.")
    held_out, train = rows[:count], rows[count:]
    if isinstance(data, Tensor):
        return data[train.to(data.device)], data[held_out.to(data.device)]
    if isinstance(data, Rows):
        return data.take(train), data.take(held_out)
    return Subset(data, train.tolist()), Subset(data, held_out.tolist())


def one_pass(
    data: Any,  # noqa: ANN401
    batch_size: int,
    device: torch.device | None = None,
) -> Iterable[Any]:
    """Returns the batches of one pass over ``data`` without shuffling, every row once.

    Arguments:
        data: A tensor or map-style dataset; or a ``DataLoader`` or list of batches, taken as they
            come.
        batch_size: Rows per batch, where batches are made.
        device: Device that batches are moved to, or ``None`` to leave them where they are.

    Returns:
        The batches; the pass can be repeated.

    Raises:
        TypeError: If the data is a one-shot iterator, or none of these.

    Example:
        >>> [len(batch) for batch in one_pass(torch.arange(10), 4)]
        [4, 4, 2]
    """
    if device is not None:
        return _OnDevice(one_pass(data, batch_size), device)
    require_counts(batch_size=batch_size)
    data = as_data(data)
    if isinstance(data, Tensor | RowData):
        return _InOrder(data, batch_size)
    if is_map_style(data):
        return DataLoader(data, int(batch_size), collate_fn=_collate)
    if iter_is_self(data):
        raise TypeError(
            f"Held-out data is read many times; got a one-shot {type(data).__name__}. "
            f"Pass a tensor, a dataset, a DataLoader or a list of batches."
        )
    return _batches(data, batch_size)


def iter_is_self(data: Any) -> bool:  # noqa: ANN401
    """Returns whether an iterable is a one-shot iterator."""
    return isinstance(data, Iterator)


class _InOrder:
    """Batches in order, taken when they are asked for."""

    def __init__(self, data: Tensor | RowData, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self.data), self.batch_size):
            last = first + self.batch_size
            if isinstance(self.data, RowData):
                end = max(last, min(last + self.batch_size, len(self.data)))
                self.data.prefetch(torch.arange(last, end, device="cpu"))
            yield self.data[first:last]


class _OnDevice:
    """Batches on a device, moved there one at a time."""

    def __init__(self, batches: Any, device: torch.device) -> None:  # noqa: ANN401
        self.batches, self.device = batches, device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return (to_device(batch, self.device) for batch in self.batches)


class _Shuffled:
    """Shuffled batches of rows; the last, smaller one is left out unless it is the only."""

    def __init__(self, data: Tensor | RowData, batch_size: int) -> None:
        self.data, self.batch_size = data, min(batch_size, len(data))

    def __iter__(self) -> Iterator[Tensor]:
        rows = moved(torch.randperm(len(self.data), device="cpu"), self.data.device)
        batches = rows[: len(rows) // self.batch_size * self.batch_size].split(self.batch_size)
        for i, batch in enumerate(batches):
            if isinstance(self.data, RowData):  # all that are ahead at first, then one at a time
                for later in batches[i + _AHEAD if i else 1 : i + _AHEAD + 1]:
                    self.data.prefetch(later)
            yield self.data[batch]


def _batches(data: Any, batch_size: int) -> Iterable[Any]:  # noqa: ANN401
    require_counts(batch_size=batch_size)
    data, batch_size = as_data(data), int(batch_size)
    has_rows = isinstance(data, Tensor | RowData)
    if (has_rows or is_map_style(data)) and len(data) == 0:
        return []
    if has_rows:
        return _Shuffled(data, batch_size)
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size, collate_fn=_collate)
    if is_map_style(data):
        size = min(batch_size, len(data))
        return DataLoader(data, size, shuffle=True, drop_last=True, collate_fn=_collate)
    batches: Iterable[Any] = data
    return batches


def _collate(rows: list[Any]) -> Any:  # noqa: ANN401
    """Returns a batch of rows, as a ``DataLoader`` makes it by default."""
    try:
        return default_collate(rows)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"Rows of a dataset must be tensors, arrays or numbers of one shape; they make no "
            f"batch: {error}. Pass a DataLoader with a collate_fn, or, for a dataset that yields "
            f"whole batches, DataLoader(dataset, batch_size=None)."
        ) from error


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


def require_rows_and_end(data: Any, batch_size: int) -> None:  # noqa: ANN401
    """Validates that held-out data has rows and an end, by reading it if it has no length.

    Raises:
        ValueError: If it has no rows, or no length and more than 131,072 rows.
    """
    batches = one_pass(data, batch_size)
    rows = length_hint(batches, -1)
    if rows < 0:
        rows = 0
        with seeded(0), own_generators_restored(batches):
            for batch in batches:
                rows += num_rows(batch)
                if rows > _MOST_ROWS:
                    raise ValueError(
                        f"Held-out data without a length must have an end and at most "
                        f"{_MOST_ROWS} rows; got more. Pass fewer rows, or data with a length."
                    )
    if rows == 0:
        raise ValueError("The held-out data has no batches. Pass at least one row.")


def first_batch(data: Any, batch_size: int) -> Any:  # noqa: ANN401
    """Returns the first batch of data; all random generators are left unchanged.

    Arguments:
        data: As for :func:`one_pass`.
        batch_size: Rows per batch, where batches are made.

    Raises:
        ValueError: If the data has no rows.

    Example:
        >>> first_batch(torch.arange(10), 4)
        tensor([0, 1, 2, 3])
    """
    batches = one_pass(data, batch_size)
    outside = random_state()
    try:
        with own_generators_restored(batches):
            batch = next(iter(batches), _END)
    finally:
        set_random_state(outside)
    if batch is _END:
        raise ValueError("The data must have 1 or more rows; got none. Pass rows of data.")
    return batch


def data_digest(data: Any, batch_size: int) -> str | None:  # noqa: ANN401
    """Returns a digest of some rows of data; all random generators are left unchanged.

    Arguments:
        data: As for :func:`one_pass`. Of rows, 64 are read, spread over all of them; of a list, the
            first batch, the last and one between; otherwise, the first batch.
        batch_size: Rows per batch, where batches are made.

    Returns:
        The digest, or ``None`` if the rows differ when they are read again under the same seed.
    """
    first, second = (_digest_of_probe(data, batch_size) for _ in range(2))
    return first if first == second else None


def _digest_of_probe(data: Any, batch_size: int) -> str:  # noqa: ANN401
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten()
        digest.update(raw.view(torch.uint8).numpy().data)
        return tensor

    with seeded(0), own_generators_restored(data) as generators:
        for generator in generators:
            generator.manual_seed(0)
        map_tensors(add, _probe(as_data(data), batch_size))
    return digest.hexdigest()[:16]


def _probe(data: Any, batch_size: int) -> Any:  # noqa: ANN401
    if isinstance(data, list | tuple):
        return [data[n] for n in sorted({0, len(data) // 2, len(data) - 1})] if data else []
    if isinstance(data, Tensor | RowData) or is_map_style(data):
        count, last = min(len(data), _PROBED), max(0, len(data) - 1)
        rows = torch.linspace(0, last, count, dtype=torch.float64).long()
        if isinstance(data, Tensor | RowData):
            return data[rows.to(data.device)]
        return next(iter(one_pass(Subset(data, rows.tolist()), _PROBED)), [])
    return next(iter(one_pass(data, batch_size)), [])


@contextmanager
def own_generators_restored(loader: Any) -> Iterator[list[torch.Generator]]:  # noqa: ANN401
    """Context after which a loader's own generators, which it yields, are as they were."""
    own = [(generator, generator.get_state()) for generator in own_generators(loader)]
    try:
        yield [generator for generator, _ in own]
    finally:
        for generator, state in own:
            generator.set_state(state)
