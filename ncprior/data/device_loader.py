"""Loading of batches on a device, or on the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ncprior.data.stream import Stream
from ncprior.source import num_rows
from ncprior.utils.batches import map_tensors, take_rows, to_device
from ncprior.utils.require import require_counts, require_instance

_END = object()


class Loader:
    """An iterator over the batches of a stream on a device, or over this rank's rows of each.

    On a GPU, a batch is copied from pinned memory while the previous one is in use.

    Arguments:
        stream: The stream.
        device: Device of the batches.
        share: This rank and the number of ranks; rank r of n gets the rows r, r + n, r + 2n, …
        before: Function that is called with the index of a batch before that batch is read.
        first: Index of the first batch.

    Example:
        >>> loader = Loader(Stream(torch.arange(8), batch_size=4), torch.device("cpu"), (1, 2))
        >>> len(next(loader))
        2
    """

    def __init__(
        self,
        stream: Stream,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
        *,
        before: Callable[[int], None] | None = None,
        first: int = 0,
    ) -> None:
        require_instance("stream", stream, Stream, "Pass Stream(data, batch_size).")
        require_instance("device", device, torch.device, "Pass torch.device(...).")
        require_counts(ranks=share[1])
        require_counts(f"[0, {share[1]})", rank=share[0])
        self.stream, self.device, self.share = stream, device, share
        self.before, self.number = before, first
        self.is_ahead = device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Any = _END
        self._place = stream.state()

    def __next__(self) -> Any:  # noqa: ANN401
        """Returns the next batch; stops where the stream does."""
        batch = self._read() if self._next is _END else self._next
        self._next, self._place = _END, self.stream.state()
        if self._copying is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copying)
            map_tensors(partial(_record, stream=current), batch)
        if self.is_ahead:
            try:
                self._next = self._read()
            except StopIteration:
                pass  # and so it does again when it is asked for
        return batch

    def state(self) -> dict[str, Any]:
        """Returns the position in the data after the last batch that was returned."""
        return self._place

    def _read(self) -> Any:  # noqa: ANN401
        if self.before is not None:
            self.before(self.number)
        batch = next(self.stream)
        self.number += 1
        rank, ranks = self.share
        if ranks > 1:
            if num_rows(batch) < ranks:  # every rank sees the whole batch, and so all raise
                raise ValueError(
                    f"Every rank takes rows of every batch; got a batch of {num_rows(batch)} rows "
                    f"for {ranks} ranks. Make a DataLoader with drop_last=True, or larger batches."
                )
            batch = take_rows(batch, slice(rank, None, ranks))
        with nullcontext() if self._copying is None else torch.cuda.stream(self._copying):
            return to_device(batch, self.device)


def _record(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor
