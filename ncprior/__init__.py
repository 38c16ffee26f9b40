"""Better priors for pretrained VAEs by noise contrastive estimation."""

from ncprior.dynamics import langevin
from ncprior.loop import fit
from ncprior.nce import nce_loss
from ncprior.prior import NCPrior, Sample
from ncprior.samplers import Draw, sir
from ncprior.source import Group, LatentSource, SingleGroup
from ncprior.trainer import NCETrainer

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

__version__ = "0.1.0"
