"""Kinds of heads and bases that a configuration can name, and how each is built from it.

An entry of a configuration is ``{"kind": name, "config": arguments}``. Only kinds of the tables
here are built. Any other module has the kind ``"custom"``, and only its tensors are saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ncprior.bases.code_network import CodeNetwork
from ncprior.bases.codes import CodeFrequencies
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

BASES = {
    cls.__name__: cls
    for cls in (GaussianMixture, Flow, FlowMatching, CodeFrequencies, CodeNetwork)
}

_SEVERAL = "several"  # the kind of a list of bases, one for each group

JOINT = "NCPrior"  # the kind of the base of a JointSource: a prior, by its whole configuration


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


def is_joint(entry: Any) -> bool:  # noqa: ANN401
    """Whether an entry is the base of a joint head: a prior with a head for each group."""
    match entry:
        case {"kind": kind, "config": dict()}:
            return bool(kind == JOINT)
    return False


def saved_bases(source: LatentSource[Any, Any]) -> tuple[Any, ...]:
    """Returns the bases of all groups of a rebased source; none if the kind of one is not saved."""
    bases = (source.bases or ()) if isinstance(source, Rebased) else ()
    kinds = tuple(BASES.values())
    saved = all(type(base) in kinds and base.config() is not None for base in bases)
    return bases if saved else ()


def base_kinds(entry: Mapping[str, Any]) -> str:
    """Returns the kind of the base of an entry, or the kinds of several."""
    bases = entry["config"]["bases"] if entry["kind"] == _SEVERAL else [entry]
    return ", ".join(str(base["kind"]) for base in bases)


def base_tensors(source: LatentSource[Any, Any]) -> dict[str, Tensor]:
    """Returns the tensors of the bases to save, by name; of several, with the number of the group."""
    bases = saved_bases(source)
    prefixes = [""] if len(bases) == 1 else [f"{k}." for k in range(len(bases))]
    return {
        f"{prefix}{name}": tensor
        for prefix, base in zip(prefixes, bases, strict=True)
        for name, tensor in base.tensors().items()
    }


def base_entry(source: LatentSource[Any, Any]) -> dict[str, Any] | None:
    """Returns the entry of the base of a source; that of several bases lists theirs.

    ``None`` stands for a base that is not saved: the VAE's own prior, or a distribution, which the
    fingerprint identifies.
    """
    entries = [entry_of(base, BASES) for base in saved_bases(source)]
    if len(entries) > 1:
        return {"kind": _SEVERAL, "config": {"bases": entries}}
    if entries:
        return entries[0]
    # A function of the group and its number can neither be saved nor have a fingerprint.
    unknown = isinstance(source, Rebased) and source.prior is None
    return {"kind": "custom", "config": {}} if unknown else None


def build_base(saved: SavedFile, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    """Builds the fitted base from its entry and its tensors: a list for several groups."""
    entry, count = saved.config["base"], saved.config["num_groups"]
    if entry.get("kind") != _SEVERAL:
        return _build_one(saved, "its base", entry, tensors)
    match entry:
        case {"config": {"bases": list(entries)}} if len(entries) == count:
            pass
        case _:
            saved.fail(f"it has no bases for {count} groups")
    left, bases = dict(tensors), []
    for k, one in enumerate(entries):
        names = [name for name in left if name.startswith(f"{k}.")]
        part = {name.removeprefix(f"{k}."): left.pop(name) for name in names}
        bases.append(_build_one(saved, f"base {k}", one, part))
    if left:
        saved.fail("it has tensors of bases that belong to no group")
    return bases


def _build_one(
    saved: SavedFile,
    whose: str,
    entry: Any,  # noqa: ANN401
    tensors: Mapping[str, Tensor],
) -> Any:  # noqa: ANN401
    def rebuild(cls: Any) -> Any:  # noqa: ANN401
        return lambda **config: cls.rebuild(tensors, config)

    numbers = {name: t for name, t in tensors.items() if name in ("logits", "loc", "scale")}
    whole = [name for name, t in numbers.items() if not t.is_floating_point()]
    if wrong := f"no real numbers: {', '.join(whole)}" if whole else faults(tensors, "base."):
        saved.fail(f"the tensors of {whose} cannot be used ({wrong})")
    table = {kind: rebuild(cls) for kind, cls in BASES.items()}
    remedy = "Put it on the source: rebase(source, base), or nested(prior, sampler)"
    return saved.build(whose, entry, table, remedy)
