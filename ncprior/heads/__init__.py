"""Ratio heads: networks for log r(z, c), and their fast evaluation in samplers."""

from ncprior.heads.codes import CategoricalHead
from ncprior.heads.fast import prepare_head
from ncprior.heads.inputs import head_input
from ncprior.heads.make import make_head
from ncprior.heads.networks import ConvHead, MLPHead
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
