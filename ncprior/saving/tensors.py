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
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_KEY = "ncprior"  # one key, since safetensors writes several in any order


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager that yields a temporary path, which replaces ``path`` in one rename.

    The temporary file lies beside ``path`` (whose folder is made if missing), reaches the disk
    before the rename, and is removed if anything is raised, KeyboardInterrupt included. A reader
    finds the old file or the new one, never a part of one.

    Arguments:
        path: The file to write.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with write_atomically(path) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('whole', 1)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Writes tensors and a configuration as one safetensors file, atomically.

    Arguments:
        path: The file to write; an existing one is replaced.
        tensors: Dense tensors by name, on any device; shared memory is stored once per name.
        metadata: The configuration: nested dict, list, str, int, finite float, bool and None.

    Raises:
        TypeError: If the configuration holds a value that JSON has no form for. Convert it first.
        ValueError: If it holds a float that is not finite. Save it as a text or ``None``.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> save_tensors(path, {"weight": torch.ones(2)}, {"width": 2})
        >>> load_tensors(path)
        ({'weight': tensor([1., 1.])}, {'width': 2})
    """
    configuration = json.loads(json.dumps(dict(metadata), allow_nan=False))  # as it will be read
    tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    header = {"sha256": _digest(configuration, tensors), "configuration": configuration}
    with write_atomically(path) as temporary:
        # safetensors' own save_file ignores the umask: only the owner could read the file.
        temporary.write_bytes(safetensors.torch.save(tensors, {_KEY: json.dumps(header)}))


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
    with _open(path) as (file, header):
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    configuration: dict[str, Any] = header["configuration"]
    if header["sha256"] != _digest(configuration, tensors):
        _fail(path, "its contents have changed since they were written (the checksum differs)")
    return tensors, configuration


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
    with _open(path) as (_, header):
        configuration: dict[str, Any] = header["configuration"]
    return configuration


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields the open file and the part of its header under the key of this package."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)}.")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            yield file, _header(path, file.metadata() or {})
    except SafetensorError as error:
        _fail(path, f"it is not a whole safetensors file ({error})")


def _header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        _fail(path, "it is a safetensors file without an ncprior configuration")
    try:
        header: dict[str, Any] = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        _fail(path, f"its configuration is not JSON ({error})")
    match header:
        case {"sha256": str(), "configuration": dict()}:
            return header
    _fail(path, "its configuration is not one of ncprior")


def _digest(configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(configuration).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fail(path: str | os.PathLike[str], reason: str) -> NoReturn:
    raise ValueError(
        f"Cannot read {os.fspath(path)}: {reason}. Copy, download or save the file again."
    )
