"""Output that appears whole or not at all, however a long command ends."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


@contextmanager
def staged(folder: str | os.PathLike[str], *, last: str = "report.json") -> Iterator[Path]:
    """Yields a temporary folder; on success, its files move to ``folder``, each by one rename.

    The temporary folder lies inside ``folder`` and is removed when anything is raised,
    KeyboardInterrupt included; so is ``folder`` itself where it was made here. Earlier files of
    the same names are replaced, others stay.

    Arguments:
        folder: Where the files belong; made if missing.
        last: Name of the file that moves last, by which the others are known to be there.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        yield temporary
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == last):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it has files
                folder.rmdir()


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit, so that ``finally`` clauses run as they do for SIGINT.

    Does nothing outside the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
