from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ncprior.data.batches import one_pass
from ncprior.source import num_rows
from ncprior.utils.batches import map_tensors, tensor_of, to_device

META = torch.device("meta")


class Pair(NamedTuple):
    x: Tensor
    label: Tensor


class Output(OrderedDict[str, Tensor]):
    """As pythae's batches: read by key and by attribute."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Frozen(Mapping[str, Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __getitem__(self, key: str) -> Tensor:
        return {"x": self.x}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True)
class Row:
    x: Tensor
    name: str = "a name"


@dataclass(slots=True)
class Slots:
    x: Tensor


X = torch.zeros(3, 2)

BATCHES: dict[str, tuple[Any, Any]] = {
    "tensor": (X, lambda batch: batch),
    "tuple": ((X, "a name"), lambda batch: batch[0]),
    "list": ([X, 1], lambda batch: batch[0]),
    "named tuple": (Pair(X, X), lambda batch: batch.label),
    "dict": ({"x": X}, lambda batch: batch["x"]),
    "user dict": (UserDict(x=X), lambda batch: batch["x"]),
    "mapping": (Frozen(X), lambda batch: batch["x"]),
    "own mapping": (Output(x=X), lambda batch: batch.x),
    "dataclass": (Row(X), lambda batch: batch.x),
    "dataclass with slots": (Slots(X), lambda batch: batch.x),
    "nested": ([UserDict(rows=(Row(X),))], lambda batch: batch[0]["rows"][0].x),
}


@pytest.mark.parametrize("name", BATCHES)
def test_every_tensor_of_a_batch_is_moved_and_types_stay(name: str) -> None:
    batch, read = BATCHES[name]
    moved = to_device(batch, META)
    assert read(moved).device == META
    assert read(batch).device.type == "cpu"
    assert type(moved) is (dict if name == "mapping" else type(batch))
    assert num_rows(batch) == num_rows(moved) == 3


def test_what_is_no_tensor_stays_as_it_is() -> None:
    part = object()
    assert map_tensors(torch.neg, [part, None, 1.5]) == [part, None, 1.5]
    assert map_tensors(torch.neg, Row(X)).name == "a name"


@pytest.mark.parametrize("data", [torch.zeros(10, 2), [UserDict(x=torch.zeros(5, 2))] * 2])
def test_a_pass_on_a_device_can_be_measured_and_repeated(data: Any) -> None:
    batches = one_pass(data, 5, META)
    assert len(batches) == 2  # type: ignore[arg-type]
    for _ in range(2):
        found = [b if isinstance(b, Tensor) else b["x"] for b in batches]
        assert [(len(x), x.device) for x in found] == [(5, META), (5, META)]


def test_M8_arrays_become_tensors_and_names_stay() -> None:
    batch = map_tensors(torch.exp, {"x": np.zeros(2), "name": np.array(["a"]), "n": np.arange(2)})
    assert batch["x"].dtype == torch.float32 and torch.equal(batch["x"], torch.ones(2))
    assert batch["n"].shape == (2,)
    assert isinstance(batch["name"], np.ndarray)
    read_only = np.zeros(3, dtype=np.float32)
    read_only.flags.writeable = False
    assert tensor_of(read_only[::-1]).add_(1).sum() == 3


def test_arrays_keep_single_precision_where_the_default_is_half() -> None:
    """NumPy has no bfloat16, which was an error."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [tensor_of(np.zeros(2, kind)).dtype for kind in ("f8", "f4", "f2", "i8")]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == [torch.float32, torch.float32, torch.float16, torch.int64]
