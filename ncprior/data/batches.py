"""Batches of data: one pass in order, an epoch in a shuffled order, or the first."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from ncprior.data.generators import own_generators_restored
from ncprior.data.rows import RowData, Rows, as_data, is_map_style
from ncprior.source import num_rows
from ncprior.utils.batches import moved, take_rows, to_device
from ncprior.utils.random_state import permutation, random_state, seeded, set_random_state
from ncprior.utils.require import require_counts

_MOST_ROWS = 2**17  # of held-out data without a length, which may be endless

_MOST_BATCHES = 64  # that rows are taken from

_AHEAD = 2  # batches, which are read from the disk while another one is in use


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
    return shuffled(data, batch_size)


def shuffled(data: Any, batch_size: int) -> Iterable[Any]:  # noqa: ANN401
    """Returns the batches of an epoch; rows of data with an index are shuffled anew each time."""
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


def iter_is_self(data: Any) -> bool:  # noqa: ANN401
    """Returns whether an iterable is a one-shot iterator."""
    return isinstance(data, Iterator)


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
    for batch in _begun(data, batch_size, lambda batches: islice(batches, 1)):
        return batch
    raise ValueError("The data must have 1 or more rows; got none. Pass rows of data.")


def first_rows(data: Any, count: int) -> Any:  # noqa: ANN401
    """Returns the first rows of data as one batch; all random generators are left unchanged.

    Arguments:
        data: As for :func:`one_pass`. Of batches of tensors, as many are joined as have that many rows;
            of other batches, the first is taken.
        count: Number of rows, where batches are made or joined.

    Example:
        >>> len(first_rows(list(torch.arange(100).split(4)), 10))
        12
    """
    first = first_batch(data, count)
    if num_rows(first) >= count or not _is_of_tensors(first):
        return first
    return _joined(list(_begun(data, count, partial(until, rows=count))))


def spread_rows(data: Any, count: int) -> Any:  # noqa: ANN401
    """Returns rows from all over data as one batch, the same at every call.

    The first rows of sorted data are of one class. Random generators are left unchanged.

    Arguments:
        data: As for :func:`one_pass`; of a loader or an iterable, the first rows are taken.
        count: Number of rows.

    Example:
        >>> len(spread_rows(torch.arange(100), 10)), int(spread_rows(torch.arange(100), 10).max()) > 50
        (10, True)
    """
    data = as_data(data)
    if isinstance(data, list | tuple) and len(data) > 0:
        some = [data[i] for i in permutation(len(data), 0)[:_MOST_BATCHES]]
        if not all(map(_is_of_tensors, some)):
            return some[0]
        return first_rows([_spread(batch, -(-count // len(some))) for batch in some], count)
    if not isinstance(data, Tensor | RowData) and not is_map_style(data):
        return first_rows(data, count)
    rows = permutation(len(data), 0)[:count].sort().values
    data = Rows(data) if isinstance(data, Tensor) else data
    return (
        data[rows] if isinstance(data, RowData) else first_rows(Subset(data, rows.tolist()), count)
    )


def _spread(batch: Any, count: int) -> Any:  # noqa: ANN401
    """About as many rows of a batch, at equal distances."""
    return take_rows(batch, slice(None, None, max(1, num_rows(batch) // count)))


def of_size(batches: Iterable[Any], rows: int) -> Iterator[Any]:
    """Yields batches of tensors, joined until they have that many rows; the last one may have fewer.

    Batches with anything but tensors stay as they are; so do those of another shape than their neighbours.

    Example:
        >>> [len(batch) for batch in of_size(torch.arange(10).split(3), 5)]
        [6, 4]
    """
    kept: list[Any] = []
    for batch in batches:
        if kept and not _is_alike(kept[0], batch):
            yield _joined(kept)
            kept = []
        kept.append(batch)
        if sum(map(num_rows, kept)) >= rows:
            yield _joined(kept)
            kept = []
    if kept:
        yield _joined(kept)


def _is_of_tensors(batch: Any) -> bool:  # noqa: ANN401
    return all(isinstance(x, Tensor) for x in tree_leaves(batch))


def _is_alike(batch: Any, other: Any) -> bool:  # noqa: ANN401
    """Whether batches of tensors can be joined."""
    (leaves, spec), (others, other_spec) = tree_flatten(batch), tree_flatten(other)
    alike = _is_of_tensors(batch) and _is_of_tensors(other) and spec == other_spec
    return alike and all(
        (a.shape[1:], a.ndim) == (b.shape[1:], b.ndim) for a, b in zip(leaves, others, strict=True)
    )


def _joined(batches: list[Any]) -> Any:  # noqa: ANN401
    """Batches of tensors as one; tensors without axes are those of the first."""
    if len(batches) == 1:
        return batches[0]
    leaves = [tree_flatten(batch)[0] for batch in batches]
    joined = [
        torch.cat(same) if same[0].ndim > 0 else same[0] for same in zip(*leaves, strict=True)
    ]
    return tree_unflatten(joined, tree_flatten(batches[0])[1])


def until(batches: Iterable[Any], rows: int) -> Iterator[Any]:
    """Yields batches until they have that many rows, or end.

    Example:
        >>> [len(batch) for batch in until(torch.arange(100).split(4), 10)]
        [4, 4, 4]
    """
    taken = 0
    for batch in batches:
        yield batch
        taken += num_rows(batch)
        if taken >= rows:
            return


def _begun(
    data: Any,  # noqa: ANN401
    batch_size: int,
    begin: Callable[[Iterable[Any]], Iterable[Any]],
) -> list[Any]:
    """The batches with which a pass begins; all random generators are left unchanged."""
    batches, outside = one_pass(data, batch_size), random_state()
    try:
        with own_generators_restored(batches):
            return list(begin(batches))
    finally:
        set_random_state(outside)


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
