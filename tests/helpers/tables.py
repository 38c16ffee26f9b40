"""A stand-in for a DataFrame of any library: named columns, and a conversion to NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np


class Frame:
    """A table made from columns by name."""

    def __init__(self, **columns: Any) -> None:
        self.columns = list(columns)
        self._columns = list(columns.values())

    def to_numpy(self) -> np.ndarray:
        kinds = {np.asarray(column).dtype.kind for column in self._columns}
        kind = float if kinds <= set("iuf") else object
        return np.stack([np.asarray(column).astype(kind) for column in self._columns], axis=1)
