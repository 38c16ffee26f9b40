"""NVAE and VAEBM's NVAE as latent sources."""

from ncprior.adapters.nvae.checkpoints import (
    load_checkpoint,
    on_cpu,
    readjust_batchnorm,
    without_cuda,
)
from ncprior.adapters.nvae.source import NVAESource

__all__ = [
    "NVAESource",
    "load_checkpoint",
    "on_cpu",
    "readjust_batchnorm",
    "without_cuda",
]
