"""Temporary files: marked while in use, so that those of dead processes can be removed."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is marked and nothing removed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def new_in_use(names: Iterator[Path]) -> Iterator[Path]:
    """Context with a new file that is marked as in use, until its end or the death of the process.

    The mark is a lock of the operating system, which no killed process leaves behind. Between a file's
    creation and its lock, another process may take it for a leftover; then the next name is tried.

    Arguments:
        names: Names of files that do not exist, as many as are needed.
    """
    for path in names:
        if fcntl is None:  # an open file could not be renamed
            path.touch(exist_ok=False)
            yield path
            return
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            if _is_marked(descriptor):
                yield path
                return
        finally:
            os.close(descriptor)


def _is_marked(descriptor: int) -> bool:
    """Locks a new file; returns whether it is still there and no other process has its lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return os.fstat(descriptor).st_nlink > 0


def remove_unused(folder: Path, prefix: str, suffix: str = "") -> None:
    """Removes temporary files that no living process has marked by :func:`new_in_use`.

    Arguments:
        folder: The folder of the files.
        prefix: Start of their names.
        suffix: End of their names; between the two are eight characters.
    """
    pattern = f"{glob.escape(prefix)}{'?' * 8}{glob.escape(suffix)}"
    for path in folder.glob(pattern) if fcntl is not None else ():
        with suppress(OSError):  # in use, of another user, or removed by another process
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
