"""Temporaries on disk: marked while in use, so that those of dead processes can be removed."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is marked and nothing removed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Context that marks a file or folder as in use, until its end or the death of the process.

    The mark is a lock of the operating system, which no killed process leaves behind.

    Arguments:
        path: The file or folder, which exists.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_unused(folder: Path, prefix: str, suffix: str = "") -> None:
    """Removes temporaries that no living process has marked by :func:`in_use`.

    Arguments:
        folder: The folder of the temporaries.
        prefix: Start of their names.
        suffix: End of their names; between the two are eight characters.
    """
    pattern = f"{glob.escape(prefix)}{'?' * 8}{glob.escape(suffix)}"
    for path in folder.glob(pattern) if fcntl is not None else ():
        with suppress(OSError):  # in use, of another user, or removed by another process
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)
