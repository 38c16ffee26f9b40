"""VAEBM: an energy on images that reweights a VAE in data space."""

from ncprior.vaebm.energy_net import EnergyNet
from ncprior.vaebm.fit import EnergyHistory, EnergyRow, fit_vaebm
from ncprior.vaebm.gaussian_decoder import GaussianDecoder
from ncprior.vaebm.model import VAEBM, Chains
from ncprior.vaebm.settings import EnergySettings
from ncprior.vaebm.trainer import EnergyMetrics, VAEBMTrainer

__all__ = [
    "VAEBM",
    "Chains",
    "EnergyHistory",
    "EnergyMetrics",
    "EnergyNet",
    "EnergyRow",
    "EnergySettings",
    "GaussianDecoder",
    "VAEBMTrainer",
    "fit_vaebm",
]
