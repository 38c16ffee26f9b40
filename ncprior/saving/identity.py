"""All that determines the draws of a prior, or the encodings and draws of a source, as JSON has it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from ncprior.bases.joint import JointSource
from ncprior.samplers.base import Sampler
from ncprior.samplers.identity import identity_of
from ncprior.saving.checks import fingerprints
from ncprior.source import LatentSource, WrappedSource
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.require import described

SIGMA = "GaussianDecoder.sigma"  # of draws of x alone

# Of encodings, which play no part in draws.
_OF_ENCODINGS = (
    *("AmortisedSource.encoder", "TVAESource.encoder", "ResampledPosterior"),
    *("RAESource.noise", "PythaeSource.noise"),
)


def source_facts(source: LatentSource[Any, Any]) -> dict[str, Any]:
    """Returns the fingerprints of VAE and base, and all facts of a source and of a first prior below it.

    Raises:
        TypeError: If a fact is no number, text, list or dict. The message names it.
    """
    found = {name: _plain(name, fact) for name, fact in source.facts().items()}
    inner = source
    while isinstance(inner, WrappedSource):
        inner = inner.source
    if isinstance(inner, JointSource):
        first: Any = inner.prior
        found["first prior of JointSource"] = prior_facts(first, first.chosen(None))
    return {**fingerprints(source), "facts": found}


def facts_of_draws(source: LatentSource[Any, Any], *, draw_x: bool) -> dict[str, Any]:
    """Returns :func:`source_facts` without those that play no part in draws of z, or of x."""
    found = source_facts(source)
    left_out = (*_OF_ENCODINGS, *(() if draw_x else (SIGMA,)))
    return {**found, "facts": {k: v for k, v in found["facts"].items() if k not in left_out}}


def prior_facts(
    prior: Any,  # noqa: ANN401
    sampler: Sampler | None,
    *,
    draw_x: bool = False,
) -> dict[str, Any]:
    """Returns all facts on which the draws of an :class:`~ncprior.NCPrior` by a sampler depend.

    Arguments:
        prior: The prior.
        sampler: Its sampler, or ``None`` if that plays no part.
        draw_x: Whether x is drawn, too, and not only its mean.
    """
    return {
        "heads": module_fingerprint(prior.heads),
        "on": heads_on(prior),
        "strength": float(prior.strength),
        "precision": str(prior.precision),
        "sampler": None if sampler is None else identity_of(sampler),
        "source": facts_of_draws(prior.source, draw_x=draw_x),
    }


def heads_on(prior: Any) -> list[bool]:  # noqa: ANN401
    """Returns for each head of an NCP prior whether it is used."""
    return [prior.is_on(k) for k in range(len(prior.heads))]


def as_text(facts: Any) -> str:  # noqa: ANN401
    """Returns facts as one text, the same for the same facts in any order."""
    return json.dumps(facts, sort_keys=True)


def _plain(name: str, fact: Any) -> Any:  # noqa: ANN401
    """A fact as JSON stores it and gives it back."""
    if fact is None or isinstance(fact, str | bool):
        return fact
    if isinstance(fact, Mapping):
        return {str(key): _plain(f"{name}[{key!r}]", item) for key, item in fact.items()}
    if isinstance(fact, list | tuple):
        return [_plain(f"{name}[{i}]", item) for i, item in enumerate(fact)]
    if isinstance(fact, Integral):
        return int(fact)
    if isinstance(fact, Real) and math.isfinite(fact):
        return float(fact)
    raise TypeError(
        f"Facts of a source are finite numbers, texts, lists and dicts; {name} is {described(fact)}. "
        f"Return float(…), str(…) or a list of numbers from facts()."
    )
