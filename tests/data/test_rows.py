"""The gate for data: what is taken as rows, what as batches, and what is refused."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ncprior.data import Loader, Stream, first_batch, one_pass, split
from ncprior.data.digest import data_digest
from ncprior.data.rows import Rows

X = torch.arange(24.0).reshape(12, 2)


class Table:
    """What pandas and polars have in common here; a KeyError for row numbers, as of a column."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, column: Any) -> Any:
        raise KeyError(column)

    def to_numpy(self) -> np.ndarray:
        return self.values


class Yields(IterableDataset[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


CPU = torch.device("cpu")


def rows(data: Any) -> Tensor:
    return torch.cat(list(one_pass(data, 5, CPU)))


# --- what is taken ---


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", ">f8", "int64", "uint8"])
def test_M8_arrays_are_rows_of_tensors(kind: str) -> None:
    """float64 becomes torch's default dtype, as Python's own numbers do."""
    array = X.numpy().astype(kind)
    expected = torch.float32 if kind in ("float64", ">f8") else getattr(torch, kind)
    for taken in (rows(array), next(Stream(array, 12)), first_batch(array, 3)):
        assert taken.dtype == expected
    assert torch.equal(rows(array).float(), X)
    train, held_out = split(array, 0.25, seed=0)
    assert (
        sorted([*rows(train)[:, 0].tolist(), *rows(held_out)[:, 0].tolist()]) == X[:, 0].tolist()
    )


def test_N8_a_table_is_taken_by_its_numbers() -> None:
    assert torch.equal(rows(Table(X.double().numpy())), X)
    with pytest.raises(TypeError, match="must hold real numbers; got an array of object.*Encode"):
        one_pass(Table(np.array([["a", 1.0]], dtype=object)), 4)


def test_M8_nested_lists_of_numbers_are_rows() -> None:
    assert torch.equal(rows(X.tolist()), X)
    with pytest.raises(TypeError, match="rows of different lengths"):
        one_pass([[1.0], [1.0, 2.0]], 4)


def test_M8_batches_may_be_arrays() -> None:
    batches = [UserDict(image=part.double().numpy()) for part in X.split(4)]
    taken = next(Loader(Stream(batches, 4), CPU))["image"]
    assert torch.equal(taken, X[:4])
    assert taken.dtype == torch.float32


def test_F29_a_memory_mapped_file_is_neither_copied_nor_its_split(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for part in split(mapped, 0.25, seed=0):
        assert isinstance(part, Rows) and part.values is mapped
    whole = one_pass(mapped, 4)
    assert torch.equal(torch.cat(list(whole)), X)


def test_rows_of_rows() -> None:
    some = Rows(X).take(torch.tensor([7, 3, 1])).take(torch.tensor([2, 0]))
    assert torch.equal(some[torch.tensor([1, 0])], X[[7, 1]])
    assert torch.equal(some[0:1], X[[1]])


# --- what is refused ---


@pytest.mark.parametrize(
    "data",
    [(X, torch.arange(12)), [X, torch.arange(12)], (X, X[:, :1]), (X.numpy(), X.numpy()[:, 0])],
)
def test_M8_columns_are_no_batches(data: Any) -> None:
    with pytest.raises(TypeError, match=r"batches of one kind; got .*\(12, 2\).*TensorDataset"):
        Stream(data, 4)


@pytest.mark.parametrize("data", [[(X[:1], 3), (X[1:2], 5)], [torch.tensor(1.0)] * 3])
def test_M8_a_list_of_rows_is_no_list_of_batches(data: Any) -> None:
    with pytest.raises(TypeError, match="must hold batches; got single rows.*DataLoader"):
        one_pass(data, 4)


def test_M8_a_dataset_that_yields_batches_says_how() -> None:
    data = Yields(list(X.split(5)))
    for batches in (Stream(data, 4), iter(one_pass(data, 4))):
        with pytest.raises(TypeError, match=r"equal size.*DataLoader\(dataset, batch_size=None\)"):
            next(batches)
    assert torch.equal(rows(DataLoader(data, batch_size=None)), X)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        ("data.csv", "'data.csv'"),
        (Path("data.csv"), "PosixPath|WindowsPath"),
        ({"image": X}, "type dict"),
        (UserDict(image=X), "type UserDict"),
        (None, "None"),
        (3.5, "3.5"),
        (torch.tensor(1.0), r"float32, \(\)"),
        (np.array(1.0), "Rows"),
        (TensorDataset, "the class TensorDataset"),
    ],
)
def test_M8_what_is_no_data_is_refused(data: Any, got: str) -> None:
    for taker in (one_pass, Stream, first_batch, lambda x, n: split(x, 0.1, n)):
        with pytest.raises(TypeError, match=f"Data must .*{got}"):
            taker(data, 4)


@pytest.mark.parametrize("size", [0, -1, 2.0, "4", None])
def test_F26_batch_sizes_are_whole_numbers(size: Any) -> None:
    for taker in (one_pass, Stream, first_batch):
        with pytest.raises((TypeError, ValueError), match="batch_size must be a whole number"):
            taker(X, size)
    with pytest.raises((TypeError, ValueError), match="fraction must be a number in"):
        split(X, size, 0)


def test_F26_a_loader_validates_its_arguments() -> None:
    for wrong in ((X, CPU), (Stream(X, 4), "cpu")):
        with pytest.raises(TypeError, match="(stream|device) must be of type"):
            Loader(*wrong)
    with pytest.raises(ValueError, match="rank must be a whole number"):
        Loader(Stream(X, 4), CPU, (2, 2))


# --- batches over ranks ---


def test_C4_tensors_without_axes_stay_in_batches_over_ranks() -> None:
    batches = [{"x": part, "temperature": torch.tensor(3.0)} for part in X.split(4)]
    batch = next(Loader(Stream(batches, 4), CPU, (1, 2)))
    assert torch.equal(batch["x"], X[[1, 3]])
    assert batch["temperature"] == 3


class Output(dict[str, Tensor]):
    """As pythae's data sets yield them."""


@pytest.mark.parametrize("kind", [dict, UserDict, Output])
def test_W3_mappings_are_dealt_out_over_ranks_and_moved(kind: Any) -> None:
    """G-C3 as well: on a GPU, such batches stayed on the CPU."""
    data = [kind(x=part) for part in X.split(4)]
    batch = next(Loader(Stream(data, 4), CPU, (0, 2)))
    assert type(batch) is kind and torch.equal(batch["x"], X[[0, 2]])
    assert next(Loader(Stream(data, 4), torch.device("meta")))["x"].device.type == "meta"


# --- what can be resumed, and whether it is the same data ---


def test_W6_persistent_workers_cannot_be_resumed() -> None:
    data = DataLoader(TensorDataset(X), 4, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers=True. Pass persistent_workers=False"):
        Stream(data, 4, resumable=True)
    Stream(data, 4)


class Noisy(Dataset[Tensor]):
    def __init__(self, own: bool = False) -> None:
        self.own = np.random.default_rng() if own else None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Tensor:
        noise = torch.randn(2) + np.random.randn()
        return X[i] + noise + (0.0 if self.own is None else self.own.normal())


def shuffled(seed: int) -> DataLoader[Tensor]:
    return DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(seed))


def test_W7_a_digest_tells_data_apart_and_is_the_same_in_another_process() -> None:
    makes = [
        lambda: X,
        lambda: X + 1,
        lambda: X.numpy(),
        lambda: list(X.split(4)),
        lambda: list((X + 1).split(4)),
        Noisy,
        lambda: DataLoader(TensorDataset(X), 4),
        lambda: shuffled(int(torch.randint(99, ()))),
        lambda: Yields(list(X)),
        lambda: Yields(list(X + 1)),
    ]
    made = [make() for make in makes]
    before = torch.get_rng_state()
    digests = [data_digest(data, 4) for data in made]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert [data_digest(make(), 4) for make in makes] == digests
    assert digests[0] == digests[2] and len(set(digests)) == len(digests) - 2
    assert None not in digests


def test_W7_data_that_differ_at_every_reading_have_no_digest() -> None:
    assert data_digest(Noisy(own=True), 4) is None


def test_W7_folds_with_the_same_first_rows_are_told_apart() -> None:
    x = torch.randn(5000, 3)
    other = torch.cat([x[:2500], torch.randn(2500, 3)])
    assert data_digest(x, 256) != data_digest(other, 256)
