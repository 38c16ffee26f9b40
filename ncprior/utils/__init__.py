"""Helpers without VAEs: optimisation, precision, fingerprints, random states, process groups."""

from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.optimise import train
from ncprior.utils.precision import at_precision, fast_precision
from ncprior.utils.visible import require_eval

__all__ = ["at_precision", "fast_precision", "module_fingerprint", "require_eval", "train"]
