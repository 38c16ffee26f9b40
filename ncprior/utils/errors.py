"""Errors that name the group of latents that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming_group(k: int) -> Iterator[None]:
    """A context manager that puts the group in front of the message of an error."""
    try:
        yield
    except (FloatingPointError, TypeError, ValueError) as error:
        kinds = (FloatingPointError, TypeError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"Group {k}: {error}") from error
