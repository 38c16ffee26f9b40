"""Parts of data: for training, for choices, and for the report, which no choice has seen."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ncprior.data.batches import one_pass, require_rows_and_end
from ncprior.data.parts import split
from ncprior.data.rows import RowData, Rows, as_data, is_map_style
from ncprior.source import num_rows
from ncprior.utils.batches import is_finite, shuffle_rows, take_rows

_MOST_HELD_OUT = 10_000  # rows
_FEWEST_HELD_OUT, _QUARTER = 1000, 4  # rows, but at most a quarter of the data
FEWEST = 8  # rows of each part
_PLENTY = 20_000  # training rows; fewer are few
_PATIENCE, _PATIENCE_OF_FEW = 10, 5  # evaluations
_BATCH = 256

_LAST = 0.1  # of all rows, held out from the last fit
_WORTH = 1.05  # times as many rows to train on


class Parts(NamedTuple):
    """Disjoint parts of data.

    Attributes:
        train: Data that bases and heads are fitted to.
        choose: Held-out data for early stopping and for all choices.
        judge: Held-out data for the report.
        num_train: Number of training rows, or ``None`` if it is unknown.
    """

    train: Any
    choose: Any
    judge: Any
    num_train: int | None

    @property
    def is_small(self) -> bool:
        """Whether there are so few training rows that large heads overfit."""
        return self.num_train is not None and self.num_train < _PLENTY

    @property
    def patience(self) -> int:
        """Evaluations without improvement before training ends: many passes over few rows."""
        return _PATIENCE_OF_FEW if self.is_small else _PATIENCE


def parts_of(data: Any, held_out: Any, seed: int) -> Parts:  # noqa: ANN401
    """Splits data at random into training data and two parts of held-out data.

    A tenth of the rows is held out, but at least 1,000 or a quarter of a small data set, and at
    most 10,000; half of them are for choices, half for the report.

    Arguments:
        data: Data as for :func:`ncprior.fit`.
        held_out: Held-out data, which is then split in two; ``None`` splits the data.
        seed: Seed of the shuffles.

    Raises:
        ValueError: If nothing can be held out, or there are too few rows. Pass ``held_out``.
    """
    data = as_data(data)
    remedy = f"Pass {2 * FEWEST} or more rows as held_out=."
    if held_out is None:
        rows = Rows(data) if isinstance(data, Tensor) else data
        count = _length(rows)
        parts = None if count is None else split(rows, _held_out_fraction(count), seed)
        if parts is None:
            raise ValueError(
                "improve() chooses by held-out data, and cannot hold out rows of "
                f"{type(data).__name__}. Pass held_out=."
            )
        data, held_out = parts
        remedy = (
            f"They are split off {count} rows of data: pass {2 * FEWEST * _QUARTER} or more, or "
            f"{2 * FEWEST} or more other rows as held_out=."
        )
    held_out = as_data(held_out)
    require_rows_and_end(held_out, _BATCH)
    choose, judge = _halves(held_out, seed + 1)
    for part in (choose, judge):
        rows = _count(part)
        if rows < FEWEST:
            raise ValueError(
                f"Choices and report need {FEWEST} or more held-out rows each; got {rows}. {remedy}"
            )
    return Parts(data, choose, judge, _num_rows(data))


def parts_for_last_fit(data: Any, parts: Parts, seed: int) -> Parts | None:  # noqa: ANN401
    """Parts of all rows once more, of which a tenth is held out; ``None`` if that is hardly fewer.

    Arguments:
        data: The data, of which a part was held out.
        parts: The parts for the choices.
        seed: Seed of the shuffle.
    """
    data = as_data(data)
    count = _length(data) or 0
    held_out = max(_LAST, FEWEST / max(count, FEWEST))
    if not parts.is_small or 1 - held_out < _WORTH * (1 - _held_out_fraction(count)):
        return None
    last = split(Rows(data) if isinstance(data, Tensor) else data, held_out, seed)
    return last and Parts(*last, parts.judge, _num_rows(last[0]))


def first_not_finite(data: Any) -> Any:  # noqa: ANN401
    """Returns the first batch with a value that is not finite; ``None`` if all are."""
    return next((batch for batch in one_pass(data, _BATCH) if not is_finite(batch)), None)


def parts_for_report(train: Any, held_out: Any, seed: int) -> Parts | None:  # noqa: ANN401
    """Parts of data for classifiers that measure a prior; ``None`` if the rows are too few.

    Arguments:
        train: Training data for the classifiers; ``None`` takes half of the held-out data.
        held_out: Held-out data; a part of it ends the training, another one is for the report.
        seed: Seed of the shuffles.
    """
    held_out = as_data(held_out)
    require_rows_and_end(held_out, _BATCH)
    train, rest = _halves(held_out, seed) if train is None else (as_data(train), held_out)
    choose, judge = _halves(rest, seed + 1)
    enough = all(_count(part) >= FEWEST for part in (choose, judge))
    return Parts(train, choose, judge, _num_rows(train)) if enough else None


def _held_out_fraction(count: int) -> float:
    rows = min(_MOST_HELD_OUT, max(count // 10, min(_FEWEST_HELD_OUT, count // _QUARTER)))
    return min(0.5, max(rows, 1) / max(count, 2))


def _halves(held_out: Any, seed: int) -> tuple[Any, Any]:  # noqa: ANN401
    """Two halves of held-out data; of data without an index, half of each batch, at random."""
    rows = Rows(held_out) if isinstance(held_out, Tensor) else held_out
    halves = split(rows, 0.5, seed) if (_length(rows) or 0) > 1 else None
    if halves is not None and not isinstance(held_out, list | tuple):
        return halves
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Any], list[Any]] = [], []
    ahead = 0  # rows that the first part has more
    for batch in one_pass(held_out, _BATCH):
        rows, first = num_rows(batch), int(ahead > 0)
        ahead += (rows % 2) * (1 - 2 * first)
        batch = shuffle_rows(batch, rows, generator)
        for j in range(min(2, rows)):  # the first half may have one row more
            parts[(first + j) % 2].append(take_rows(batch, slice(j, None, 2)))
    for part in parts:  # readers of its first rows see all kinds of sorted data
        part[:] = [part[i] for i in torch.randperm(len(part), generator=generator, device="cpu")]
    return parts


def _count(part: Any) -> int:  # noqa: ANN401
    return sum(num_rows(batch) for batch in one_pass(part, _BATCH))


def _length(data: Any) -> int | None:  # noqa: ANN401
    """Number of rows of data with an index, else ``None``."""
    return len(data) if isinstance(data, Tensor | RowData) or is_map_style(data) else None


def _num_rows(data: Any) -> int | None:  # noqa: ANN401
    """Number of rows of data, as far as it is known without a pass over them."""
    if isinstance(data, list | tuple):
        return sum(map(num_rows, data))
    if not isinstance(data, DataLoader):
        return _length(data)
    draws_rows = data.batch_sampler is not None and not isinstance(data.dataset, IterableDataset)
    return len(data.sampler) if draws_rows and isinstance(data.sampler, Sized) else None
