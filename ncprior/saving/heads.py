"""Saving what was trained and nothing else, in a directory or on the Hugging Face Hub.

A saved prior is one safetensors file: the heads' tensors, and in its header the configuration.
Loading builds heads from a fixed table of names and runs no code that comes with the file. The
files beside it are for people: ``config.json`` repeats the configuration and ``README.md`` is a
model card.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncprior._version import __version__
from ncprior.bases.flow import Flow
from ncprior.bases.flow_matching import FlowMatching
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.rebase import Rebased, rebase
from ncprior.diagnostics.report import Report
from ncprior.heads.networks import CategoricalHead, ConvHead, MLPHead
from ncprior.heads.product import ProductHead
from ncprior.prior import NCPrior
from ncprior.saving.cards import model_card
from ncprior.saving.checks import (
    check_configuration,
    check_fingerprints,
    check_tensors,
    fingerprints,
    refuse,
)
from ncprior.saving.hub import locate, upload, write_files
from ncprior.saving.tensors import load_tensors, read_metadata
from ncprior.source import LatentSource, device_of

FILE = "ncprior.safetensors"

FORMAT = 1  # of the configuration; a file of another format is refused

HEADS: dict[str, type[MLPHead | ConvHead | CategoricalHead]] = {
    "MLPHead": MLPHead,
    "ConvHead": ConvHead,
    "CategoricalHead": CategoricalHead,
}

BASES: dict[str, type[GaussianMixture | Flow | FlowMatching]] = {
    "GaussianMixture": GaussianMixture,
    "Flow": Flow,
    "FlowMatching": FlowMatching,
}

PRODUCT = "ProductHead"  # of heads of several stages

CUSTOM = "custom"  # a head or base of the user's own: of a head only the tensors are saved


def save_pretrained(
    prior: NCPrior,
    directory: str | os.PathLike[str],
    *,
    report: Report | None = None,
    base_model: str | None = None,
    card_data: Mapping[str, Any] | None = None,
) -> None:
    """Saves what was trained, and nothing else: heads, a fitted base, strength, active groups.

    A base is saved if it is a ``GaussianMixture`` (which a VampPrior is too), a ``FlowMatching`` or
    the ``Flow`` that ``fit_flow`` makes itself. Any other, a flow of your own among them, has to be
    put on the source again before loading; of a distribution a fingerprint is kept, to refuse
    another.

    Writes ``ncprior.safetensors``, which is all that loading reads, its configuration as
    ``config.json``, and a model card as ``README.md``; earlier ones are replaced.

    Arguments:
        prior: The trained prior.
        directory: Where to; made if missing.
        report: What ``diagnose`` said of the prior, for the model card.
        base_model: The VAE's Hub repository, for the model card.
        card_data: Further metadata of the model card, such as ``{"license": "mit"}``.
    """
    directory = Path(directory)
    data = {"base_model": base_model, **(card_data or {})}
    _write(prior, directory, directory.resolve().name, report=report, card_data=data)


def push_to_hub(
    prior: NCPrior,
    repo_id: str,
    *,
    report: Report | None = None,
    base_model: str | None = None,
    card_data: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a noise contrastive prior",
) -> str:
    """Saves to the Hugging Face Hub what :func:`save_pretrained` writes, as one commit.

    Arguments:
        prior: The trained prior.
        repo_id: The repository, such as ``"user/my-prior"``; made if missing.
        report: What ``diagnose`` said of the prior, for the model card.
        base_model: The VAE's Hub repository, for the model card.
        card_data: Further metadata of the model card, such as ``{"license": "mit"}``.
        private: Whether a repository made now is private; ``None`` is the account's default.
        token: The access token; ``None`` is the one logged in with.
        revision: The branch to commit to; made if missing. ``None`` is the main one.
        commit_message: The first line of the commit.

    Returns:
        The URL of the commit.
    """
    data = {"base_model": base_model, **(card_data or {})}
    return upload(
        partial(_write, prior, report=report, card_data=data),
        repo_id,
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
    )


def from_pretrained(
    source: LatentSource[Any, Any],
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    heads: nn.Module | Iterable[nn.Module] | None = None,
    check_fingerprint: bool = True,
) -> NCPrior:
    """Puts saved heads, and the fitted base if there is one, on the VAE they were trained on.

    Arguments:
        source: The VAE, set up as it was in training; a saved base need not be put on it.
        path_or_repo: A directory of :func:`save_pretrained`, its safetensors file, or a Hub
            repository, of which that one file is downloaded.
        revision: Branch, tag or commit of the repository.
        heads: Your own heads, one per group, which take the saved tensors; needed if any of the
            saved ones was your own.
        check_fingerprint: Whether to refuse another VAE or another base prior.

    Returns:
        The prior, in evaluation mode, with its heads where the source's prior is.

    Raises:
        FileNotFoundError: If there is no such file, directory or repository.
        ImportError: If the saved base is a flow, and zuko is not installed.
        ValueError: If the file is damaged, or does not fit the source or the heads given; these
            are then as they were.

    Warns:
        UserWarning: If the file or the source has no fingerprint of the VAE to compare.
    """
    path = locate(path_or_repo, FILE, revision)
    tensors, config = load_tensors(path)
    _check_configuration(path, config)
    saved_base = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith("base.")}
    if config["base"] is not None and not isinstance(source, Rebased):
        base = _new_base(path, config["base"], saved_base)
        source = rebase(source, base.to(device_of(source)))
    _check_source(path, config, source, check_fingerprint=check_fingerprint)
    with torch.random.fork_rng(devices=[]):  # new heads draw weights only to be overwritten
        new = (
            [_new_head(path, k, e) for k, e in enumerate(config["heads"])]
            if heads is None
            else heads
        )
        prior = NCPrior(source, new)
    check_tensors(path, tensors, prior.state_dict(), "heads")
    prior.load_state_dict(tensors, assign=heads is None)
    prior.strength, prior.active = config["strength"], config["active"]
    return prior.to(device_of(source)).eval()


def inspect(
    path_or_repo: str | os.PathLike[str], *, revision: str | None = None
) -> dict[str, Any]:
    """Returns the configuration of a saved prior, running no code from it.

    Arguments:
        path_or_repo: A directory, a file, or a Hub repository.
        revision: Branch, tag or commit of the repository.

    Returns:
        The configuration as it stands in the file.

    Raises:
        FileNotFoundError: If there is no such file, directory or repository.
        ValueError: If the file is damaged or not of this package.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> save_pretrained(prior, directory)
        >>> inspect(directory)["heads"][0]["kind"]
        'MLPHead'
    """
    return read_metadata(locate(path_or_repo, FILE, revision))


def configuration(prior: NCPrior) -> dict[str, Any]:
    """Returns what a saved prior's header says: format, heads, strength, groups, fingerprints."""
    return {
        "format": FORMAT,
        "ncprior": __version__,
        "num_groups": len(prior.heads),
        "heads": [_head_entry(head) for head in prior.heads],
        "base": _base_entry(prior.source),
        "strength": float(prior.strength),
        "active": [bool(on) for on in prior.active],
        "fingerprint": fingerprints(prior.source),
    }


