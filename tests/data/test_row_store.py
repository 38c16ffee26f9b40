"""Rows that are kept: in memory and on disk the same."""

from __future__ import annotations

import errno
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ncprior.data.row_store import RowStore, _of_its_own


def batches() -> list[Any]:
    made = []
    for n in (3, 1, 4):
        made.append(
            {
                "law": {"loc": torch.randn(n, 2, 2), "scale": torch.rand(n, 2, 2).bfloat16()},
                "code": (torch.randint(9, (n,)), None),
                "flags": torch.rand(n, 5).bernoulli().bool(),
                "scalar": 2.5,
            }
        )
    return made


@pytest.mark.parametrize("budget", [0, 100, 2**20])
def test_rows_come_back_as_they_were(budget: int, tmp_path: Path) -> None:
    """With all on disk, with what came first in memory for a while, and with all in memory."""
    made = batches()
    rows = RowStore(made, budget=budget, folder=tmp_path)
    assert len(rows) == 8
    assert rows.on_disk == (budget < 2**20)
    picked = rows[torch.tensor([7, 0, 3, 3])]
    part = rows[2:6]
    for name in ("loc", "scale"):
        whole = torch.cat([b["law"][name] for b in made])
        assert torch.equal(picked["law"][name], whole[[7, 0, 3, 3]])
        assert torch.equal(part["law"][name], whole[2:6])
        assert picked["law"][name].dtype == whole.dtype
    assert torch.equal(picked["code"][0], torch.cat([b["code"][0] for b in made])[[7, 0, 3, 3]])
    assert torch.equal(part["flags"], torch.cat([b["flags"] for b in made])[2:6])
    assert picked["code"][1] is None
    assert picked["scalar"] == 2.5


@pytest.mark.parametrize("budget", [0, 2**20])
def test_rows_of_a_later_batch_are_read_ahead_from_the_disk_alone(
    budget: int, tmp_path: Path
) -> None:
    made = batches()
    rows, read = RowStore(made, budget=budget, folder=tmp_path), []

    class Leaf:
        def __getitem__(self, numbers: torch.Tensor) -> None:
            read.append(numbers.tolist())

    rows._leaves = [Leaf(), Leaf()]  # type: ignore[list-item]
    rows.prefetch(torch.arange(70))
    if rows._readers is not None:
        rows._readers.shutdown()
    parts = [list(range(32)), list(range(32, 64)), list(range(64, 70))]
    assert sorted(read) == ([] if budget else sorted(2 * parts))


def test_what_is_taken_is_a_copy(tmp_path: Path) -> None:
    rows = RowStore([torch.zeros(4)], budget=0, folder=tmp_path)
    rows[torch.tensor([1])].fill_(5.0)
    assert rows[1:2].item() == 0


@pytest.mark.skipif(os.name == "nt", reason="open files have names on Windows")
def test_F22_rows_on_disk_have_no_names_that_a_kill_could_leave(tmp_path: Path) -> None:
    """Neither while they are written nor while they are read."""

    def watched() -> Iterator[torch.Tensor]:
        for _ in range(3):
            yield torch.zeros(4)
            assert not list(tmp_path.iterdir())

    rows = RowStore(watched(), budget=0, folder=tmp_path)
    assert rows.on_disk and len(rows) == 12
    assert not list(tmp_path.iterdir())


def test_F28_a_budget_may_be_infinite_and_must_be_a_number() -> None:
    assert not RowStore([torch.zeros(4)], budget=math.inf).on_disk
    for budget in (math.nan, -1):
        with pytest.raises(ValueError, match=r"budget must be a number in \[0, inf\]"):
            RowStore([torch.zeros(4)], budget=budget)


def test_C4_rows_of_tensors_without_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="as many rows"):
        RowStore([(torch.zeros(4), torch.tensor(3.0))], budget=2**20)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "no batches"),
        ([torch.zeros(2, 3), (torch.zeros(2, 3),)], "one pytree"),
        ([(torch.zeros(2), torch.zeros(3))], "as many rows"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"one shape.*\(3,\).*\(4,\)"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.long)], "float32.*int64"),
        ([None], "one pytree"),
    ],
)
def test_batches_that_do_not_go_together_are_refused(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowStore(made, budget=2**20)


def test_a_view_does_not_keep_what_it_is_a_view_of() -> None:
    wide = [torch.randn(8, 100) for _ in range(3)]
    rows = RowStore((w.chunk(4, 1)[0] for w in wide), budget=2**20)
    assert torch.equal(rows[0:24], torch.cat(wide)[:, :25])
    assert _of_its_own(wide[0][:, :25]).untyped_storage().nbytes() == 8 * 25 * 4
    assert _of_its_own(wide[0]) is wide[0]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a full disk")
@pytest.mark.parametrize("rows", [4, 100_000])
@pytest.mark.parametrize("folder", [None, Path("/a/folder")])
def test_a_full_disk_is_named_with_a_remedy(
    rows: int, folder: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few bytes wait in a buffer, until the file is mapped, and once more until it is closed."""
    full = lambda dir: open("/dev/full", "w+b")  # noqa: SIM115
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(tempfile, "tempdir", "/temporary")
    with pytest.raises(OSError) as raised:
        RowStore([torch.zeros(rows)] * 2, budget=0, folder=folder)
    assert raised.value.errno == errno.ENOSPC
    for words in ("No space left on device", f"in {folder or '/temporary'}. Set", "TMPDIR"):
        assert words in str(raised.value)
    assert "cache_memory or with cache_epochs=None" in str(raised.value)


def test_an_error_of_the_data_stays_as_it_is(tmp_path: Path) -> None:
    def damaged() -> Iterator[torch.Tensor]:
        yield torch.zeros(4)
        raise OSError(errno.EIO, "Input/output error", "data.bin")

    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: 'data.bin'$"):
        RowStore(damaged(), budget=0, folder=tmp_path)
