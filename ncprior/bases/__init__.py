"""Base priors, fitted to the aggregate posterior of a VAE, in place of its own prior."""

from ncprior.bases.active import active_latents, kl_per_latent
from ncprior.bases.code_bases import fit_code_bases
from ncprior.bases.code_network import CodeNetwork, fit_code_network
from ncprior.bases.codes import CodeFrequencies, NoCodePrior, fit_code_frequencies
from ncprior.bases.empirical import Empirical, NoPrior, stored_numbers
from ncprior.bases.flow import Flow
from ncprior.bases.flow_fit import fit_flow, fit_flows
from ncprior.bases.flow_matching import FlowMatching, VelocityNet, fit_flow_matching
from ncprior.bases.joint import JointSource
from ncprior.bases.latents import latents_of
from ncprior.bases.masked_conv import MaskedConvNet
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.mixture_em import fit_gaussian, fit_mixture
from ncprior.bases.rebase import Base, Rebased, rebase
from ncprior.bases.vamp import fit_vamp

__all__ = [
    "Base",
    "CodeFrequencies",
    "CodeNetwork",
    "Empirical",
    "Flow",
    "FlowMatching",
    "GaussianMixture",
    "JointSource",
    "MaskedConvNet",
    "NoCodePrior",
    "NoPrior",
    "Rebased",
    "VelocityNet",
    "active_latents",
    "fit_code_bases",
    "fit_code_frequencies",
    "fit_code_network",
    "fit_flow",
    "fit_flow_matching",
    "fit_flows",
    "fit_gaussian",
    "fit_mixture",
    "fit_vamp",
    "kl_per_latent",
    "latents_of",
    "rebase",
    "stored_numbers",
]