_SOUND: dict[str, Callable[[Any], bool]] = {  # what loading wants of each value
    "format": lambda value: value == FORMAT,
    "ncprior": lambda value: isinstance(value, str),
    "num_groups": lambda value: isinstance(value, int),
    "heads": lambda value: isinstance(value, list),
    "base": lambda value: value is None or isinstance(value, dict),
    "strength": lambda value: isinstance(value, int | float) and 0 <= value < math.inf,
    "active": lambda value: isinstance(value, list) and all(isinstance(on, bool) for on in value),
    "fingerprint": lambda value: (
        isinstance(value, dict)
        and value.keys() == {"vae", "base"}
        and all(isinstance(part, str | None) for part in value.values())
    ),
}


def _write(
    prior: NCPrior,
    directory: Path,
    name: str,
    *,
    report: Report | None,
    card_data: Mapping[str, Any],
) -> None:
    config = configuration(prior)
    tensors = dict(prior.state_dict())
    if (base := _own_base(prior.source)) is not None:
        tensors |= {f"base.{name}": tensor for name, tensor in base.tensors().items()}
    card = model_card(prior, name, config, report=report, card_data=card_data)
    write_files(directory, FILE, tensors, config, card)


def _head_entry(head: nn.Module) -> dict[str, Any]:
    if type(head) is ProductHead:
        return {"kind": PRODUCT, "config": {"heads": [_head_entry(part) for part in head.heads]}}
    for kind, cls in HEADS.items():
        if type(head) is cls:
            return {"kind": kind, "config": head.config()}
    return {"kind": CUSTOM, "config": {"class": type(head).__name__}}


