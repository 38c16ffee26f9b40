"""The MNIST models of LARS and SNIS as latent sources."""

from ncprior.adapters.lars_snis.priors import EnergyNet, LARSPrior, SNISPrior
from ncprior.adapters.lars_snis.source import ConvEIMSource, EIMSource
from ncprior.adapters.lars_snis.train import Binarised, train_vae
from ncprior.adapters.lars_snis.vae import EIMVAE, ConvEIMVAE

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
