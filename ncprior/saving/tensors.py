"""Files: one safetensors file with a JSON configuration in its header, written atomically.

No file is pickled, and no code from a file is run. A file carries a SHA-256 of its
configuration and tensors, so that loading a damaged file raises an error.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from ncprior.saving.header import DTYPES, KEY, LIMITS, LONG_LIMITS, Limits, fail, read_header
from ncprior.utils.leftovers import new_in_use, remove_unused
from ncprior.utils.require import described, require_instance


@contextmanager
def write_atomically(path: str | os.PathLike[str], *, tidy: bool = True) -> Iterator[Path]:
    """Context manager that yields a temporary path, which replaces ``path`` in one rename.

    The temporary file lies beside ``path`` (whose folder is made if missing), reaches the disk
    before the rename, and is removed if anything is raised, KeyboardInterrupt included. A reader
    finds the old file or the new one, never a part of one. A temporary file that a killed process
    has left is removed when the same ``path`` is written again. If ``path`` is a symbolic link, the
    file that it leads to is replaced.

    Arguments:
        path: The file to write.
        tidy: Whether the folder is scanned for such temporary files.

    Raises:
        OSError: If the file cannot be written, such as on a full disk. The message names it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with write_atomically(path) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('whole', 1)
    """
    path = _as_path(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    names = (path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for _ in count())
    with naming_the_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if tidy:
            remove_unused(path.parent, f".{path.name}.", ".tmp")
        with new_in_use(names) as temporary:
            try:
                yield temporary
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Context whose errors of the operating system name a file that is written, and a remedy.

    Errors that name other files are passed on as they are.
    """
    try:
        yield
    except OSError as error:
        # A write to a full disk names no file.
        named = path if error.filename is None else Path(str(error.filename))
        is_ours = named in (path, *path.parents) or named.name.startswith(f".{path.name}.")
        if error.errno is None or isinstance(error, ConnectionError) or not is_ours:
            raise
        raise OSError(
            error.errno,
            f"Cannot write {path}: {error.strerror}. Make room there, or pass a path that can be "
            f"written to.",
        ) from error


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Writes tensors and a configuration as one safetensors file, atomically.

    Arguments:
        path: The file to write; an existing one is replaced.
        tensors: Dense tensors by name, on any device; shared memory is stored once per name.
        metadata: The configuration: nested dict, list, str, int, finite float, bool and None.

    Raises:
        TypeError: If an argument or a tensor is of the wrong type, or the configuration holds a
            value that JSON has no form for. Convert it first.
        ValueError: If it holds a float that is not finite. Save it as a text or ``None``. Also if
            the names and the configuration are too large to be read again: 16 MiB, or a million
            brackets, commas and colons. Save large values as tensors.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> save_tensors(path, {"weight": torch.ones(2)}, {"width": 2})
        >>> load_tensors(path)
        ({'weight': tensor([1., 1.])}, {'width': 2})
    """
    data = to_bytes(tensors, metadata, LONG_LIMITS)
    with write_atomically(path) as temporary:
        # safetensors' own save_file ignores the umask: only the owner could read the file.
        temporary.write_bytes(data)


def to_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], limits: Limits = LIMITS
) -> bytes:
    """Returns the content of a file of :func:`save_tensors`, whose arguments and errors it has.

    Arguments:
        tensors: The tensors.
        metadata: The configuration.
        limits: The limits under which it will be read.
    """
    require_instance("tensors", tensors, Mapping, "Pass a dict of tensors by name.")
    require_instance("metadata", metadata, Mapping, "Pass a dict.")
    for name, tensor in tensors.items():
        require_instance("the name of a tensor", name, str, "Pass a dict of tensors by name.")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(
                f"Only dense tensors can be saved; {name} is {described(tensor)}. Keep it in a "
                f"dense parameter or buffer."
            )
        if tensor.is_meta or tensor.dtype not in DTYPES.values():
            raise TypeError(
                f"Tensors are saved with values of a common dtype; {name} is {described(tensor)} "
                f"on {tensor.device}. Convert it first."
            )
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
        text = json.dumps(configuration := json.loads(text))  # as it will be read
    except (TypeError, RecursionError) as error:
        raise TypeError(
            f"A configuration must be a tree of dicts, lists, texts and numbers, as JSON holds it; got "
            f"{error}. Save tensors among the tensors."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"A configuration must hold finite numbers, without circles; got {error}. Save other "
            f"numbers as texts or None."
        ) from error
    tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    header = {"sha256": _digest(text, tensors), "configuration": configuration}
    data = safetensors.torch.save(tensors, {KEY: json.dumps(header)})
    start = 8 + int.from_bytes(data[:8], "little")
    if excess := limits.excess(data[8:start]):
        raise ValueError(
            f"This file could not be read again: {excess}. Save large values as tensors, fewer "
            f"tensors, or a shorter history."
        )
    return data


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the configuration of a file.

    Arguments:
        path: A file of :func:`save_tensors`.

    Returns:
        The tensors by name, on the CPU, and the configuration.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, changed since it was written, or not of this package.
            Copy, download or save it again.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> save_tensors(path, {"weight": torch.ones(2)}, {"width": 2})
        >>> _ = path.write_bytes(path.read_bytes()[:-1])
        >>> load_tensors(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: Cannot read ...a.safetensors: it is not a whole safetensors file ...
    """
    with open_file(path) as file:
        return read_tensors(path, file, LONG_LIMITS)


def read_tensors(
    path: str | os.PathLike[str], file: BinaryIO, limits: Limits = LIMITS
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the configuration of an open file, as :func:`load_tensors` does.

    Arguments:
        path: The file's name, for messages.
        file: The file.
        limits: The largest header to read.
    """
    content = read_header(path, file, limits)
    start = file.tell()
    try:
        tensors = {name: entry.read(file, start) for name, entry in content.entries.items()}
    except RuntimeError:  # of torch's allocator
        fail(path, f"its {content.size:,} bytes do not fit into memory")
    if content.sha256 != _digest(content.canonical, tensors):
        fail(path, "its contents have changed since they were written (the checksum differs)")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            fail(path, f"its tensor {name} holds bytes that are no bool")
    return tensors, content.configuration


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the configuration of a file without reading its tensors or verifying its checksum.

    Arguments:
        path: A file of :func:`save_tensors`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated or not of this package. Copy, download or save it
            again.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> save_tensors(path, {"weight": torch.ones(2)}, {"width": 2})
        >>> read_metadata(path)
        {'width': 2}
    """
    with open_file(path) as file:
        return read_header(path, file, LONG_LIMITS).configuration


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file to read it.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not (file := _as_path(path)).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)}.")
    return file.open("rb")


def _as_path(path: str | os.PathLike[str]) -> Path:
    require_instance("path", path, (str, os.PathLike), "Pass the path of a file.")
    if not Path(path).name or "\0" in os.fspath(path):
        raise ValueError(f"path must name a file; got {os.fspath(path)!r}. Pass another path.")
    return Path(path)


def _digest(configuration: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(configuration.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
