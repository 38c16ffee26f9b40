"""Batches of a pass over data, checked one by one: rows, and NaN or infinity in x."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ncprior.source import num_rows
from ncprior.utils.batches import data_of
from ncprior.utils.require import require_finite


def checked_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Yields batches, each after a check of its x, at the price of one synchronisation.

    Arguments:
        batches: Batches, as :func:`~ncprior.data.stream.one_pass` returns them.

    Raises:
        ValueError: If there is no batch, one has no rows, or its x has NaN or infinity.
        TypeError: If a batch has no tensor x.
    """
    count = 0
    for count, batch in enumerate(batches, start=1):
        if num_rows(batch) == 0:
            raise ValueError(f"Batch {count} of the data has no rows. Leave it out.")
        require_finite(f"x in batch {count} of the data", data_of(batch))
        yield batch
    if count == 0:
        raise ValueError("The data must have 1 or more rows; got none. Pass rows of data.")
