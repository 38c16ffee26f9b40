"""Header of a safetensors file of this package, checked before anything else is read."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
from torch import Tensor

from ncprior.utils.texts import printable

KEY = "ncprior"  # one key, since safetensors writes several in any order

DTYPES = {  # by the names of safetensors
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
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

_LONGEST_SHAPE = 64  # axes, as in torch


class Limits(NamedTuple):
    """Size of the largest header that is read and written.

    Parsed JSON takes up to fifty times the memory of its text, so that the text is checked first.

    Attributes:
        size: Its bytes; each letter of a text that is not ASCII counts as four.
        marks: Its brackets, commas and colons, each of which takes up to 100 bytes of memory.
    """

    size: int
    marks: int

    def excess(self, text: bytes | str) -> str:
        """Returns the reason why a text of JSON is too large; an empty one if it is not."""
        size = len(text) if text.isascii() else 4 * len(text)
        if isinstance(text, str):
            marks = sum(map(text.count, "[{,:"))
        else:
            marks = sum(map(text.count, b"[{,:"))
        if size <= self.size and marks <= self.marks:
            return ""
        return (
            f"its header takes {size:,} bytes with {marks:,} brackets, commas and colons, and at most "
            f"{self.size:,} and {self.marks:,} are read"
        )


LIMITS = Limits(2 * 2**20, 200_000)  # of a prior, an energy and a part: 15,000 tensors

LONG_LIMITS = Limits(16 * 2**20, 10**6)  # of a checkpoint, which holds each tensor several times


class Entry(NamedTuple):
    """Place of a tensor in the body of a file."""

    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int

    def read(self, file: BinaryIO, start: int) -> Tensor:
        """Returns the tensor, from a file whose body begins at ``start``.

        It has memory of its own, aligned as torch aligns any other: a matrix product can be rounded
        differently at another alignment.
        """
        if self.begin == self.end:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        # A file that shrinks meanwhile leaves zeros behind, which have another checksum.
        content = torch.zeros(self.end - self.begin, dtype=torch.uint8, device="cpu")
        file.seek(start + self.begin)
        file.readinto(content.numpy().data)  # type: ignore[attr-defined]
        return content.view(self.dtype).view(self.shape)


class Content(NamedTuple):
    """The header of a file, which describes its body."""

    entries: dict[str, Entry]
    size: int
    sha256: str
    configuration: dict[str, Any]
    canonical: str  # JSON of the configuration


def read_header(path: str | os.PathLike[str], file: BinaryIO, limits: Limits = LIMITS) -> Content:
    """Reads the header of an open file, and compares all of it with the size of the file."""
    damaged = "it is not a whole safetensors file"
    whole = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > whole - 8:
        fail(path, f"{damaged} (its header has {length} bytes, and the file {whole})")
    if length > limits.size:
        fail(path, f"its header has {length:,} bytes, and at most {limits.size:,} are read")
    header = _json(path, file.read(length), damaged, limits)
    metadata = header.pop("__metadata__", {})
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            fail(path, f"{damaged} (its tensors overlap or leave gaps)")
        end = entry.end
    if end != whole - 8 - length:
        fail(path, f"{damaged} (its tensors have {end} bytes of {whole - 8 - length})")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        fail(path, "it is a safetensors file without an ncprior configuration")
    match _json(path, metadata[KEY], "its configuration is not JSON", limits):
        case {"sha256": str(sha256), "configuration": dict(configuration)}:
            try:
                return Content(entries, end, sha256, configuration, json.dumps(configuration))
            except RecursionError:
                pass  # nested more deeply than anything of ours
    fail(path, "its configuration is not one of ncprior")


def _entry(path: str | os.PathLike[str], name: str, entry: Any) -> Entry:  # noqa: ANN401
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            sizes = len(shape) <= _LONGEST_SHAPE and all(
                type(size) is int and 0 <= size < 2**63 for size in shape
            )
            if sizes and dtype in DTYPES and not _SURROGATE.search(name):
                size = math.prod(shape) * DTYPES[dtype].itemsize
                # A view of no elements may not have more strides than fit into 64 bits.
                fits = math.prod(max(1, size) for size in shape) < 2**63
                if fits and 0 <= begin and end - begin == size:
                    return Entry(DTYPES[dtype], shape, begin, end)
    fail(path, f"it is not a whole safetensors file (its tensor {name} has no valid place)")


def _json(
    path: str | os.PathLike[str], text: bytes | str, wrong: str, limits: Limits
) -> dict[str, Any]:
    """Reads a JSON object of finite numbers; any other or larger text raises an error of ours."""
    if excess := limits.excess(text):
        fail(path, excess)
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        fail(path, f"{wrong} ({error})")
    if not isinstance(value, dict):
        fail(path, f"{wrong}: it is no object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def fail(path: str | os.PathLike[str], reason: str) -> NoReturn:
    """Raises the error of a file that cannot be read, with its reason."""
    reason = printable(f"Cannot read {os.fspath(path)}: {reason}")
    raise ValueError(f"{reason}. Copy, download or save the file again.")
