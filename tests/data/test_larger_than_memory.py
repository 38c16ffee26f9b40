"""Data sets that do not fit into memory: streamed, encoded once, and read from disk in time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.toys import VAE, base
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import IterableDataset

from ncprior import NCPrior, SingleGroup, fit
from ncprior.data import RowData, Stream, one_pass
from ncprior.training import FitSettings

ROWS, HELD_OUT, BATCH = 70, 20, 16


def rows(first: int = 0, last: int = ROWS) -> Iterator[dict[str, Any]]:
    """Rows as a data set of the Hub yields them."""
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(5))
    for i in range(first, last):
        yield {"x": x[i].tolist(), "label": i % 3}


class Tensors(IterableDataset[dict[str, Tensor]]):
    """A stream whose format is torch, as that of datasets."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for row in rows(self.first, self.last):
            yield {name: torch.tensor(value) for name, value in row.items()}


class Streamed(IterableDataset[dict[str, Any]]):
    """A stream without a format, as that of datasets."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return rows(self.first, self.last)

    def with_format(self, name: str) -> Tensors:
        assert name == "torch"
        return Tensors(self.first, self.last)


def of_the_hub(first: int, last: int) -> Any:
    """The real package, in streaming mode."""
    datasets = pytest.importorskip("datasets")
    arguments = {"first": first, "last": last}
    return datasets.IterableDataset.from_generator(rows, gen_kwargs=arguments)


def in_memory_of_the_hub(first: int, last: int) -> Any:
    """The real package, with all rows."""
    return pytest.importorskip("datasets").Dataset.from_list(list(rows(first, last)))


@pytest.mark.parametrize("make", [Tensors, Streamed, of_the_hub, in_memory_of_the_hub])
def test_a_stream_is_encoded_once_and_trained_on_from_disk(make: Any) -> None:
    encoded = []
    torch.manual_seed(0)
    vae = VAE().eval()

    def posterior(batch: dict[str, Tensor]) -> Distribution:
        encoded.append(len(batch["x"]))
        return vae.posterior(batch["x"])

    def trained(memory: float) -> dict[str, Tensor]:
        torch.manual_seed(1)
        prior = NCPrior.for_source(source, next(iter(one_pass(data, BATCH))), width=8)
        encoded.clear()
        settings = FitSettings(cache_epochs=math.inf, cache_memory=memory)
        options = {"batch_size": BATCH, "held_out": held_out, "progress": False}
        fit(prior, data, steps=12, settings=settings, **options)
        return prior.state_dict()

    data, held_out = make(0, ROWS - HELD_OUT), make(ROWS - HELD_OUT, ROWS)
    source = SingleGroup(base(), posterior, vae.decode, module=vae)
    on_disk = trained(0.0)
    assert sum(encoded) <= ROWS + 2 * BATCH  # twice a first batch, to look at it
    in_memory = trained(1.0)
    assert all(torch.equal(on_disk[name], in_memory[name]) for name in on_disk)


class Numbers(RowData):
    """Row numbers, and what was asked for in which order."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def __len__(self) -> int:
        return 26

    def __getitem__(self, numbers: Any) -> Tensor:
        found = torch.arange(26)[numbers]
        self.calls.append(("read", found.tolist()))
        return found

    def prefetch(self, numbers: Tensor) -> None:
        self.calls.append(("ahead", numbers.tolist()))


def test_batches_are_asked_for_two_steps_ahead() -> None:
    data = Numbers()
    stream = Stream(data, 5)
    for _ in range(5):  # an epoch, whose last row makes no batch
        next(stream)
    read = [numbers for what, numbers in data.calls if what == "read"]
    ahead = [("ahead", numbers) for numbers in read]
    now = [("read", numbers) for numbers in read]
    order = [ahead[1], ahead[2], now[0], ahead[3], now[1], ahead[4], *now[2:]]
    assert data.calls == order
    data.calls.clear()
    assert [len(batch) for batch in one_pass(data, 10)] == [10, 10, 6]
    assert [(what, len(numbers)) for what, numbers in data.calls] == [
        *(("ahead", 10), ("read", 10), ("ahead", 6), ("read", 10), ("ahead", 0), ("read", 6))
    ]
