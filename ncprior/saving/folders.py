"""Folders of whole files: on this machine or, by a URL, in an object store that fsspec can reach."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from ncprior.saving.tensors import open_file, write_atomically


class LocalFolder:
    """A folder of this machine, whose files are written under a temporary name and renamed.

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

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, so that readers find the old one or the new one, never a part of one."""
        with write_atomically(self.path / name) as temporary:
            temporary.write_bytes(data)

    def create(self, name: str, data: bytes) -> None:
        """Writes a file unless there is one; of several processes at once, one writes it."""
        path = self.path / name
        self.path.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            temporary = path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
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
        for unfinished in self.path.glob(f".{name}.*.tmp"):
            unfinished.unlink(missing_ok=True)


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
