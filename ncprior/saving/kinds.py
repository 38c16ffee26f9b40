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
from ncprior.heads.codes import CategoricalHead
from ncprior.heads.networks import ConvHead, MLPHead
from ncprior.heads.product import ProductHead
from ncprior.saving.checks import SavedFile
from ncprior.source import LatentSource
from ncprior.utils.states import faults

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
    """Builds the head of group k from its entry and its tensors."""
    build = partial(saved.build_network, f"head {k}", table=HEADS, remedy="Pass heads=")
    match entry:
        case {"kind": "ProductHead", "config": {"heads": [_, *_] as factors}}:
            head: nn.Module = ProductHead([build(factor) for factor in factors])
        case _:
            head = build(entry)
    return saved.fill(head, f"heads.{k}.", "heads")


def is_custom(entry: Any) -> bool:  # noqa: ANN401
    """Whether an entry, or a factor of a product of heads, is outside the tables of kinds."""
    match entry:
        case {"kind": "custom"}:
            return True
        case {"kind": "ProductHead", "config": {"heads": list(factors)}}:
            return any(isinstance(f, dict) and f.get("kind") == "custom" for f in factors)
    return False


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

    numbers = {name: t for name, t in tensors.items() if name in ("logits", "loc", "scale")}
    whole = [name for name, t in numbers.items() if not t.is_floating_point()]
    if wrong := f"no real numbers: {', '.join(whole)}" if whole else faults(tensors, "base."):
        saved.fail(f"the tensors of its base cannot be used ({wrong})")
    table = {kind: rebuild(cls) for kind, cls in BASES.items()}
    remedy = "Put it on the source: rebase(source, base), or nested(prior, sampler)"
    return saved.build("its base", saved.config["base"], table, remedy)
