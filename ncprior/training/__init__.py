"""Training of ratio heads: the loop, its settings and history, and steps that can follow it."""

from ncprior.training.calibration import calibrate_heads
from ncprior.training.encoder import AmortisedSource, fit_encoder
from ncprior.training.fit import fit
from ncprior.training.gating import gate
from ncprior.training.history import History, Row
from ncprior.training.loggers import log_to_json, log_to_tensorboard, log_to_wandb
from ncprior.training.particles import ResampledPosterior
from ncprior.training.settings import FitSettings
from ncprior.training.stages import nested

__all__ = [
    "AmortisedSource",
    "FitSettings",
    "History",
    "ResampledPosterior",
    "Row",
    "calibrate_heads",
    "fit",
    "fit_encoder",
    "gate",
    "log_to_json",
    "log_to_tensorboard",
    "log_to_wandb",
    "nested",
]