def _own_base(source: LatentSource[Any, Any]) -> GaussianMixture | Flow | FlowMatching | None:
    """The base of a rebased source, where it is one of the table and can be made again."""
    base: Any = source.prior if isinstance(source, Rebased) else None
    return base if type(base) in BASES.values() and base.config() is not None else None


def _base_entry(source: LatentSource[Any, Any]) -> dict[str, Any] | None:
    base = _own_base(source)
    if base is not None:
        return {"kind": type(base).__name__, "config": base.config()}
    # A function of the group and its number: nothing of it can be saved, or told by a fingerprint.
    is_function = isinstance(source, Rebased) and source.prior is None
    return {"kind": CUSTOM, "config": {}} if is_function else None


def _check_configuration(path: Path, config: Mapping[str, Any]) -> None:
    check_configuration(path, config, _SOUND, FORMAT)
    k = config["num_groups"]
    if wrong := [key for key in ("heads", "active") if len(config[key]) != k]:
        refuse(path, f"its configuration makes no sense of: {', '.join(wrong)}")


def _check_source(
    path: Path,
    config: Mapping[str, Any],
    source: LatentSource[Any, Any],
    *,
    check_fingerprint: bool,
) -> None:
    if config["num_groups"] != source.num_groups:
        refuse(
            path,
            f"it has heads for {config['num_groups']} latent groups, and the source has "
            f"{source.num_groups}",
        )
    if not check_fingerprint:
        return
    check_fingerprints(path, config["fingerprint"], fingerprints(source))


def _new_head(path: Path, k: int, entry: Any) -> nn.Module:  # noqa: ANN401
    match entry:
        case {"kind": "ProductHead", "config": {"heads": [_, *_] as factors}}:
            return ProductHead(_new_factor(path, k, factor) for factor in factors)
        case _:
            return _new_factor(path, k, entry)


def _new_factor(path: Path, k: int, entry: Any) -> nn.Module:  # noqa: ANN401
    match entry:
        case {"kind": "custom", "config": {"class": name}}:
            refuse(path, f"head {k} is a {name} of its author's own; pass heads=")
        case {"kind": str(kind), "config": dict(arguments)} if kind in HEADS:
            try:
                return HEADS[kind](**arguments)
            except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                refuse(path, f"head {k} is not made as a {kind} is ({error})")
        case _:
            known = ", ".join((*HEADS, PRODUCT))
            refuse(path, f"head {k} is none of {known}, and nothing else is built: {entry}")


def _new_base(
    path: Path, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> GaussianMixture | Flow | FlowMatching:
    own = {name.removeprefix("base."): tensor for name, tensor in tensors.items()}
    match entry:
        case {"kind": "custom"}:
            refuse(
                path,
                "its heads were trained on a base of their author's own, a function of the group or "
                "the draws of another prior. Put it on the source: rebase(source, base), or "
                "nested(prior, sampler)",
            )
        case {"kind": str(kind), "config": dict(config)} if kind in BASES:
            try:
                with torch.random.fork_rng(devices=[]):  # networks draw weights to be overwritten
                    return BASES[kind].rebuild(own, config)
            except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
                refuse(path, f"its base is not made as a {kind} is ({error})")
        case _:
            refuse(path, f"its base is none of {', '.join(BASES)}, and nothing else is built")
