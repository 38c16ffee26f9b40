"""The MNIST models of LARS and SNIS as latent sources."""

from ncprior.adapters.lars_snis.priors import EnergyNet, LARSPrior, SNISPrior
from ncprior.adapters.lars_snis.vae import (
    EIMVAE,
    Binarised,
    ConvEIMSource,
    ConvEIMVAE,
    EIMSource,
    train_vae,
)

__all__ = [
    "EIMVAE",
    "Binarised",
    "ConvEIMSource",
    "ConvEIMVAE",
    "EIMSource",
    "EnergyNet",
    "LARSPrior",
    "SNISPrior",
    "train_vae",
]
