"""Encodings of one batch for many draws: copies of one, or drawn anew where the encoder draws."""

from __future__ import annotations

from typing import Any

from ncprior.source import LatentSource, num_rows
from ncprior.utils.batches import tile_rows
from ncprior.utils.random_state import random_state
from ncprior.utils.trees import same


class TiledEncodings:
    """Encodings of one batch, each with draws of its own.

    An encoder that draws z, as for a posterior that is drawn bottom-up, gives all copies of one
    encoding the same z: it is called anew.

    Arguments:
        source: The VAE.
        x: The batch.

    Attributes:
        first: An encoding of the batch.
        rows: The number of its rows.

    Example:
        >>> TiledEncodings(source, x).tiled(3).posterior["Normal"]["loc"].shape[0] == 3 * len(x)
        True
    """

    def __init__(self, source: LatentSource[Any, Any], x: Any) -> None:  # noqa: ANN401
        before = random_state()
        self.source, self.x, self.first = source, x, source.encode(x)
        self._draws = not same(random_state(), before)
        self.rows = num_rows(self.first)

    def tiled(self, count: int) -> Any:  # noqa: ANN401
        """Returns encodings of so many copies of the batch, one copy after the other."""
        if self._draws:
            return self.source.encode(tile_rows(self.x, count))
        return tile_rows(self.first, count)
