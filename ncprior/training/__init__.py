"""Training of ratio heads as a service."""

from ncprior.training.fit import calibrate_heads, fit
from ncprior.training.history import History, Row
from ncprior.training.stages import nested

__all__ = [
    "History",
    "Row",
    "calibrate_heads",
    "fit",
    "nested",
]
