"""Better priors for pretrained VAEs by noise contrastive estimation."""

from ncprior._version import __version__
from ncprior.nce import nce_loss
from ncprior.prior import NCPrior, Sample
from ncprior.samplers.base import Draw
from ncprior.samplers.langevin import langevin
from ncprior.samplers.sir import sir
from ncprior.single_group import SingleGroup
from ncprior.source import Group, LatentSource
from ncprior.trainer import NCETrainer
from ncprior.training.fit import fit

__all__ = [
    "Draw",
    "Group",
    "LatentSource",
    "NCETrainer",
    "NCPrior",
    "Sample",
    "SingleGroup",
    "__version__",
    "fit",
    "langevin",
    "nce_loss",
    "sir",
]
