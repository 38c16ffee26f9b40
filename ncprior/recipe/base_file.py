"""The chosen base in a checkpoint of `improve`, so that a later run goes on with the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ncprior._version import __version__
from ncprior.bases.rebase import rebase
from ncprior.data.digest import data_digest
from ncprior.recipe.base import choose_base
from ncprior.recipe.choices import Candidate, Choice
from ncprior.recipe.files import base_file
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.saving.checks import FORMAT, SavedFile, Validators
from ncprior.saving.identity import SIGMA, source_facts
from ncprior.saving.kinds import base_entry, base_tensors, build_base
from ncprior.saving.tensors import save_tensors
from ncprior.source import LatentSource, device_of

_BATCH = 256  # rows


def saved_base(
    folder: Path | None,
    source: LatentSource[Any, Any],
    parts: Parts,
    record: Record,
    **options: Any,  # noqa: ANN401
) -> LatentSource[Any, Any]:
    """Returns the source on the base in a folder, or on that of `choose_base`, which is saved there.

    Heads fit the base that they were trained on. On another device, or in less time, the same fit may
    end in another base.

    Arguments:
        folder: The folder of the checkpoint, or ``None``.
        source: The VAE.
        parts: The data.
        record: The record of the recipe, to which the choice is added.
        options: Options of `choose_base`; the file's name begins with its ``name``.

    Raises:
        ValueError: If the file is damaged, or of another VAE or of other data.
    """
    if folder is None:
        chosen: LatentSource[Any, Any] = choose_base(source, parts, record, **options)
        return chosen
    of_source = source_facts(source)
    of_source["facts"].pop(SIGMA, None)  # it plays no part in encodings
    digests = [data_digest(part, _BATCH) for part in (parts.train, parts.choose)]
    belongs = {**of_source, "data": digests}
    file = base_file(folder, options.get("name", ""))
    if file.is_file():
        return _read(file, belongs, source, record)
    chosen = choose_base(source, parts, record, **options)
    is_new = chosen is not source
    config = {
        "format": FORMAT,
        "ncprior": __version__,
        "num_groups": source.num_groups,
        "base": base_entry(chosen) if is_new else None,
        "belongs": belongs,
        "choice": _plain(record.choices[-1]),
    }
    save_tensors(file, base_tensors(chosen) if is_new else {}, config)
    return chosen


def _read(
    file: Path, belongs: dict[str, Any], source: LatentSource[Any, Any], record: Record
) -> LatentSource[Any, Any]:
    saved = SavedFile.read(file, _VALIDATORS)
    for name, now in belongs.items():
        if saved.config["belongs"].get(name) != now:
            saved.fail(
                f"it belongs to {name}={saved.config['belongs'].get(name)}; got {name}={now}",
                "Pass the same VAE and data, or another folder",
            )
    found = source
    if saved.config["base"] is not None:
        found = rebase(source, build_base(saved, saved.take("")).to(device_of(source)))
    record.add(_choice(saved.config["choice"]))
    return found


def _plain(choice: Choice) -> dict[str, Any]:
    """A choice as JSON stores it, with numbers as texts, since JSON has no form for NaN."""
    candidates = [[it.name, *map(repr, it[1:])] for it in choice.candidates]
    return {**choice._asdict(), "candidates": candidates, "seconds": repr(choice.seconds)}


def _choice(saved: dict[str, Any]) -> Choice:
    candidates = tuple(Candidate(name, *map(float, rest)) for name, *rest in saved["candidates"])
    return Choice(**{**saved, "candidates": candidates, "seconds": float(saved["seconds"])})


def _is_choice(saved: Any) -> bool:  # noqa: ANN401
    try:
        choice = _choice(saved)
    except (TypeError, ValueError, KeyError):
        return False
    texts = (choice.part, choice.chosen, choice.reason, choice.criterion, choice.unit)
    names = (it.name for it in choice.candidates)
    is_text = all(isinstance(text, str) for text in (*texts, *names))
    return is_text and isinstance(choice.higher_is_better, bool)


_VALIDATORS: Validators = {
    "num_groups": lambda value: value == 1 or (type(value) is int and value > 1),
    "base": lambda value: value is None or isinstance(value, dict),
    "belongs": lambda value: isinstance(value, dict),
    "choice": lambda value: isinstance(value, dict) and _is_choice(value),
}
