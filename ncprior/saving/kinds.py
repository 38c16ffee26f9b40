"""Kinds of heads and bases that a configuration can name, and how each is built from it.

An entry of a configuration is ``{"kind": name, "config": arguments}``. Only kinds of the tables
here are built. Any other module has the kind ``"custom"``, and only its tensors are saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ncprior.bases.flow import Flow
from ncprior.bases.flow_matching import FlowMatching
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.rebase import Rebased
from ncprior.heads.networks import CategoricalHead, ConvHead, MLPHead
from ncprior.heads.product import ProductHead
from ncprior.saving.checks import SavedFile
from ncprior.source import LatentSource

HEADS = {cls.__name__: cls for cls in (MLPHead, ConvHead, CategoricalHead)}

BASES = {cls.__name__: cls for cls in (GaussianMixture, Flow, FlowMatching)}


def entry_of(module: Any, table: Mapping[str, type[Any]]) -> dict[str, Any]:  # noqa: ANN401
    """Returns the entry of a module: its kind and its constructor's arguments."""
    name = type(module).__name__
    if table.get(name) is type(module):
        return {"kind": name, "config": module.config()}
    return {"kind": "custom", "config": {"class": name}}


def head_entry(head: nn.Module) -> dict[str, Any]:
    """Returns the entry of a head; a product of several stages lists its factors."""
    if type(head) is ProductHead:
        factors = [head_entry(factor) for factor in head.heads]
        return {"kind": "ProductHead", "config": {"heads": factors}}
    return entry_of(head, HEADS)


def build_head(saved: SavedFile, k: int, entry: Any) -> nn.Module:  # noqa: ANN401
    """Builds the head of group k from its entry."""
    build = partial(saved.build, f"head {k}", table=HEADS, remedy="Pass heads=")
    match entry:
        case {"kind": "ProductHead", "config": {"heads": [_, *_] as factors}}:
            return ProductHead(map(build, factors))
    head: nn.Module = build(entry)
    return head


def saved_base(source: LatentSource[Any, Any]) -> GaussianMixture | Flow | FlowMatching | None:
    """Returns the base of a rebased source; ``None`` if its kind is not in the table."""
    base: Any = source.prior if isinstance(source, Rebased) else None
    return base if type(base) in BASES.values() and base.config() is not None else None


def base_entry(source: LatentSource[Any, Any]) -> dict[str, Any] | None:
    """Returns the entry of the base of a source.

    ``None`` stands for a base that is not saved: the VAE's own prior, or a distribution, which the
    fingerprint identifies.
    """
    base = saved_base(source)
    if base is not None:
        return entry_of(base, BASES)
    # A function of the group and its number can neither be saved nor have a fingerprint.
    is_function = isinstance(source, Rebased) and source.prior is None
    return {"kind": "custom", "config": {}} if is_function else None


def build_base(saved: SavedFile, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    """Builds the fitted base from its entry and its tensors."""

    def rebuild(cls: Any) -> Any:  # noqa: ANN401
        return lambda **config: cls.rebuild(tensors, config)

    table = {kind: rebuild(cls) for kind, cls in BASES.items()}
    remedy = "Put it on the source: rebase(source, base), or nested(prior, sampler)"
    return saved.build("its base", saved.config["base"], table, remedy)
