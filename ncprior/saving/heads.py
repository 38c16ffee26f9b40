"""Saving of a prior: ratio heads, a fitted base, strength, active groups and sampler."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from textwrap import shorten
from typing import Any, ClassVar

from torch import Tensor, nn

from ncprior.bases.joint import JointSource
from ncprior.bases.rebase import Rebased, rebase
from ncprior.samplers.base import Sampler
from ncprior.samplers.identity import describe
from ncprior.saving.cards import prior_text
from ncprior.saving.checks import (
    FORMAT,
    SavedFile,
    Validators,
    fingerprints,
    is_count,
    is_fingerprint,
    is_number,
)
from ncprior.saving.hub import locate
from ncprior.saving.kinds import (
    JOINT,
    base_entry,
    base_tensors,
    build_base,
    build_head,
    head_entry,
    is_custom,
    is_joint,
)
from ncprior.saving.mixin import Pretrained
from ncprior.saving.samplers import build_sampler, sampler_entry
from ncprior.source import LatentSource, device_of, require_source
from ncprior.utils.require import require_numbers
from ncprior.utils.switches import Switches

FILE = "ncprior.safetensors"


class PretrainedHeads(Pretrained):
    """The part of :class:`~ncprior.NCPrior` that is saved: one ratio head per latent group."""

    heads: nn.ModuleList
    strength: float
    active: Switches
    sampler: Sampler | None

    _file = FILE
    _own_modules = "heads"
    _tags = ("ncprior", "vae", "noise-contrastive-prior")
    _validators: ClassVar[Validators] = {
        "num_groups": lambda value: is_count(value, 1),
        "heads": lambda value: isinstance(value, list),
        "base": lambda value: value is None or isinstance(value, dict),
        "strength": lambda value: is_number(value, 0),
        "active": lambda value: isinstance(value, list) and {*map(type, value)} <= {bool},
        "fingerprint": lambda value: is_fingerprint(value, "vae", "base"),
        "sampler": lambda value: isinstance(value, dict),
    }

    def _tensors(self) -> dict[str, Tensor]:
        first = _first_of(self.source)
        of_base = base_tensors(self.source) if first is None else first._tensors()
        return {**self.state_dict(), **{f"base.{name}": t for name, t in of_base.items()}}

    def _configuration(self) -> dict[str, Any]:
        require_numbers("[0, inf)", strength=self.strength)
        first = _first_of(self.source)
        base = None if first is None else {"kind": JOINT, "config": first._configuration()}
        return {
            "num_groups": len(self.heads),
            "heads": [head_entry(head) for head in self.heads],
            "base": base or base_entry(self.source),
            "strength": float(self.strength),
            "active": [bool(on) for on in self.active],
            "fingerprint": fingerprints(self.source),
            **_saved_sampler(self.sampler),
        }

    def _card_text(self, config: Mapping[str, Any], **names: Any) -> str:  # noqa: ANN401
        sizes = [sum(p.numel() for p in head.parameters()) for head in self.heads]
        sampler = describe(self.sampler) if "sampler" in config else None
        return prior_text(config, sizes, sampler=sampler, **names)

    @classmethod
    def _check(cls, saved: SavedFile) -> None:
        _check_counts(saved)
        first, of_base = cls._first(saved), saved.take("base.")
        if first is not None:
            cls._check(first)
        elif saved.config["base"] is not None and not is_custom(saved.config["base"]):
            build_base(saved, of_base)
        for k, entry in enumerate(saved.config["heads"]):
            if not is_custom(entry):
                build_head(saved, k, entry)
        _loaded_sampler(saved)

    @classmethod
    def _build(
        cls,
        saved: SavedFile,
        source: LatentSource[Any, Any],
        check_fingerprint: bool,
        heads: nn.Module | Iterable[nn.Module] | None = None,
    ) -> PretrainedHeads:
        require_source(source)
        config = saved.config
        _check_counts(saved)
        first = cls._first(saved)
        if first is not None and not isinstance(source, JointSource):
            source = cls._joint(first, source, check_fingerprint)
        if config["num_groups"] != source.num_groups:
            saved.fail(
                f"it has heads for {config['num_groups']} latent groups, and the source has "
                f"{source.num_groups}",
                "Pass the VAE that it was trained on",
            )
        sampler, source = _loaded_sampler(saved), _with_base(saved, source)
        if check_fingerprint:
            saved.check_fingerprints(fingerprints(source))
        if (new := heads) is None:
            new = nn.ModuleList(build_head(saved, k, e) for k, e in enumerate(config["heads"]))
            saved.check_all_taken("heads")
            new.to(device_of(source))
        prior = cls(source, new)
        if heads is not None:
            saved.check_tensors(prior.state_dict(), "heads")
        prior.strength, prior.active = float(config["strength"]), config["active"]
        prior.sampler = sampler
        if heads is not None:
            prior.load_state_dict(saved.tensors)
        return prior

    @classmethod
    def _joint(
        cls, first: SavedFile, source: LatentSource[Any, Any], check_fingerprint: bool
    ) -> JointSource:
        """Builds the first prior of a joint head on the VAE, and returns all its groups as one."""
        remedy = "Pass JointSource(first prior) as the source"
        if any(map(is_custom, first.config["heads"])):
            first.fail("its first prior has heads that ncprior cannot build", remedy)
        if "sampler" not in first.config:
            first.fail("its first prior has no sampler", remedy)
        prior: Any = cls._build(first, source, check_fingerprint).eval()
        return JointSource(prior)

    @classmethod
    def _first(cls, saved: SavedFile) -> SavedFile | None:
        """Returns the part of the file that holds the first prior of a joint head, if there is one."""
        if not is_joint(saved.config["base"]):
            return None
        own = {"format": FORMAT, "ncprior": saved.config["ncprior"]}
        config = {**saved.config["base"]["config"], **own}
        if is_joint(config.get("base")):
            saved.fail("its first prior is of a joint head, too")
        of_base = {name: t for name, t in saved.tensors.items() if name.startswith("base.")}
        tensors = {name.removeprefix("base."): t for name, t in of_base.items()}
        return SavedFile(saved.path, tensors, config, cls._validators)


def inspect(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Returns the configuration of a saved prior, without running code from it.

    Arguments:
        path_or_repo: A directory, a file, or a Hub repository.
        revision: Branch, tag or commit of the repository.
        token: The access token; ``None`` is the one logged in with.

    Returns:
        The configuration, by key: ``heads``, ``base``, ``strength``, ``active``, ``fingerprint``,
        ``num_groups``, ``format``, the version ``ncprior``, and ``sampler`` if the prior has one.

    Raises:
        FileNotFoundError: If there is no such file, directory or repository.
        OSError: If the Hub cannot be reached, denies access or fails.
        ValueError: If the file is truncated, or no saved prior. Download or save it again.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> prior.save_pretrained(directory)
        >>> inspect(directory)["heads"][0]["kind"]
        'MLPHead'
    """
    path = locate(path_or_repo, FILE, revision, token)
    return SavedFile.read_configuration(path, PretrainedHeads._validators)


