"""Samplers of p(z) ∝ r(z)·p(z): functions ``sampler(prior, log_ratio) -> Draw``."""

from ncprior.samplers.base import Draw, LogRatio, Sampler
from ncprior.samplers.budgeted import budgeted_rejection
from ncprior.samplers.compose import at_temperature, sequence
from ncprior.samplers.identity import describe
from ncprior.samplers.langevin import langevin
from ncprior.samplers.mixture import within_components
from ncprior.samplers.rejection import independence, rejection
from ncprior.samplers.sir import sir
from ncprior.samplers.smc import tempered_smc
from ncprior.samplers.target import supports_langevin

__all__ = [
    "Draw",
    "LogRatio",
    "Sampler",
    "at_temperature",
    "budgeted_rejection",
    "describe",
    "independence",
    "langevin",
    "rejection",
    "sequence",
    "sir",
    "supports_langevin",
    "tempered_smc",
    "within_components",
]
