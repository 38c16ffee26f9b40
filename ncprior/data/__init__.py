"""Batches of data: streamed, moved to a device, and kept as encodings."""

from ncprior.data.batches import first_batch, one_pass
from ncprior.data.device_loader import Loader
from ncprior.data.encodings import CachedEncodings, CachedGroupsSource, EncodedSource
from ncprior.data.parts import split
from ncprior.data.row_store import RowStore
from ncprior.data.rows import RowData
from ncprior.data.stream import Stream

__all__ = [
    "CachedEncodings",
    "CachedGroupsSource",
    "EncodedSource",
    "Loader",
    "RowData",
    "RowStore",
    "Stream",
    "first_batch",
    "one_pass",
    "split",
]
