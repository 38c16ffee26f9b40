"""A saved file and its checks: of configuration, fingerprints, tensors and kinds of modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from torch import Tensor

from ncprior._version import __version__
from ncprior.saving.tensors import load_tensors
from ncprior.source import LatentSource
from ncprior.utils.fingerprints import base_fingerprint

FORMAT = 1  # of the configuration; loading a file of another format raises an error

Validators: TypeAlias = Mapping[str, Callable[[Any], bool]]


def fingerprints(source: LatentSource[Any, Any]) -> dict[str, str | None]:
    """Returns the fingerprints of the VAE and of a base outside the VAE, ``None`` if unknown."""
    return {
        "vae": source.fingerprint(),
        "base": base_fingerprint(source.shared_prior()),
    }


def is_fingerprint(value: Any, *parts: str) -> bool:  # noqa: ANN401
    """Returns whether a value holds a text or None for each of the parts, and nothing else."""
    return (
        isinstance(value, dict)
        and value.keys() == set(parts)
        and all(isinstance(part, str | None) for part in value.values())
    )


class SavedFile:
    """Configuration and tensors of a file, with checks whose errors name the file.

    Every check raises a ValueError; the message names the remedy.

    Arguments:
        path: The file.
        validators: A check of the value of every key besides ``format`` and ``ncprior``.
    """

    def __init__(self, path: Path, validators: Validators) -> None:
        self.path = path
        self.tensors, self.config = load_tensors(path)
        self._check_configuration(validators)

    def _check_configuration(self, validators: Validators) -> None:
        if (form := self.config.get("format")) != FORMAT:
            self.refuse(
                f"it has format {form!r}, and ncprior {__version__} reads format {FORMAT}. "
                f"Install the version of ncprior that wrote it"
            )
        validators = {"ncprior": lambda value: isinstance(value, str), **validators}
        if unknown := sorted(self.config.keys() - validators.keys() - {"format"}):
            self.refuse(f"its configuration has unknown keys: {', '.join(unknown)}")
        given = self.config
        self.check_values({k: k in given and valid(given[k]) for k, valid in validators.items()})

    def check_fingerprints(self, given: Mapping[str, str | None]) -> None:
        """Validates that VAE and base are those of training; warns if the VAE is unknown."""
        stored = self.config["fingerprint"]
        for part, name in (("vae", "VAE"), ("base", "base prior")):
            if None not in (stored[part], given[part]) and stored[part] != given[part]:
                self.refuse(
                    f"it was trained on the {name} {stored[part]}, and the source's is "
                    f"{given[part]}. Pass the one it was trained on, or check_fingerprint=False"
                )
        if None in (stored["vae"], given["vae"]):
            whose = "The file" if stored["vae"] is None else "The source"
            warnings.warn(
                f"{whose} has no fingerprint of the VAE, so that nothing tells whether "
                f"{self.path} was trained on this one. Give SingleGroup module=vae, or a source "
                f"of your own a method fingerprint().",
                stacklevel=4,  # the caller of from_pretrained
            )

    def check_tensors(self, own: Mapping[str, Tensor], whose: str) -> None:
        """Validates that the tensors have the names and shapes of a module's own."""
        saved = self.tensors
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
            self.refuse(f"its tensors are not those of the {whose} ({'; '.join(found)})")

    def build(
        self,
        whose: str,
        entry: Any,  # noqa: ANN401
        table: Mapping[str, Callable[..., Any]],
        remedy: str,
    ) -> Any:  # noqa: ANN401
        """Builds a module or a base from its entry, if its kind is in a table.

        Arguments:
            whose: Name of the part, for the message.
            entry: The entry in the configuration: ``{"kind": name, "config": arguments}``.
            table: What makes each kind from the arguments.
            remedy: What to do about a part of the user's own, for the message.
        """
        match entry:
            case {"kind": "custom", "config": dict(config)}:
                name = config.get("class", "function")
                self.refuse(f"{whose} is a {name} of its author's own; {remedy}")
            case {"kind": str(kind), "config": dict(arguments)} if kind in table:
                try:
                    return table[kind](**arguments)
                except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
                    self.refuse(f"{whose} is not made as a {kind} is ({error})")
        self.refuse(f"{whose} is none of {', '.join(table)}, and nothing else is built: {entry}")

    def check_values(self, valid: Mapping[str, bool]) -> None:
        """Validates the values of the configuration, given whether each of them is valid."""
        if wrong := [key for key, is_valid in valid.items() if not is_valid]:
            self.refuse(f"its configuration makes no sense of: {', '.join(wrong)}")

    def refuse(self, reason: str) -> NoReturn:
        """Raises the error of a file that cannot be loaded."""
        raise ValueError(f"Cannot load {self.path}: {reason}.")
