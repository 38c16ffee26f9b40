"""Files: one safetensors file with a JSON configuration in its header, written atomically.

No file is pickled, and no code from a file is run. A file carries a SHA-256 of its
configuration and tensors, so that loading a damaged file raises an error.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import safetensors.torch
import torch
from torch import Tensor

from ncprior.utils.leftovers import in_use, remove_unused
from ncprior.utils.require import described, require_instance

_KEY = "ncprior"  # one key, since safetensors writes several in any order

_DTYPES = {  # by the names of safetensors
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

_SURROGATE = re.compile("[\ud800-\udfff]")  # which no UTF-8 text has

_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors

_LONGEST_SHAPE = 64  # axes, as in torch


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager that yields a temporary path, which replaces ``path`` in one rename.

    The temporary file lies beside ``path`` (whose folder is made if missing), reaches the disk
    before the rename, and is removed if anything is raised, KeyboardInterrupt included. A reader
    finds the old file or the new one, never a part of one. A temporary file that a killed process
    has left is removed when the same ``path`` is written again.

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
    path = _as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unused(path.parent, f".{path.name}.", ".tmp")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch()
    try:
        with in_use(temporary):
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
        TypeError: If an argument or a tensor is of the wrong type, or the configuration holds a
            value that JSON has no form for. Convert it first.
        ValueError: If it holds a float that is not finite. Save it as a text or ``None``.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> save_tensors(path, {"weight": torch.ones(2)}, {"width": 2})
        >>> load_tensors(path)
        ({'weight': tensor([1., 1.])}, {'width': 2})
    """
    data = to_bytes(tensors, metadata)
    with write_atomically(path) as temporary:
        # safetensors' own save_file ignores the umask: only the owner could read the file.
        temporary.write_bytes(data)


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Returns the content of a file of :func:`save_tensors`, whose arguments and errors it has."""
    require_instance("tensors", tensors, Mapping, "Pass a dict of tensors by name.")
    require_instance("metadata", metadata, Mapping, "Pass a dict.")
    for name, tensor in tensors.items():
        require_instance("the name of a tensor", name, str, "Pass a dict of tensors by name.")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(
                f"Only dense tensors can be saved; {name} is {described(tensor)}. Keep it in a "
                f"dense parameter or buffer."
            )
        if tensor.is_meta or tensor.dtype not in _DTYPES.values():
            raise TypeError(
                f"Tensors are saved with values of a common dtype; {name} is {described(tensor)} "
                f"on {tensor.device}. Convert it first."
            )
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
        text = json.dumps(configuration := json.loads(text))  # as it will be read
    except ValueError as error:
        raise ValueError(
            f"A configuration must hold finite numbers, without circles; got {error}. Save other "
            f"numbers as texts or None."
        ) from error
    tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    header = {"sha256": _digest(text, tensors), "configuration": configuration}
    return safetensors.torch.save(tensors, {_KEY: json.dumps(header)})


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
    with _open(path) as file:
        content = _read_header(path, file)
        try:
            body = bytearray(content.size)
        except MemoryError:
            _fail(path, f"its {content.size:,} bytes do not fit into memory")
        # A file that shrinks meanwhile leaves zeros behind, which have another checksum.
        file.readinto(body)
    tensors = {name: entry.read(body) for name, entry in content.entries.items()}
    if content.sha256 != _digest(content.canonical, tensors):
        _fail(path, "its contents have changed since they were written (the checksum differs)")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            _fail(path, f"its tensor {name} holds bytes that are no bool")
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
    with _open(path) as file:
        return _read_header(path, file).configuration


def printable(text: str, longest: int = 1000) -> str:
    """Returns a message on one line: control characters are escaped, and it is cut if long.

    Example:
        >>> printable("\\x1b[31m red")
        '\\\\x1b[31m red'
    """
    text = text if len(text) <= longest else text[:longest] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Entry(NamedTuple):
    """Place of a tensor in the body of a file."""

    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int

    def read(self, body: bytearray) -> Tensor:
        """Returns the tensor, which shares the memory of the body if it is aligned there."""
        if self.begin == self.end:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        whole = body if self.begin % self.dtype.itemsize == 0 else body[self.begin : self.end]
        first = self.begin if whole is body else 0
        count = math.prod(self.shape)
        return torch.frombuffer(whole, dtype=self.dtype, count=count, offset=first).view(
            self.shape
        )


class _Content(NamedTuple):
    """The header of a file, which describes its body."""

    entries: dict[str, _Entry]
    size: int
    sha256: str
    configuration: dict[str, Any]
    canonical: str  # JSON of the configuration


def _open(path: str | os.PathLike[str]) -> BufferedReader:
    if not (file := _as_path(path)).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)}.")
    return file.open("rb")


def _as_path(path: str | os.PathLike[str]) -> Path:
    require_instance("path", path, (str, os.PathLike), "Pass the path of a file.")
    if not Path(path).name or "\0" in os.fspath(path):
        raise ValueError(f"path must name a file; got {os.fspath(path)!r}. Pass another path.")
    return Path(path)


def _read_header(path: str | os.PathLike[str], file: BufferedReader) -> _Content:
    """Reads the header of an open file, and compares all of it with the size of the file."""
    damaged = "it is not a whole safetensors file"
    whole = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if whole < 8 or length > min(whole - 8, _LONGEST_HEADER):
        _fail(path, f"{damaged} (its header has {length} bytes, and the file {whole})")
    header = _json(path, file.read(length), damaged)
    metadata = header.pop("__metadata__", {})
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            _fail(path, f"{damaged} (its tensors overlap or leave gaps)")
        end = entry.end
    if end != whole - 8 - length:
        _fail(path, f"{damaged} (its tensors have {end} bytes of {whole - 8 - length})")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_KEY), str):
        _fail(path, "it is a safetensors file without an ncprior configuration")
    match _json(path, metadata[_KEY], "its configuration is not JSON"):
        case {"sha256": str(sha256), "configuration": dict(configuration)}:
            try:
                return _Content(entries, end, sha256, configuration, json.dumps(configuration))
            except RecursionError:
                pass  # nested more deeply than anything of ours
    _fail(path, "its configuration is not one of ncprior")


def _entry(path: str | os.PathLike[str], name: str, entry: Any) -> _Entry:  # noqa: ANN401
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            sizes = len(shape) <= _LONGEST_SHAPE and all(
                type(size) is int and 0 <= size < 2**63 for size in shape
            )
            if sizes and dtype in _DTYPES and not _SURROGATE.search(name):
                size = math.prod(shape) * _DTYPES[dtype].itemsize
                # A view of no elements may not have more strides than fit into 64 bits.
                fits = math.prod(max(1, size) for size in shape) < 2**63
                if fits and 0 <= begin and end - begin == size:
                    return _Entry(_DTYPES[dtype], shape, begin, end)
    _fail(path, f"it is not a whole safetensors file (its tensor {name} has no valid place)")


def _json(path: str | os.PathLike[str], text: bytes | str, wrong: str) -> dict[str, Any]:
    """Reads a JSON object of finite numbers; any other text raises an error of ours."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        _fail(path, f"{wrong} ({error})")
    if not isinstance(value, dict):
        _fail(path, f"{wrong}: it is no object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _digest(configuration: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(configuration.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fail(path: str | os.PathLike[str], reason: str) -> NoReturn:
    reason = printable(f"Cannot read {os.fspath(path)}: {reason}")
    raise ValueError(f"{reason}. Copy, download or save the file again.")
