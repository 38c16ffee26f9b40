"""Checks of a saved file: configuration, fingerprints and tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from ncprior._version import __version__
from ncprior.source import LatentSource
from ncprior.utils.fingerprints import base_fingerprint


def fingerprints(source: LatentSource[Any, Any]) -> dict[str, str | None]:
    """Returns those of the VAE, where the source has one, and of a base that is not in the VAE."""
    return {
        "vae": source.fingerprint(),
        "base": base_fingerprint(source.shared_prior()),
    }


def check_configuration(
    path: Path, config: Mapping[str, Any], sound: Mapping[str, Callable[[Any], bool]], form: int
) -> None:
    """Refuses the configuration of another format, with other keys, or with unsound values.

    Arguments:
        path: The file, for the message.
        config: What its header says.
        sound: What is wanted of the value of every key.
        form: The format that this version reads.

    Raises:
        ValueError: If it is refused.
    """
    if config.get("format") != form:
        refuse(
            path,
            f"it has format {config.get('format')!r}, and ncprior {__version__} reads format "
            f"{form}. Install the version of ncprior that wrote it",
        )
    if unknown := sorted(config.keys() - sound.keys()):
        refuse(path, f"its configuration has unknown keys: {', '.join(unknown)}")
    wrong = [key for key, fits in sound.items() if key not in config or not fits(config[key])]
    if wrong:
        refuse(path, f"its configuration makes no sense of: {', '.join(wrong)}")


def check_fingerprints(
    path: Path,
    stored: Mapping[str, str | None],
    given: Mapping[str, str | None],
) -> None:
    """Refuses what was trained on another VAE or base; warns where that cannot be told.

    Raises:
        ValueError: If one of the two differs.

    Warns:
        UserWarning: If there is no fingerprint of the VAE to compare.
    """
    for part, name in (("vae", "VAE"), ("base", "base prior")):
        if None not in (stored[part], given[part]) and stored[part] != given[part]:
            refuse(
                path,
                f"it was trained on the {name} {stored[part]}, and the source's is {given[part]}. Pass the one it was trained on, or check_fingerprint=False",
            )
    if None in (stored["vae"], given["vae"]):
        whose = "The file" if stored["vae"] is None else "The source"
        warnings.warn(
            f"{whose} has no fingerprint of the VAE, so that nothing tells whether {path} was "
            f"trained on this one. Give SingleGroup module=vae, or a source of your own a method "
            f"fingerprint().",
            stacklevel=5,
        )


def check_tensors(
    path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor], whose: str
) -> None:
    """Refuses tensors that are not, by name and shape, those of what is to take them.

    Raises:
        ValueError: If any is missing, unexpected or of another shape.
    """
    differences = {
        "missing": sorted(own.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(saved[name].shape)} for {tuple(own[name].shape)}"
            for name in sorted(own.keys() & saved.keys())
            if saved[name].shape != own[name].shape
        ],
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names]
    if found:
        refuse(path, f"its tensors are not those of the {whose} ({'; '.join(found)})")


def refuse(path: Path, reason: str) -> NoReturn:
    """Raises the error of a file that cannot be loaded.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"Cannot load {path}: {reason}.")
