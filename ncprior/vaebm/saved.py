"""Saving an energy and nothing else, in a directory or on the Hugging Face Hub.

One safetensors file, as of heads: the energy's tensors, and in its header what it is and what it was
trained on: the VAE, the base, the ratio heads, the decoder's noise, and the chains. Loading builds
the net from a fixed table of names and runs no code that comes with the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ncprior._version import __version__
from ncprior.heads.networks import MLPHead
from ncprior.prior import NCPrior
from ncprior.saving.checks import (
    check_configuration,
    check_fingerprints,
    check_tensors,
    fingerprints,
    refuse,
)
from ncprior.saving.hub import locate, upload, write_files
from ncprior.saving.tensors import load_tensors
from ncprior.source import LatentSource, device_of
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.vaebm.card import energy_card
from ncprior.vaebm.energy_net import EnergyNet
from ncprior.vaebm.gaussian_decoder import gaussian_decoder_of
from ncprior.vaebm.model import VAEBM, LangevinTarget

FILE = "vaebm.safetensors"

FORMAT = 1  # of the configuration; a file of another format is refused

ENERGIES: dict[str, type[EnergyNet | MLPHead]] = {"EnergyNet": EnergyNet, "MLPHead": MLPHead}

CUSTOM = "custom"  # a net of the user's own: only its tensors are saved

_SETTINGS = ("num_steps", "step_size", "langevin_target", "data_noise")  # of the model


def save_pretrained(
    model: VAEBM,
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    card_data: Mapping[str, Any] | None = None,
) -> None:
    """Saves the energy and its chains' settings; neither the VAE nor the ratio heads.

    Arguments:
        model: The trained model.
        directory: Where to; made if missing.
        base_model: The VAE's Hub repository, for the model card.
        card_data: Further metadata of the model card, such as ``{"license": "mit"}``.

    Raises:
        TypeError: If the energy is no ``nn.Module``.
    """
    directory = Path(directory)
    data = {"base_model": base_model, **(card_data or {})}
    _write(model, directory, directory.resolve().name, card_data=data)


def push_to_hub(
    model: VAEBM,
    repo_id: str,
    *,
    base_model: str | None = None,
    card_data: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload an energy of VAEBM",
) -> str:
    """Saves to the Hugging Face Hub what :func:`save_pretrained` writes, as one commit.

    Arguments:
        model: The trained model.
        repo_id: The repository, such as ``"user/my-energy"``; made if missing.
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
        partial(_write, model, card_data=data),
        repo_id,
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
    )


def from_pretrained(
    prior: NCPrior | LatentSource[Any, Any],
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    energy: nn.Module | None = None,
    check_fingerprint: bool = True,
) -> VAEBM:
    """Puts a saved energy on the VAE, or the NCP prior, that it was trained on.

    Arguments:
        prior: The VAE or the NCP prior, set up as it was in training.
        path_or_repo: A directory of :func:`save_pretrained`, its safetensors file, or a Hub
            repository, of which that one file is downloaded.
        revision: Branch, tag or commit of the repository.
        energy: Your own net, which takes the saved tensors, if the saved one was your own.
        check_fingerprint: Whether to refuse another VAE, base, decoder noise or other heads.

    Returns:
        The model, in evaluation mode, with its energy where the source's prior is.

    Raises:
        FileNotFoundError: If there is no such file, directory or repository.
        ValueError: If the file is damaged, or does not fit the source or the net given.

    Warns:
        UserWarning: If the file or the source has no fingerprint of the VAE to compare.
    """
    path = locate(path_or_repo, FILE, revision)
    tensors, config = load_tensors(path)
    check_configuration(path, config, _SOUND, FORMAT)
    if check_fingerprint:
        _check_trained_on(path, config, prior)
    with torch.random.fork_rng(devices=[]):  # a new net draws weights only to be overwritten
        new = _new_energy(path, config["energy"]) if energy is None else energy
    check_tensors(path, tensors, new.state_dict(), "energy")
    model = VAEBM(prior, new, **{name: config[name] for name in _SETTINGS})
    new.load_state_dict(tensors, assign=energy is None)
    return model.to(device_of(model.source)).eval()


def configuration(model: VAEBM) -> dict[str, Any]:
    """Returns what a saved energy's header says."""
    return {
        "format": FORMAT,
        "ncprior": __version__,
        "energy": _energy_entry(model.energy),
        **{name: getattr(model, name) for name in _SETTINGS},
        **trained_on(model),
    }


