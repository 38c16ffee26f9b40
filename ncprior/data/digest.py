"""Digest of data, by which a checkpoint notices other data."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ncprior.data.batches import one_pass
from ncprior.data.generators import own_generators_restored
from ncprior.data.rows import RowData, as_data, is_map_style
from ncprior.utils.batches import map_tensors
from ncprior.utils.random_state import seeded

_PROBED = 64  # rows, spread over the data


def data_digest(data: Any, batch_size: int) -> str | None:  # noqa: ANN401
    """Returns a digest of some rows of data; all random generators are left unchanged.

    Arguments:
        data: As for :func:`one_pass`. Of rows, 64 are read, spread over all of them; of a list, the
            first batch, the last and one between; otherwise, the first batch.
        batch_size: Rows per batch, where batches are made.

    Returns:
        The digest, or ``None`` if the rows differ when they are read again under the same seed.
    """
    first, second = (_digest_of_probe(data, batch_size) for _ in range(2))
    return first if first == second else None


def _digest_of_probe(data: Any, batch_size: int) -> str:  # noqa: ANN401
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten()
        digest.update(raw.view(torch.uint8).numpy().data)
        return tensor

    with seeded(0), own_generators_restored(data) as generators:
        for generator in generators:
            generator.manual_seed(0)
        map_tensors(add, _probe(as_data(data), batch_size))
    return digest.hexdigest()[:16]


def _probe(data: Any, batch_size: int) -> Any:  # noqa: ANN401
    if isinstance(data, list | tuple):
        return [data[n] for n in sorted({0, len(data) // 2, len(data) - 1})] if data else []
    if isinstance(data, Tensor | RowData) or is_map_style(data):
        count, last = min(len(data), _PROBED), max(0, len(data) - 1)
        rows = torch.linspace(0, last, count, dtype=torch.float64).long()
        if isinstance(data, Tensor | RowData):
            return data[rows.to(data.device)]
        return next(iter(one_pass(Subset(data, rows.tolist()), _PROBED)), [])
    return next(iter(one_pass(data, batch_size)), [])
