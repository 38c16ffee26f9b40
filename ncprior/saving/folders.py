"""Folders of whole files: on this machine or, by a URL, in an object store that fsspec can reach."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from ncprior.saving.tensors import naming_the_file, open_file, write_atomically

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


class LocalFolder:
    """A folder of this machine, whose files are written under a temporary name and renamed.

    It is scanned once for the temporary files of killed processes, and not for every file: a folder
    of a large job has thousands.

    Arguments:
        path: The folder; it is made when the first file is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def at(self, name: str) -> Any:  # noqa: ANN401
        """Returns the place of a file, as its user can open it."""
        return self.path / name

    def has(self, name: str) -> bool:
        """Returns whether there is such a file, whole or not."""
        return (self.path / name).exists()

    def open(self, name: str) -> BinaryIO:
        """Opens a file to read it.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        return open_file(self.path / name)

    def version(self, name: str) -> tuple[int, ...] | None:
        """Returns numbers that change with a file, or ``None`` if there is no such file."""
        try:
            found = (self.path / name).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, so that readers find the old one or the new one, never a part of one."""
        with write_atomically(self.path / name, tidy=name in self._unfinished) as temporary:
            temporary.write_bytes(data)

    def create(self, name: str, data: bytes) -> None:
        """Writes a file unless there is one; of several processes at once, one writes it."""
        path = self.path / name
        temporary = path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
        with naming_the_file(path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                try:
                    with temporary.open("xb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    _publish(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
        self.tidy(name)

    def tidy(self, name: str) -> None:
        """Removes the temporary files of a written file, left by processes that were killed."""
        for unfinished in self._unfinished.pop(name, ()):
            unfinished.unlink(missing_ok=True)

    @cached_property
    def _unfinished(self) -> dict[str, list[Path]]:
        """The temporary files of each file, as they were when they were first asked for."""
        found: dict[str, list[Path]] = {}
        for name in os.listdir(self.path) if self.path.is_dir() else ():
            if match := _TEMPORARY.fullmatch(name):
                found.setdefault(match[1], []).append(self.path / name)
        return found


class WorkFolder:
    """A folder of unfinished work on this machine, which is removed when the work is done.

    Arguments:
        path: The folder, or its place if there is none yet.
        names: Regular expression of the names of its files. Other files are someone else's.
    """

    def __init__(self, path: Path, names: str) -> None:
        self.path = path
        self._names = re.compile(rf"(?:{names})|\.(?:{names})\.[0-9a-f]{{8}}\.tmp")

    def require_own(self) -> None:
        """Validates that the folder holds nothing but the work, and hidden files.

        Raises:
            FileExistsError: If it holds anything else. The message names it.
        """
        others = [name for name, is_own in self._files() if not is_own and name[0] != "."]
        if others:
            raise FileExistsError(
                f"{self.path} is for unfinished work, which is deleted in the end, and it holds "
                f"{', '.join(others)}. Move that elsewhere, or pass another folder."
            )

    def remove(self) -> None:
        """Removes the files of the work, and the folder if nothing else is in it."""
        with suppress(OSError):  # the work is done
            for name, is_own in self._files():
                if is_own:
                    (self.path / name).unlink()
            self.path.rmdir()

    def _files(self) -> list[tuple[str, bool]]:
        """The names in the folder, each with whether it is a file of the work."""
        if not self.path.is_dir():
            return []
        found = sorted(os.scandir(self.path), key=lambda entry: entry.name)
        return [(it.name, it.is_file() and bool(self._names.fullmatch(it.name))) for it in found]


class RemoteFolder:
    """A folder of an object store, which shows a file only after all of it has arrived.

    Other file systems of fsspec, such as SFTP, may show a part of a file: its reader finds out.

    Arguments:
        url: The folder, such as ``"s3://bucket/samples"``.
        files: The file system.
        path: The folder on it.
    """

    def __init__(self, url: str, files: Any, path: str) -> None:  # noqa: ANN401
        self.url, self.files, self.root = url.rstrip("/"), files, path.rstrip("/")
        files.invalidate_cache()  # other machines write, too

    def __str__(self) -> str:
        return self.url

    def at(self, name: str) -> Any:  # noqa: ANN401
        """Returns the URL of a file."""
        return f"{self.url}/{name}"

    def has(self, name: str) -> bool:
        """Returns whether there is such a file."""
        found: bool = self.files.exists(f"{self.root}/{name}")
        return found

    def open(self, name: str) -> BinaryIO:
        """Opens a file to read it, a few kilobytes at a time if no more is asked for.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if not self.files.isfile(f"{self.root}/{name}"):
            raise FileNotFoundError(f"There is no file {self.at(name)}.")
        file: BinaryIO = self.files.open(f"{self.root}/{name}", "rb", block_size=2**16)
        return file

    def version(self, name: str) -> None:
        """Returns ``None``: no version is known, so that a file has to be read again."""

    def write(self, name: str, data: bytes) -> None:
        """Writes a file in one piece."""
        self.files.pipe_file(f"{self.root}/{name}", data)

    def create(self, name: str, data: bytes) -> None:
        """Writes a file unless there is one; of several processes at once, the last one writes it."""
        if not self.has(name):
            self.write(name, data)

    def tidy(self, name: str) -> None:
        """Does nothing: no temporary file is written."""


Folder: TypeAlias = LocalFolder | RemoteFolder


def folder_at(where: str | os.PathLike[str]) -> Folder:
    """Returns a folder by its path or URL.

    Raises:
        ImportError: If the file system of a URL is not installed; the message names its package.
        ValueError: If there is no such file system, or a URL is no text.
    """
    text = os.fspath(where)
    if not isinstance(where, str) and re.match(r"[a-z0-9]{2,}:/", text):
        raise ValueError(
            f"A URL must be a text, as a path joins its slashes; got {where!r}. Pass a str."
        )
    if "://" not in text:
        return LocalFolder(Path(text))
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    files, path = url_to_fs(text)
    is_local = isinstance(files, LocalFileSystem)
    return LocalFolder(Path(path)) if is_local else RemoteFolder(text, files, path)


def _publish(temporary: Path, path: Path) -> None:
    """Gives a whole file its name, unless another process has given it to a file of its own."""
    try:
        os.link(temporary, path)
    except OSError:
        if not path.exists():  # no hard links here: two jobs are told apart by their parts
            os.replace(temporary, path)
