"""Models of pythae (benchmark_VAE) as sources, and a sampler with the interface of pythae's own."""

from ncprior.adapters.pythae.sampler import NCPSampler
from ncprior.adapters.pythae.source import PythaeSource

__all__ = ["NCPSampler", "PythaeSource"]
