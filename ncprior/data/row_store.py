"""Storage of the rows of a pytree of tensors, in memory or, above a limit, on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class RowStore:
    """Concatenated batches of a pytree of tensors, indexed by rows.

    Arguments:
        batches: The batches; the first axis of every tensor is the batch. Leaves that are not
            tensors are those of the first batch.
        budget: Number of bytes in memory, on the device of the tensors. Above it, all rows are on
            disk, in files that are mapped into memory. The largest tensor takes twice its memory
            while batches are concatenated.
        folder: Folder in which a temporary folder is made for rows on disk, by default the
            system's; it is removed with the store.

    Raises:
        ValueError: If there are no batches, or their pytrees, shapes or dtypes differ.

    Example:
        >>> rows = RowStore([{"mean": torch.zeros(3, 2)}, {"mean": torch.ones(1, 2)}], budget=2**20)
        >>> len(rows), rows[torch.tensor([3, 0])]["mean"]
        (4, tensor([[1., 1.],
                [0., 0.]]))
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        budget: int,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.on_disk = False
        parts: list[list[Tensor]] = []
        kept = 0
        for batch in batches:
            leaves, spec = tree_flatten(batch)
            if not parts:
                self._tree, self._spec = leaves, spec
                parts = [[] for leaf in leaves if isinstance(leaf, Tensor)]
            tensors = self._checked(leaves, spec)
            kept += sum(t.nbytes for t in tensors)
            for part, tensor in zip(parts, tensors, strict=True):
                part.append(_of_its_own(tensor.detach()))
            if kept > budget:
                self._spill(parts, folder)
        if not parts:
            raise ValueError("There are no batches to keep rows of.")
        self._leaves = self._mapped() if self.on_disk else [_joined(part) for part in parts]

    def __len__(self) -> int:
        return len(self._leaves[0])

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self._leaves[0].device

    def __getitem__(self, rows: Tensor | slice) -> Any:  # noqa: ANN401
        """Returns rows, by a tensor of their numbers or a slice."""
        tensors = iter([leaf[rows] for leaf in self._leaves])
        leaves = [next(tensors) if isinstance(t, Tensor) else t for t in self._tree]
        return tree_unflatten(leaves, self._spec)

    def _checked(self, leaves: Sequence[Any], spec: Any) -> list[Tensor]:  # noqa: ANN401
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        first = [leaf for leaf in self._tree if isinstance(leaf, Tensor)]
        if spec != self._spec or not tensors or len({len(t) for t in tensors}) != 1:
            raise ValueError(
                f"Rows are kept of batches that are one pytree of tensors of as many rows; got "
                f"{self._spec} and {spec} with {[tuple(t.shape) for t in tensors]}."
            )
        for t, like in zip(tensors, first, strict=True):
            if (t.shape[1:], t.dtype) != (like.shape[1:], like.dtype):
                raise ValueError(
                    f"Rows are kept of tensors of one shape; got rows of {tuple(like.shape[1:])}, "
                    f"{like.dtype}, and then of {tuple(t.shape[1:])}, {t.dtype}."
                )
        return tensors

    def _spill(self, parts: list[list[Tensor]], folder: str | os.PathLike[str] | None) -> None:
        if not self.on_disk:
            self._folder = Path(tempfile.mkdtemp(prefix="ncprior-rows-", dir=folder))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self.on_disk = True
        for k, part in enumerate(parts):
            with self._path(k).open("ab") as file:
                for tensor in part:
                    file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            part.clear()

    def _mapped(self) -> list[Tensor]:
        mapped = []
        for k, like in enumerate(leaf for leaf in self._tree if isinstance(leaf, Tensor)):
            # Mapped copy-on-write, which torch does not warn of; nobody writes.
            raw = torch.from_numpy(np.memmap(self._path(k), np.uint8, mode="c"))
            mapped.append(raw.view(like.dtype).view(-1, *like.shape[1:]))
        return mapped

    def _path(self, k: int) -> Path:
        return self._folder / f"{k}.bin"


def _of_its_own(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own, as a view keeps the whole tensor in memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _joined(part: list[Tensor]) -> Tensor:
    joined = torch.cat(part)
    part.clear()
    return joined