def _check_counts(saved: SavedFile) -> None:
    """Validates that there is one head, and one flag, per latent group."""
    count = saved.config["num_groups"]
    saved.check_values({key: len(saved.config[key]) == count for key in ("heads", "active")})


def _saved_sampler(sampler: Sampler | None) -> dict[str, Any]:
    """Returns the part of the configuration for a sampler: none without one that can be saved."""
    if sampler is None:
        return {}
    if (entry := sampler_entry(sampler)) is None:
        warnings.warn(
            f"The prior is saved without its sampler, {shorten(describe(sampler), 200)}: a file holds "
            f"samplers of ncprior.samplers with numbers only. Set prior.sampler again after loading.",
            stacklevel=5,  # the caller of save_pretrained
        )
        return {}
    return {"sampler": entry}


def _loaded_sampler(saved: SavedFile) -> Sampler | None:
    """Returns the sampler of a file, ``None`` without one."""
    entry = saved.config.get("sampler")
    return None if entry is None else build_sampler(saved, entry)


def _first_of(source: LatentSource[Any, Any]) -> PretrainedHeads | None:
    """Returns the first prior under a joint head, ``None`` if there is no joint head."""
    first = source.prior if isinstance(source, JointSource) else None
    return first if isinstance(first, PretrainedHeads) else None


def _with_base(saved: SavedFile, source: LatentSource[Any, Any]) -> LatentSource[Any, Any]:
    """Returns the source with the saved base on it, unless another base is on it already."""
    of_base, entry = saved.take("base."), saved.config["base"]
    if isinstance(source, JointSource):
        return source
    if of_base and (entry is None or is_custom(entry)):
        saved.fail("it has tensors of a base, and its configuration names no such base")
    if entry is None or isinstance(source, Rebased):
        return source
    built, device = build_base(saved, of_base), device_of(source)
    if isinstance(built, list):
        return rebase(source, [base.to(device) for base in built])
    event = getattr(source.shared_prior(), "event_shape", None) or built.event_shape
    if tuple(event) != tuple(built.event_shape):
        saved.fail(
            f"its base has latents of shape {tuple(built.event_shape)}, and the source of "
            f"{tuple(event)}",
            "Pass the VAE that it was trained on",
        )
    return rebase(source, built.to(device))
