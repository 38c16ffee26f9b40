"""Storage of the rows of a pytree of tensors, in memory or, above a limit, on disk."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ncprior.data.rows import RowData
from ncprior.utils.require import require_instance, require_numbers

_READERS = 8  # threads, each of which waits for the disk, and not for a core

_ROWS_AT_ONCE = 32  # that one of them reads


class RowStore(RowData):
    """Concatenated batches of a pytree of tensors, indexed by rows.

    Arguments:
        batches: The batches; the first axis of every tensor is the batch. Leaves that are not
            tensors are those of the first batch.
        budget: Number of bytes in memory, on the device of the tensors. Above it, all rows are on
            disk, in files that are mapped into memory. The largest tensor takes twice its memory
            while batches are concatenated.
        folder: Folder of the files, by default the system's folder for temporary files. The files
            have no names there, so that nothing is left if the process is killed (on Windows, they
            have names until it ends).

    Raises:
        ValueError: If there are no batches, or their pytrees, shapes or dtypes differ.
        OSError: If the files cannot be written, as on a full disk. The message names their folder.

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
        budget: float,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        require_numbers("[0, inf]", budget=budget)
        if folder is not None:
            require_instance("folder", folder, (str, os.PathLike), "Pass the path of a folder.")
        parts: list[list[Tensor]] = []
        files: list[IO[bytes]] = []
        kept = 0
        with ExitStack() as opened:  # a mapped file stays readable after it is closed
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
                    with _named_errors(folder, kept):
                        while len(files) < len(parts):
                            files.append(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
                            opened.callback(_close, files[-1])
                        _spill(parts, files)
            if not parts:
                raise ValueError("There are no batches to keep rows of.")
            self.on_disk = len(files) > 0
            with _named_errors(folder, kept):
                self._leaves = self._mapped(files) if files else [_joined(part) for part in parts]
            self._readers = ThreadPoolExecutor(_READERS) if files else None
            self.device = self._leaves[0].device  # of the rows

    def __len__(self) -> int:
        return len(self._leaves[0])

    def __getitem__(self, rows: Tensor | slice) -> Any:  # noqa: ANN401
        """Returns rows, by a tensor of their numbers or a slice."""
        tensors = iter([leaf[rows] for leaf in self._leaves])
        leaves = [next(tensors) if isinstance(t, Tensor) else t for t in self._tree]
        return tree_unflatten(leaves, self._spec)

    def prefetch(self, rows: Tensor) -> None:
        """Begins to read rows from the disk, without a wait; does nothing for rows in memory."""
        require_instance("rows", rows, Tensor, "Pass a tensor of row numbers.")
        if self._readers is not None:
            for some in rows.split(_ROWS_AT_ONCE):
                self._readers.submit(_touch, self._leaves, some)

    def _checked(self, leaves: Sequence[Any], spec: Any) -> list[Tensor]:  # noqa: ANN401
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        first = [leaf for leaf in self._tree if isinstance(leaf, Tensor)]
        counts = {tuple(t.shape[:1]) for t in tensors}
        if spec != self._spec or len(counts) != 1 or counts == {()}:
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

    def _mapped(self, files: list[IO[bytes]]) -> list[Tensor]:
        mapped = []
        tensors = (leaf for leaf in self._tree if isinstance(leaf, Tensor))
        for file, like in zip(files, tensors, strict=True):
            # Mapped copy-on-write, which torch does not warn of; nobody writes.
            array = np.memmap(file, np.uint8, mode="c")
            if hasattr(mmap, "MADV_RANDOM"):  # not 32 pages for every row
                array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
            raw = torch.from_numpy(array)
            mapped.append(raw.view(like.dtype).view(-1, *like.shape[1:]))
        return mapped


@contextmanager
def _named_errors(folder: str | os.PathLike[str] | None, size: int) -> Iterator[None]:
    """Context whose errors of the disk name its folder, the bytes so far, and a remedy."""
    try:
        yield
    except OSError as error:
        place = tempfile.gettempdir() if folder is None else os.fspath(folder)
        raise OSError(
            error.errno,
            f"{error.strerror or error}: rows of {size / 2**30:.3g} GiB so far, more than are kept in "
            f"memory, do not fit into temporary files in {place}. Set the environment variable TMPDIR "
            f"to a folder with more space, or pass FitSettings with more cache_memory or with "
            f"cache_epochs=None.",
        ) from error


def _close(file: IO[bytes]) -> None:
    """Closes a file; its last bytes may not fit on a full disk, which is known by then."""
    with suppress(OSError):
        file.close()


def _spill(parts: list[list[Tensor]], files: list[IO[bytes]]) -> None:
    """Writes the rows of every tensor to its file."""
    for part, file in zip(parts, files, strict=True):
        for tensor in part:
            file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        part.clear()


def _touch(leaves: list[Tensor], rows: Tensor) -> None:
    """Reads rows, so that they are in the memory of the operating system."""
    for leaf in leaves:
        leaf[rows]


def _of_its_own(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own, as a view keeps the whole tensor in memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _joined(part: list[Tensor]) -> Tensor:
    joined = torch.cat(part)
    part.clear()
    return joined
