"""Sources that `improve` compares: the VAE with its own prior, with fitted bases, with heads."""

from __future__ import annotations

from functools import partial
from typing import Any

from ncprior.bases.empirical import NoPrior
from ncprior.bases.joint import JointSource
from ncprior.bases.rebase import Rebased, without_bases
from ncprior.data.batches import first_batch
from ncprior.prior import NCPrior
from ncprior.recipe.choices import BASE, GROUPS, OLD
from ncprior.samplers.sir import sir
from ncprior.source import Group, LatentSource, device_of, num_rows
from ncprior.utils.batches import own_batch

_PROBED = 8  # rows

OWN_DRAW = partial(sir, num_proposals=1)  # of the base


def has_condition(source: LatentSource[Any, Any], data: Any) -> bool:  # noqa: ANN401
    """Returns whether the prior of a source with one group differs from row to row."""
    if isinstance(source, JointSource):
        return False  # it takes no condition, and its prior, drawn as a batch, is never "shared"
    return first_group(source, data).context is not None or source.shared_prior() is None


def draws_slowly(source: LatentSource[Any, Any]) -> bool:
    """Returns whether a base of a source says that it draws one latent after another."""
    bases = (source.bases if isinstance(source, Rebased) else None) or ()
    return any(getattr(base, "is_autoregressive", False) for base in bases)


def has_prior(source: LatentSource[Any, Any], data: Any) -> bool:  # noqa: ANN401
    """Returns whether a VAE has a prior to draw from, unlike a VQ-VAE to which no base is fitted yet."""
    prior = first_group(source, data).prior
    return not isinstance(getattr(prior, "prior", prior), NoPrior)  # of rows of one prior


def vae_of(source: LatentSource[Any, Any]) -> LatentSource[Any, Any]:
    """Returns the VAE with its own prior, below a joint head and below fitted bases."""
    return without_bases(source.prior.source if isinstance(source, JointSource) else source)


def bases_of(source: LatentSource[Any, Any], data: Any) -> dict[str, LatentSource[Any, Any]]:  # noqa: ANN401
    """Returns the sources whose own draws heads on a source must beat, by arm, the closest last.

    They are the VAE with its own prior, unless it has none; with a fitted base, if there is one; and
    below a joint head with the heads of the groups, if any is on. Below a joint head, all groups of
    each are one.
    """
    vae = vae_of(source)
    first = source.prior if isinstance(source, JointSource) else None
    based = source if first is None else first.source
    found: dict[str, LatentSource[Any, Any]] = {OLD: vae} if has_prior(vae, data) else {}
    if based is not vae:
        found[BASE] = based
    if first is None:
        return found
    found = {arm: JointSource(off(NCPrior(one, first.heads))) for arm, one in found.items()}
    return {**found, GROUPS: source} if any(first.active) else found


def off(prior: NCPrior) -> NCPrior:
    """Leaves the base of a prior alone, with its own draw; returns the prior."""
    prior.active = [False] * prior.source.num_groups
    prior.sampler, prior.strength = OWN_DRAW, 1.0
    return prior.eval()


def first_group(source: LatentSource[Any, Any], data: Any) -> Group:  # noqa: ANN401
    """Returns the first group of a source, for a few rows of data."""
    batch = own_batch(first_batch(data, _PROBED), device_of(source))
    encoding = source.encode(batch)
    return source.group(source.start(num_rows(encoding), encoding))