def trained_on(model: VAEBM) -> dict[str, Any]:
    """Returns what an energy is trained on: the decoder's noise, the VAE, its base, the heads."""
    return {
        "sigma": _sigma(model.source),
        "fingerprint": {**fingerprints(model.source), "heads": _heads(model.prior)},
    }


_SOUND: dict[str, Callable[[Any], bool]] = {  # what loading wants of each value
    "format": lambda value: value == FORMAT,
    "ncprior": lambda value: isinstance(value, str),
    "energy": lambda value: isinstance(value, dict),
    "num_steps": lambda value: type(value) is int and value >= 0,
    "step_size": lambda value: isinstance(value, int | float) and 0 < value < math.inf,
    "langevin_target": lambda value: value in get_args(LangevinTarget),
    "data_noise": lambda value: isinstance(value, int | float) and 0 <= value < math.inf,
    "sigma": lambda value: value is None or (isinstance(value, float) and value > 0),
    "fingerprint": lambda value: (
        isinstance(value, dict)
        and value.keys() == {"vae", "base", "heads"}
        and all(isinstance(part, str | None) for part in value.values())
    ),
}


def _write(model: VAEBM, directory: Path, name: str, *, card_data: Mapping[str, Any]) -> None:
    if not isinstance(model.energy, nn.Module):
        raise TypeError(
            f"What is saved is a network; this energy is a {type(model.energy).__name__}. Make it "
            f"an nn.Module."
        )
    config = configuration(model)
    card = energy_card(model, name, config, card_data=card_data)
    write_files(directory, FILE, model.energy.state_dict(), config, card)


def _energy_entry(energy: Any) -> dict[str, Any]:  # noqa: ANN401
    for kind, cls in ENERGIES.items():
        if type(energy) is cls:
            return {"kind": kind, "config": energy.config()}
    return {"kind": CUSTOM, "config": {"class": type(energy).__name__}}


def _sigma(source: LatentSource[Any, Any]) -> float | None:
    """σ of a decoder that was given one by ``GaussianDecoder``."""
    noisy = gaussian_decoder_of(source)
    return None if noisy is None else noisy.sigma


def _same_sigma(one: float | None, other: float | None) -> bool:
    """Fitted with other numbers of threads, σ differs by its rounding."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-6)


def _heads(prior: NCPrior | None) -> str | None:
    """What tells one NCP prior from another: its heads, their strength, and which are on."""
    if prior is None:
        return None
    on = "".join(str(int(active)) for active in prior.active)
    return f"{module_fingerprint(prior.heads)}:{float(prior.strength)!r}:{on}"


def _check_trained_on(
    path: Path, config: Mapping[str, Any], prior: NCPrior | LatentSource[Any, Any]
) -> None:
    heads, source = (prior, prior.source) if isinstance(prior, NCPrior) else (None, prior)
    stored, given = config["fingerprint"]["heads"], _heads(heads)
    if stored != given:
        trained, now = ("the VAE alone" if on is None else f"heads {on}" for on in (stored, given))
        refuse(
            path,
            f"it was trained over {trained}, and now there is {now}. Pass the NCP prior, or the "
            f"source, that it was trained on, or check_fingerprint=False",
        )
    if not _same_sigma(config["sigma"], _sigma(source)):
        refuse(
            path,
            f"it was trained with decoder noise {config['sigma'] or 'of the likelihood'}, and the "
            f"source has {_sigma(source) or 'that of its likelihood'}. Wrap it in "
            f"GaussianDecoder(source, sigma), or leave that out",
        )
    check_fingerprints(path, config["fingerprint"], fingerprints(source))


def _new_energy(path: Path, entry: Any) -> nn.Module:  # noqa: ANN401
    match entry:
        case {"kind": "custom", "config": {"class": name}}:
            refuse(path, f"its energy is a {name} of its author's own; pass energy=")
        case {"kind": str(kind), "config": dict(arguments)} if kind in ENERGIES:
            try:
                return ENERGIES[kind](**arguments)
            except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                refuse(path, f"its energy is not made as a {kind} is ({error})")
        case _:
            known = ", ".join(ENERGIES)
            refuse(path, f"its energy is none of {known}, and nothing else is built: {entry}")
