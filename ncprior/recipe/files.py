"""Files of a checkpoint of `improve`: their names, and which files are its own."""

from __future__ import annotations

from pathlib import Path

OWN_FILES = r"seed\.txt|(?:refit-)?base\.safetensors|(?:refit-)?heads-\d+|joint-[0-9a-f]{16}"
"""A regular expression of their names."""


def arguments_file(folder: Path) -> Path:
    """The file of the arguments that the checkpoint belongs to."""
    return folder / "seed.txt"


def base_file(folder: Path, name: str) -> Path:
    """The file of the base of a choice with such a name in front, such as ``"refit "``."""
    return folder / f"{_slug(name)}base.safetensors"


def heads_file(folder: Path | None, name: str, number: int) -> Path | None:
    """The file of the training of the heads with that number."""
    return folder and folder / f"{_slug(name)}heads-{number}"


def joint_file(folder: Path | None, digest: str) -> Path | None:
    """The file of the training of a joint head, by a digest of the walks that it is trained on."""
    return folder and folder / f"joint-{digest[:16]}"


def _slug(name: str) -> str:
    return name.replace(" ", "-")
