"""A saved file and its checks: of configuration, fingerprints, tensors and kinds of modules."""

from __future__ import annotations

import hashlib
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from ncprior._version import __version__
from ncprior.bases.rebase import Rebased
from ncprior.saving.header import read_header
from ncprior.saving.tensors import open_file, read_tensors
from ncprior.source import LatentSource
from ncprior.utils.fingerprints import base_fingerprint
from ncprior.utils.states import differences, faults
from ncprior.utils.texts import printable

_ERRORS = (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

_TINY_LAYERS = 1200  # of a file, whatever their size

FORMAT = 1  # of the configuration; loading a file of another format raises an error

_AGAIN = "Save or download the file again"

_VERSION = re.compile(r"(\d{1,6}(?:\.\d{1,6}){1,3})[a-z0-9.+]{0,20}", re.ASCII)

_OPTIONAL = ("sampler",)  # keys that files of earlier versions lack

Validators: TypeAlias = Mapping[str, Callable[[Any], bool]]  # by key: is its value valid?


def fingerprints(source: LatentSource[Any, Any]) -> dict[str, str | None]:
    """Returns the fingerprints of the VAE and of a base outside the VAE, ``None`` if unknown."""
    bases = (source.bases or ()) if isinstance(source, Rebased) else ()
    found = [base_fingerprint(base) for base in bases or (source.shared_prior(),)]
    base = found[0]
    if len(found) > 1:
        known = [one for one in found if one is not None]
        digest = hashlib.sha256(" ".join(known).encode()).hexdigest()
        base = f"several:{digest}" if len(known) == len(found) else None
    return {"vae": source.fingerprint(), "base": base}


def is_fingerprint(value: Any, *parts: str) -> bool:  # noqa: ANN401
    """Returns whether a value is a dict from exactly these parts to texts or ``None``."""
    return (
        isinstance(value, dict)
        and value.keys() == set(parts)
        and all(isinstance(part, str | None) for part in value.values())
    )


def is_number(value: Any, low: float, high: float = math.inf) -> bool:  # noqa: ANN401
    """Returns whether a value is a finite number, and no bool, from ``low`` to ``high``."""
    return type(value) in (int, float) and low <= value <= min(high, sys.float_info.max)


def is_count(value: Any, low: int, high: int = 2**31 - 1) -> bool:  # noqa: ANN401
    """Returns whether a value is a whole number, and no bool, from ``low`` to ``high``."""
    return type(value) is int and low <= value <= high


def is_shape(value: Any) -> bool:  # noqa: ANN401
    """Returns whether a value is a list of sizes, as a shape without batch is stored."""
    return (
        isinstance(value, list)
        and len(value) <= _MOST_AXES
        and all(is_count(size, 1) for size in value)
        and math.prod(value) < 2**63
    )


_MOST_AXES = 16

# Of the constructors of all kinds; unknown names are left to the constructors.
_ARGUMENTS: Validators = {
    "event_shape": is_shape,
    "image_shape": is_shape,
    "context_shape": lambda value: value is None or is_shape(value),
    "width": lambda value: is_count(value, 1),
    "depth": lambda value: is_count(value, 0),
    "num_categories": lambda value: is_count(value, 1),
    "kernel_size": lambda value: is_count(value, 1, 99),
    "one_hot": lambda value: isinstance(value, bool),
    "dropout": lambda value: is_number(value, 0, 1),
    "num_steps": lambda value: is_count(value, 1, 10_000),
    "spline": lambda value: (
        isinstance(value, dict)
        and value.keys() == {"transforms", "width", "bins"}
        and all(is_count(size, 1) for size in value.values())
    ),
}


def newer_version(config: Mapping[str, Any]) -> str:
    """Returns the remedy for a file of a newer version of this package; empty for any other file."""
    theirs = config.get("ncprior")
    if isinstance(theirs, str) and _release(theirs) > _release(__version__):
        return (
            f"It was written by ncprior {theirs}, and this is {__version__}: install a newer "
            f"version of ncprior"
        )
    return ""


def _release(version: str) -> tuple[int, ...]:
    """Numbers of a version, without the name of a pre-release; none of any other text."""
    found = _VERSION.fullmatch(version)
    return tuple(map(int, found[1].split("."))) if found else ()


class SavedFile:
    """Configuration and tensors of a file, with checks whose errors name the file.

    Every check raises a ValueError; the message names the remedy. Networks are built without
    memory for their weights and take the tensors of the file, so that loading needs no more memory
    than these.

    Arguments:
        path: The file.
        tensors: Its tensors.
        config: Its configuration.
        validators: A check of the value of every key besides ``format`` and ``ncprior``.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        config: dict[str, Any],
        validators: Validators,
    ) -> None:
        self.path, self.tensors, self.config = path, dict(tensors), config
        size = sum(tensor.nbytes for tensor in tensors.values())
        # Each layer has one tensor or more, and takes some 35 kB besides its weights.
        self.layers_left = min(len(tensors), _TINY_LAYERS + size // 2**14)
        self._check_configuration(validators)

    @classmethod
    def read(cls, path: Path, validators: Validators) -> SavedFile:
        """Reads a file."""
        with open_file(path) as file:
            return cls(path, *read_tensors(path, file), validators)

    @classmethod
    def read_configuration(cls, path: Path, validators: Validators) -> dict[str, Any]:
        """Returns the configuration of a file, without its tensors."""
        with open_file(path) as file:
            return cls(path, {}, read_header(path, file).configuration, validators).config

    def check_values(self, valid: Mapping[str, bool]) -> None:
        """Validates values of the configuration, given by key whether each of them is valid."""
        if wrong := [key for key, is_valid in valid.items() if not is_valid]:
            self.fail(f"its configuration has no valid {', '.join(wrong)}")

    def check_fingerprints(self, given: Mapping[str, str | None]) -> None:
        """Validates that VAE and base are those of training; warns if the VAE is unknown."""
        stored = self.config["fingerprint"]
        for part, name in (("vae", "VAE"), ("base", "base prior")):
            are_known = part == "base" or None not in (stored[part], given[part])
            if are_known and stored[part] != given[part]:
                ours, theirs = (of[part] or "without a fingerprint" for of in (stored, given))
                self.fail(
                    f"it was trained on the {name} {ours}, and the source's is {theirs}",
                    "Pass the one it was trained on, without other wrappers around its modules, or "
                    "check_fingerprint=False",
                )
        if None in (stored["vae"], given["vae"]):
            whose = "The file" if stored["vae"] is None else "The source"
            warnings.warn(
                f"{whose} has no fingerprint of the VAE, so that {self.path} cannot be checked to "
                f"be trained on this one. Give the source module=vae, or a source of your own a "
                f"method fingerprint().",
                stacklevel=4,  # the caller of from_pretrained
            )

    def check_tensors(self, own: Mapping[str, Any], whose: str) -> None:
        """Validates that the tensors have the names, shapes and dtypes of those of a module.

        Arguments:
            own: The module's tensors by name.
            whose: Argument of ``from_pretrained`` that passes such modules, for the message.
        """
        self._fail_if(differences(own, self.tensors), whose)

    def fill(self, module: nn.Module, prefix: str, whose: str) -> nn.Module:
        """Gives the tensors with a prefix to a module that was built on the meta device.

        Arguments:
            module: The module; each of its tensors is replaced.
            prefix: Prefix of the names of the tensors, which are removed from the file.
            whose: As in :meth:`check_tensors`.
        """
        tensors = self.take(prefix)
        own = module.state_dict()
        self._fail_if(differences(own, tensors, prefix) or faults(tensors, prefix), whose)
        module.load_state_dict(tensors, assign=True)
        return module

    def check_all_taken(self, whose: str) -> None:
        """Validates that no tensors are left."""
        self._fail_if(differences({}, self.tensors), whose)

    def _fail_if(self, wrong: str, whose: str) -> None:
        if wrong:
            remedy = (
                f"Pass {whose}= with the saved names, shapes and dtypes, or save the file again"
            )
            newer = newer_version(self.config)
            self.fail(
                f"its tensors do not fit the {whose} ({wrong})",
                f"{remedy}. {newer}" if newer else remedy,
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
                self._check_arguments(f"{whose} cannot be built as a {kind}", arguments)
                try:
                    return table[kind](**arguments)
                except _ERRORS as error:
                    too_large = isinstance(error, RuntimeError)  # torch's word on the meta device
                    reason = "its sizes are too large" if too_large else error
                    self.fail(f"{whose} cannot be built as a {kind} ({reason})")
        self.fail(f"{whose} must be one of {', '.join(table)}; got {entry}")

    def build_network(
        self,
        whose: str,
        entry: Any,  # noqa: ANN401
        table: Mapping[str, type[nn.Module]],
        remedy: str,
    ) -> nn.Module:
        """Builds a network by :meth:`build` on the meta device, for :meth:`fill`."""
        with torch.device("meta"):
            network: nn.Module = self.build(whose, entry, table, remedy)
        return network

    def _check_arguments(self, what: str, arguments: Mapping[str, Any]) -> None:
        """Validates the arguments of a constructor, and that the file is large enough for its layers."""
        known = arguments.keys() & _ARGUMENTS.keys()
        wrong = sorted(name for name in known if not _ARGUMENTS[name](arguments[name]))
        if wrong:
            self.fail(f"{what} (no valid {', '.join(wrong)})")
        self.layers_left -= 1 + arguments.get("depth", 0)
        self.layers_left -= arguments.get("spline", {}).get("transforms", 0)
        if self.layers_left < 0:
            self.fail(f"{what} (the file has too few tensors for so many layers)")

    def take(self, prefix: str) -> dict[str, Tensor]:
        """Removes the tensors whose names have a prefix; returns them, named without it."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensors.pop(name) for name in names}

    def fail(self, reason: str, remedy: str | None = None) -> NoReturn:
        """Raises the error of a file that cannot be loaded.

        Arguments:
            reason: The reason.
            remedy: The remedy; ``None`` is another file, or for a file of a newer version of this
                package, that version.
        """
        reason = printable(f"Cannot load {self.path}: {' '.join(reason.split())}")
        raise ValueError(f"{reason}. {remedy or newer_version(self.config) or _AGAIN}.")

    def _check_configuration(self, validators: Validators) -> None:
        if (form := self.config.get("format")) != FORMAT:
            self.fail(
                f"it has format {form!r}, and ncprior {__version__} reads format {FORMAT}",
                newer_version(self.config) or "Install the version of ncprior that wrote it",
            )
        validators = {"ncprior": lambda value: isinstance(value, str), **validators}
        if unknown := sorted(self.config.keys() - validators.keys() - {"format"}):
            self.fail(f"its configuration has unknown keys: {', '.join(unknown)}")
        given = self.config
        needed = [key for key in validators if key in given or key not in _OPTIONAL]
        self.check_values({key: key in given and validators[key](given[key]) for key in needed})
