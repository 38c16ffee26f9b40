"""Damaged and hostile files: what chance or a person may make of a file that was saved."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncprior.saving.codec import pack, unpack
from ncprior.saving.tensors import load_tensors, save_tensors

Place = tuple[Any, ...]  # keys and indices from the root of a tree to a value in it

DEEP = "[" * 100_000

WRONG = (
    *(None, True, False, -1, 0, 1, 1.5, 1e308, 10**9, 10**12, 2**70, 10**400),
    *("", "x", "\x1b[31m", "\ud800", [], [[]], [0] * 1000, [10**6] * 3, {}, {"x": 1}),
    {"kind": "os.system", "config": {}},
)

DTYPES = (torch.int64, torch.int8, torch.bool, torch.float64, torch.float16, torch.complex64)


def raw(header: Any, body: bytes = b"", *, text: str | None = None) -> bytes:
    """A safetensors file of any header: an object, or its text."""
    encoded = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + body


def split_raw(data: bytes) -> tuple[Any, bytes]:
    """The header and the body of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def places(tree: Any, root: Place = ()) -> Iterator[Place]:
    """The places of all values in a tree of dicts, lists and tuples."""
    yield root
    items = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, list | tuple) else items
    for key, value in items:
        yield from places(value, (*root, key))


def value_at(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def with_value(tree: Any, place: Place, value: Any) -> Any:
    """A copy of a tree with another value at a place."""
    if not place:
        return value
    if isinstance(tree, tuple):
        items = [
            with_value(t, place[1:], value) if i == place[0] else t for i, t in enumerate(tree)
        ]
        return tuple(items)
    tree = copy.copy(tree)
    tree[place[0]] = with_value(tree[place[0]], place[1:], value)
    return tree


def without(tree: Any, place: Place) -> Any:
    """A copy of a tree of dicts and lists without the value at a place."""
    tree = copy.deepcopy(tree)
    del value_at(tree, place[:-1])[place[-1]]
    return tree


def damaged_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A file with damage that knows nothing of its contents, and what the damage is."""
    kind = rng.choice(["cut", "flip", "flips", "zeros", "insert", "append", "length", "noise"])
    at = rng.randrange(len(data))
    match kind:
        case "cut":
            return f"cut at {at}", data[:at]
        case "flip" | "flips":
            changed = bytearray(data)
            for _ in range(1 if kind == "flip" else 20):
                at = rng.randrange(len(data))
                changed[at] ^= 1 << rng.randrange(8)
            return f"{kind}, last at {at}", bytes(changed)
        case "zeros":
            count = rng.randrange(1, len(data) - at + 1)
            return f"{count} zeros at {at}", data[:at] + bytes(count) + data[at + count :]
        case "insert":
            return f"inserted at {at}", data[:at] + rng.randbytes(rng.randrange(1, 50)) + data[at:]
        case "append":
            return "appended", data + rng.randbytes(rng.randrange(1, 50))
        case "length":
            length = rng.choice([0, 1, 7, len(data), 2**31, 2**63, 2**64 - 1])
            return f"header of {length}", length.to_bytes(8, "little") + data[8:]
    return "noise", rng.randbytes(len(data))


def damaged_header(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A file whose header is JSON with one wrong value, or nested deeply."""
    header, body = split_raw(data)
    if rng.random() < 0.1:
        return "deep", raw(None, body, text=rng.choice([DEEP, f'{{"a": {DEEP}']))
    place = rng.choice([p for p in places(header) if p])
    value = rng.choice(WRONG)
    return f"header{list(place)} = {value!r:.40}", raw(with_value(header, place, value), body)


def damaged_tensors(
    tensors: dict[str, Tensor], rng: random.Random
) -> tuple[str, dict[str, Tensor]]:
    """Tensors of which one is missing, more, or of another shape, dtype or value."""
    if not tensors:
        return "a tensor more", {"more": torch.zeros(2)}
    name, changed = rng.choice(sorted(tensors)), dict(tensors)
    t = changed.pop(name)
    kind = rng.choice(
        ["missing", "renamed", "more", "longer", "empty", "scalar", "dtype", "value"]
    )
    match kind:
        case "missing":
            return f"{name} missing", changed
        case "renamed":
            return f"{name} renamed", {**changed, f"{name}.x": t}
        case "more":
            return "a tensor more", {**tensors, f"{name}.more": torch.zeros(3)}
        case "longer":
            new = torch.cat([t, t]) if t.ndim else torch.stack([t, t])
        case "empty":
            new = t.reshape(-1)[:0]
        case "scalar":
            new = t.reshape(-1)[0] if t.numel() else torch.zeros((), dtype=t.dtype)
        case "dtype":
            new = t.to(rng.choice([dtype for dtype in DTYPES if dtype != t.dtype]))
        case _:
            new = t.clone()
            fill = (
                rng.choice([float("nan"), float("inf"), -1e30]) if t.is_floating_point() else 255
            )
            new.reshape(-1)[:1] = fill if t.dtype != torch.bool else True
    return f"{name}: {kind}", {**changed, name: new}


def damaged_configuration(config: Any, rng: random.Random) -> tuple[str, Any]:
    """A configuration with one entry that is wrong, or missing."""
    place = rng.choice([p for p in places(config) if p])
    if rng.random() < 0.2:
        return f"no config{list(place)}", without(config, place)
    value = rng.choice([value for value in WRONG if not _has_no_json(value)])
    return f"config{list(place)} = {value!r:.40}", with_value(config, place, value)


def damaged_file(path: Path, rng: random.Random) -> tuple[str, bytes]:
    """Damage of any kind to a file of ``save_tensors``; in half the cases the checksum is right."""
    data = path.read_bytes()
    if rng.random() < 0.5:
        return rng.choice([damaged_bytes, damaged_header])(data, rng)
    tensors, config = load_tensors(path)
    if rng.random() < 0.5:
        what, tensors = damaged_tensors(tensors, rng)
    else:
        what, config = damaged_configuration(config, rng)
    other = path.with_name("damaged")
    save_tensors(other, tensors, config)
    data = other.read_bytes()
    other.unlink()
    return what, data


def edit_checkpoint(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the state in a checkpoint, checksum and all, as a determined person would."""
    tensors, metadata = load_tensors(path)
    state = unpack(metadata["state"], tensors)
    change(state)
    tree, tensors = pack(state)
    save_tensors(path, tensors, {**metadata, "state": tree})


def _has_no_json(value: Any) -> bool:
    return isinstance(value, int) and value > 10**300  # Python does not read it again
