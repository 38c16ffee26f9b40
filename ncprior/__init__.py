"""Better priors for pretrained VAEs by noise contrastive estimation.

A pretrained VAE is a *source*. :class:`NCPrior` multiplies its prior by the ratios of trained heads,
:func:`fit` trains the heads, and a sampler such as :func:`sir` draws from the new prior. The names in
``ncprior`` are the core. Everything else is imported from one of these files and folders, lowest
floor first; a file imports only from lower floors and from its own folder:

=====================  ===========================================================================
``utils``              precision, random states, process groups, fingerprints
``distributions``      distributions as pytrees of tensors
``nce``                the loss of noise contrastive estimation, with its derivation
``source``             a VAE as groups of latents: ``LatentSource``, ``Group``, ``visit``
``single_group``       ``SingleGroup``: a VAE with one group, from its three parts
``heads``              ratio heads log r(z, context)
``data``               batches of data and caches of encodings
``testing``            ``check_source``, the test that every source must pass
``bases``              base priors closer to the encodings: mixtures, VampPrior, flows
``samplers``           SIR, Langevin dynamics, SMC, rejection, and compositions of samplers
``saving``             files, model cards and the Hugging Face Hub
``prior``              ``NCPrior``: a source with its heads
``trainer``            ``NCETrainer``: one training step for a loop of your own
``diagnostics``        report on the heads; choice of a sampler and of a strength
``jobs``               large sampling jobs in parts on disk
``training``           ``fit``: the training loop, its checkpoints and its stages
``vaebm``              energies on images, alone or on top of an ``NCPrior``
``evaluation``         quality of samples, likelihoods, out-of-distribution scores
``recipe``             choices by held-out evidence, and the report on them as a page
``adapters``           sources for published models: NVAE, VDVAE, pythae, diffusers, scVI, …
``demo``               the demonstration and its small networks
``__main__``           the command ``ncprior``
=====================  ===========================================================================
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ncprior._version import __version__

if TYPE_CHECKING:
    from ncprior.nce import nce_loss
    from ncprior.prior import NCPrior
    from ncprior.recipe.improve import improve
    from ncprior.samplers.base import Draw, Sample
    from ncprior.samplers.langevin import langevin
    from ncprior.samplers.sir import sir
    from ncprior.single_group import SingleGroup
    from ncprior.source import Group, LatentSource
    from ncprior.trainer import NCETrainer
    from ncprior.training.fit import fit
else:

    def __getattr__(name: str) -> Any:  # noqa: ANN401
        """Imports the core at the first use of a name: ``ncprior --help`` needs no torch."""
        if not name.startswith("_"):
            for home in _HOMES:
                found = vars(import_module(f"ncprior.{home}"))
                globals().update({key: found[key] for key in found.keys() & {*__all__}})
        if name not in globals():
            raise AttributeError(f"module 'ncprior' has no attribute {name!r}")
        return globals()[name]


_HOMES = (
    *("nce", "prior", "recipe.improve", "samplers.langevin", "samplers.sir", "single_group"),
    *("source", "trainer", "training.fit"),
)

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
    "improve",
    "langevin",
    "nce_loss",
    "sir",
]
