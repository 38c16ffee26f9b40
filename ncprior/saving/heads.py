"""Saving of a prior: ratio heads, a fitted base, the strength and the active groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ncprior.bases.rebase import Rebased, rebase
from ncprior.saving.cards import prior_text
from ncprior.saving.checks import SavedFile, Validators, fingerprints, is_fingerprint
from ncprior.saving.hub import locate
from ncprior.saving.kinds import base_entry, build_base, build_head, head_entry, saved_base
from ncprior.saving.mixin import Pretrained
from ncprior.saving.tensors import read_metadata
from ncprior.source import LatentSource, device_of
from ncprior.utils.switches import Switches

FILE = "ncprior.safetensors"


class PretrainedHeads(Pretrained):
    """The part of :class:`~ncprior.NCPrior` that is saved: one ratio head per latent group."""

    heads: nn.ModuleList
    strength: float
    active: Switches

    _file = FILE
    _tags = ("ncprior", "vae", "noise-contrastive-prior")
    _validators: ClassVar[Validators] = {
        "num_groups": lambda value: isinstance(value, int),
        "heads": lambda value: isinstance(value, list),
        "base": lambda value: value is None or isinstance(value, dict),
        "strength": lambda value: isinstance(value, int | float) and 0 <= value < math.inf,
        "active": lambda value: isinstance(value, list) and {*map(type, value)} <= {bool},
        "fingerprint": lambda value: is_fingerprint(value, "vae", "base"),
    }

    def _tensors(self) -> dict[str, Tensor]:
        base = saved_base(self.source)
        of_base = {} if base is None else base.tensors()
        return {**self.state_dict(), **{f"base.{name}": t for name, t in of_base.items()}}

    def _configuration(self) -> dict[str, Any]:
        return {
            "num_groups": len(self.heads),
            "heads": [head_entry(head) for head in self.heads],
            "base": base_entry(self.source),
            "strength": float(self.strength),
            "active": [bool(on) for on in self.active],
            "fingerprint": fingerprints(self.source),
        }

    def _card_text(self, config: Mapping[str, Any], **names: Any) -> str:  # noqa: ANN401
        sizes = [sum(p.numel() for p in head.parameters()) for head in self.heads]
        return prior_text(config, sizes, **names)

    @classmethod
    def _build(
        cls,
        saved: SavedFile,
        source: LatentSource[Any, Any],
        check_fingerprint: bool,
        heads: nn.Module | Iterable[nn.Module] | None = None,
    ) -> PretrainedHeads:
        config = saved.config
        _check_groups(saved, source)
        of_base = saved.take("base.")
        if config["base"] is not None and not isinstance(source, Rebased):
            source = rebase(source, build_base(saved, of_base).to(device_of(source)))
        if check_fingerprint:
            saved.check_fingerprints(fingerprints(source))
        if (new := heads) is None:
            new = [build_head(saved, k, entry) for k, entry in enumerate(config["heads"])]
        prior = cls(source, new)
        saved.check_tensors(prior.state_dict(), "heads")
        prior.load_state_dict(saved.tensors, assign=heads is None)
        prior.strength, prior.active = config["strength"], config["active"]
        return prior


def inspect(
    path_or_repo: str | os.PathLike[str], *, revision: str | None = None
) -> dict[str, Any]:
    """Returns the configuration of a saved prior, without running code from it.

    Arguments:
        path_or_repo: A directory, a file, or a Hub repository.
        revision: Branch, tag or commit of the repository.

    Returns:
        The configuration, by key: ``heads``, ``base``, ``strength``, ``active``, ``fingerprint``,
        ``num_groups``, ``format`` and the version ``ncprior``.

    Raises:
        FileNotFoundError: If there is no such file, directory or repository.
        ValueError: If the file is truncated or not of this package. Download or save it again.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> prior.save_pretrained(directory)
        >>> inspect(directory)["heads"][0]["kind"]
        'MLPHead'
    """
    return read_metadata(locate(path_or_repo, FILE, revision))


def _check_groups(saved: SavedFile, source: LatentSource[Any, Any]) -> None:
    """Validates that there is one head per latent group of the source."""
    count = saved.config["num_groups"]
    saved.check_values({key: len(saved.config[key]) == count for key in ("heads", "active")})
    if count != source.num_groups:
        saved.fail(
            f"it has heads for {count} latent groups, and the source has {source.num_groups}",
            "Pass the VAE that it was trained on",
        )
