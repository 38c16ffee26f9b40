"""The networks of the RAE paper, to train here, and their latent source."""

from ncprior.adapters.rae.models import RAE, VAE, pad_to_32, settle
from ncprior.adapters.rae.source import RAESource

__all__ = ["RAE", "VAE", "RAESource", "pad_to_32", "settle"]
