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

Validators: TypeAlias = Mapping[str, Callable[[Any], bool]]  # by key: is its value valid?


def fingerprints(source: LatentSource[Any, Any]) -> dict[str, str | None]:
    """Returns the fingerprints of the VAE and of a base outside the VAE, ``None`` if unknown."""
    return {
        "vae": source.fingerprint(),
        "base": base_fingerprint(source.shared_prior()),
    }


def is_fingerprint(value: Any, *parts: str) -> bool:  # noqa: ANN401
    """Returns whether a value is a dict from exactly these parts to texts or ``None``."""
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

    def check_values(self, valid: Mapping[str, bool]) -> None:
        """Validates values of the configuration, given by key whether each of them is valid."""
        if wrong := [key for key, is_valid in valid.items() if not is_valid]:
            self.fail(f"its configuration has no valid {', '.join(wrong)}")

    def check_fingerprints(self, given: Mapping[str, str | None]) -> None:
        """Validates that VAE and base are those of training; warns if the VAE is unknown."""
        stored = self.config["fingerprint"]
        for part, name in (("vae", "VAE"), ("base", "base prior")):
            if None not in (stored[part], given[part]) and stored[part] != given[part]:
                self.fail(
                    f"it was trained on the {name} {stored[part]}, and the source's is "
                    f"{given[part]}",
                    "Pass the one it was trained on, or check_fingerprint=False",
                )
        if None in (stored["vae"], given["vae"]):
            whose = "The file" if stored["vae"] is None else "The source"
            warnings.warn(
                f"{whose} has no fingerprint of the VAE, so that {self.path} cannot be checked to "
                f"be trained on this one. Give SingleGroup module=vae, or a source of your own a "
                f"method fingerprint().",
                stacklevel=4,  # the caller of from_pretrained
            )

    def check_tensors(self, own: Mapping[str, Tensor], whose: str) -> None:
        """Validates that the tensors have the names and shapes of the tensors of a module.

        Arguments:
            own: The module's tensors by name.
            whose: Argument of ``from_pretrained`` that passes such modules, for the message.
        """
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
            self.fail(
                f"its tensors do not fit the {whose} ({'; '.join(found)})",
                f"Pass {whose}= with the saved names and shapes, or save the file again",
            )

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
            table: By kind, the function that builds it from the arguments.
            remedy: Remedy for a part that is of no kind of the table, for the message.

        Returns:
            The module or base.
        """
        match entry:
            case {"kind": "custom", "config": dict(config)}:
                name = config.get("class", "function")
                self.fail(f"{whose} is a {name}, which ncprior cannot build", remedy)
            case {"kind": str(kind), "config": dict(arguments)} if kind in table:
                try:
                    return table[kind](**arguments)
                except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
                    self.fail(f"{whose} cannot be built as a {kind} ({error})")
        self.fail(f"{whose} must be one of {', '.join(table)}; got {entry}")

    def take(self, prefix: str) -> dict[str, Tensor]:
        """Removes the tensors whose names have a prefix; returns them, named without it."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensors.pop(name) for name in names}

    def fail(self, reason: str, remedy: str = "Save or download the file again") -> NoReturn:
        """Raises the error of a file that cannot be loaded, with its reason and a remedy."""
        raise ValueError(f"Cannot load {self.path}: {reason}. {remedy}.")

    def _check_configuration(self, validators: Validators) -> None:
        if (form := self.config.get("format")) != FORMAT:
            self.fail(
                f"it has format {form!r}, and ncprior {__version__} reads format {FORMAT}",
                "Install the version of ncprior that wrote it",
            )
        validators = {"ncprior": lambda value: isinstance(value, str), **validators}
        if unknown := sorted(self.config.keys() - validators.keys() - {"format"}):
            self.fail(f"its configuration has unknown keys: {', '.join(unknown)}")
        given = self.config
        self.check_values({k: k in given and valid(given[k]) for k, valid in validators.items()})
