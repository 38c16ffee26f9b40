"""Ratio heads: networks log r(z, c), and what prepares them for samplers."""

from ncprior.heads.fast import prepare_head
from ncprior.heads.inputs import head_input
from ncprior.heads.make import make_head
from ncprior.heads.networks import CategoricalHead, ConvHead, MLPHead
from ncprior.heads.product import ProductHead, factors

__all__ = [
    "CategoricalHead",
    "ConvHead",
    "MLPHead",
    "ProductHead",
    "factors",
    "head_input",
    "make_head",
    "prepare_head",
]
