"""Batches of data: streamed, moved to a device, and kept as encodings."""

from ncprior.data.device_loader import Loader
from ncprior.data.encodings import KeptEncodings, KeptWalks, Walks
from ncprior.data.row_store import Rows
from ncprior.data.stream import RowData, Stream, first_batch, in_order, split

__all__ = [
    "KeptEncodings",
    "KeptWalks",
    "Loader",
    "RowData",
    "Rows",
    "Stream",
    "Walks",
    "first_batch",
    "in_order",
    "split",
]
