"""All that determines the draws of a prior, or the encodings and draws of a source, as JSON has it."""

from __future__ import annotations

from typing import Any

from ncprior.bases.joint import JointSource
from ncprior.samplers.base import Sampler
from ncprior.samplers.compose import identity_of
from ncprior.saving.checks import fingerprints
from ncprior.source import LatentSource
from ncprior.utils.fingerprints import module_fingerprint


def source_facts(source: LatentSource[Any, Any]) -> dict[str, Any]:
    """Returns the fingerprints of VAE and base, the facts of the source, and a first prior below it."""
    found = {**fingerprints(source), **source.facts()}
    if isinstance(source, JointSource):
        first: Any = source.prior
        found["first prior"] = prior_facts(first, first.chosen(None))
    return found


def prior_facts(prior: Any, sampler: Sampler | None) -> dict[str, Any]:  # noqa: ANN401
    """Returns all facts on which the draws of an :class:`~ncprior.NCPrior` by a sampler depend.

    Arguments:
        prior: The prior.
        sampler: Its sampler, or ``None`` if that plays no part.
    """
    return {
        "heads": module_fingerprint(prior.heads),
        "on": [prior.is_on(k) for k in range(len(prior.heads))],
        "strength": float(prior.strength),
        "precision": str(prior.precision),
        "sampler": None if sampler is None else identity_of(sampler),
        "source": source_facts(prior.source),
    }
