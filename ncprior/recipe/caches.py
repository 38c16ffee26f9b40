"""Numbers of walks and draws, made once or at every use, that memory and time allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncprior.bases.joint import JointSource
from ncprior.data.batches import first_batch
from ncprior.data.encodings import walk_bytes
from ncprior.data.rows import Rows
from ncprior.prior import NCPrior
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.source import LatentSource, device_of, num_rows, visit
from ncprior.training.settings import FitSettings
from ncprior.utils.batches import own_batch
from ncprior.utils.random_state import seeded

_TIMED = 256  # draws


def draws_to_store(source: LatentSource[Any, Any], count: int) -> int:
    """Returns the number of draws of a base to make once and reuse: below a joint head, few large ones."""
    if not isinstance(source, JointSource):
        return count
    return min(count, int(_memory() / source.bytes_per_row))


def draws_in_time(source: LatentSource[Any, Any], count: int, seconds: float | None) -> int:
    """Returns the number of draws of a base that there is time for, at most so many.

    Arguments:
        source: The VAE, with one group and no condition.
        count: The largest number.
        seconds: The time, or ``None`` for no limit.
    """
    if seconds is None:
        return count
    draw = source.group(source.start(_TIMED)).prior.sample
    return min(count, int(seconds * _TIMED / _seconds_of(draw)))


@torch.no_grad()
def rows_in_time(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    limits: tuple[int, int],
    seconds: float | None,
) -> int:
    """Returns the number of rows of data for which the prior's sampler draws in some time.

    Arguments:
        prior: The prior, with its sampler.
        data: Rows of data, whose encodings hold a condition if there is one.
        limits: The smallest and the largest number.
        seconds: The time, or ``None`` for no limit.
    """
    least, most = limits
    if seconds is None:
        return most
    encoding = prior.source.encode(own_batch(first_batch(data, least), device_of(prior.source)))
    rows, sampler = num_rows(encoding), prior.chosen(None)
    start = prior.source.start(rows, encoding)
    took = _seconds_of(
        lambda: visit(prior.source, start, lambda k, group: prior.draw(k, group, sampler).z)
    )
    return min(most, max(least, int(rows * seconds / took)))


def walk_cache(
    source: LatentSource[Any, Any], parts: Parts, record: Record, epochs: float
) -> dict[str, Any]:
    """Returns settings under which walks of rows are reused for some epochs.

    They are empty if the walks do not fit in memory, if rows may differ from time to time, or if
    there is a limit of time, which may end before all walks are made.
    """
    train = parts.train
    if record.left() is not None or not isinstance(train, Tensor | Rows):
        return {}
    with seeded(0):
        row = walk_bytes(source, own_batch(first_batch(train, 2), device_of(source)))
    return {"cache_epochs": epochs} if row * len(train) <= _memory() else {}


def _seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()  # a coarser clock may not move
    work()
    return time.perf_counter() - started


def _memory() -> float:
    """Bytes for draws or walks."""
    return FitSettings().cache_memory * 2**30
