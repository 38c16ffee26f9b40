"""The model card of a folder or repository, which replaces no README of another project."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

CARD = "README.md"

_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)

_OURS = re.compile(r"""^library_name:[ \t]*(["']?)ncprior\1[ \t]*\r?$""", re.MULTILINE)


def is_ours(content: bytes) -> bool:
    """Returns whether a README has the metadata of a model card of this package."""
    front = _FRONT_MATTER.match(content.decode(errors="replace"))
    return front is not None and _OURS.search(front[1]) is not None


def keep_others(
    files: dict[str, bytes],
    present: bytes | None,
    where: object,
    asked: Sequence[str],
    stacklevel: int,
) -> dict[str, bytes]:
    """Returns files to save by name, without the model card if a README of others is there.

    Arguments:
        files: The files.
        present: Content of the README that is there, ``None`` without one.
        where: The folder or repository, for the warning.
        asked: Arguments that were given for the card; a card that is left out drops them.
        stacklevel: That of the warning; 2 is the caller of this function.
    """
    if present is None or is_ours(present):
        return files
    if asked:
        warnings.warn(
            f"{CARD} in {where} is no model card of ncprior and stays as it is: no card was written "
            f"with the given {', '.join(asked)}. Leave it out, or save elsewhere.",
            stacklevel=stacklevel + 1,
        )
    return {name: content for name, content in files.items() if name != CARD}
