"""Every kind of file, ways to damage one, and a child process in which a damaged one is loaded."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import select
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from fuzz.rule import TALLY, Finding, Outcome, State, attempt
from fuzz.world import World
from hypothesis import strategies as st
from torch import Tensor, nn

from ncprior import NCPrior, fit, langevin, sir
from ncprior.bases import fit_flow, fit_flow_matching, fit_mixture, rebase
from ncprior.heads import CategoricalHead, ConvHead, MLPHead, ProductHead
from ncprior.jobs import read_parts, sample_parts
from ncprior.samplers import at_temperature, describe, independence, sequence
from ncprior.saving import inspect, load_tensors, save_tensors
from ncprior.vaebm import VAEBM, EnergyNet, fit_vaebm

MEMORY = 50 * 2**20  # bytes that a load may take above the size of the file
CPU_SECONDS = 2.0
RUN: dict[str, Any] = {"steps": 4, "batch_size": 8, "progress": False, "eval_every": 2}

# --- kinds of files


class FileKind(NamedTuple):
    """A kind of file.

    Attributes:
        save: Writes a valid one into the folder of a world, and returns its path.
        load: Loads a file, and uses what it held.
        trains: Whether a load that succeeds may change the prior.
    """

    save: Callable[[World], Path]
    load: Callable[[World, Path], Any]
    trains: bool = False


def _save_prior(head: Callable[[], nn.Module], base: Callable[[World], Any] | None = None) -> Any:
    def save(w: World) -> Path:
        source = w.source if base is None else rebase(w.source, base(w))
        prior = NCPrior(source, head())
        prior.save_pretrained(w.folder / "saved")
        return w.folder / "saved" / "ncprior.safetensors"

    return save


def _load_prior(w: World, path: Path) -> None:
    inspect(path)
    prior = NCPrior.from_pretrained(w.source, path)
    if isinstance(prior.heads[0], MLPHead | ProductHead):
        prior.sample(3, w.sampler)


def _save_with_sampler(w: World) -> Path:
    prior = NCPrior(w.source, _mlp())
    prior.sampler = sequence(
        at_temperature(partial(sir, num_proposals=5, chunk_size=None), 0.5),
        partial(independence, num_steps=2),
        partial(langevin, num_steps=1, step_size=0.1, adjusted=True),
    )
    prior.save_pretrained(w.folder / "saved")
    return w.folder / "saved" / "ncprior.safetensors"


def _load_with_sampler(w: World, path: Path) -> None:
    inspect(path)
    prior = NCPrior.from_pretrained(w.source, path)
    steps = sum(int(number) for number in re.findall(r"num_\w+=(\d+)", describe(prior.sampler)))
    prior.sample(3, None if steps < 50 else w.sampler)  # more steps take longer, as they should


def _mlp() -> nn.Module:
    return MLPHead((2,), width=4, depth=1)


def _save_energy(energy: Callable[[], nn.Module]) -> Any:
    def save(w: World) -> Path:
        VAEBM(w.prior, energy(), num_steps=2).save_pretrained(w.folder / "saved")
        return w.folder / "saved" / "vaebm.safetensors"

    return save


def _load_energy(w: World, path: Path) -> None:
    model = VAEBM.from_pretrained(w.prior, path)
    if isinstance(model.energy, MLPHead):
        model.sample(2)


def _interrupted(run: Callable[[Any], Any]) -> None:
    """Runs a training with a callback that stops it after its first row."""
    run(lambda row: True)


def _save_run(w: World) -> Path:
    prior = copy.deepcopy(w.prior)
    path = w.folder / "run"
    _interrupted(
        lambda stop: fit(prior, w.x, held_out=w.x[:8], checkpoint=path, callback=stop, **RUN)
    )
    return path


def _load_run(w: World, path: Path) -> None:
    fit(w.prior, w.x, held_out=w.x[:8], checkpoint=path, **RUN)


def _save_energy_run(w: World) -> Path:
    path = w.folder / "run"
    _interrupted(lambda stop: fit_vaebm(w.model, w.x, checkpoint=path, callback=stop, **RUN))
    return path


def _load_energy_run(w: World, path: Path) -> None:
    fit_vaebm(w.model, w.x, checkpoint=path, **RUN)


def _save_job(file: str) -> Any:
    def save(w: World) -> Path:
        sample_parts(w.prior, w.folder / "job", sampler=w.sampler, num_samples=5, part_size=3)
        return w.folder / "job" / file

    return save


def _load_job(w: World, path: Path) -> None:
    for part in read_parts(path.parent):
        assert part.keys() >= {"x", "z_0"}


KINDS = {
    "a prior": FileKind(_save_prior(_mlp), _load_prior),
    "a prior of two factors": FileKind(
        _save_prior(lambda: ProductHead([_mlp(), _mlp()])), _load_prior
    ),
    "a prior with a convolution": FileKind(
        _save_prior(lambda: ConvHead((2, 4, 4), width=8, depth=1)), _load_prior
    ),
    "a prior of codes": FileKind(
        _save_prior(lambda: CategoricalHead((), 4, width=4, depth=1)), _load_prior
    ),
    "a prior with a sampler": FileKind(_save_with_sampler, _load_with_sampler),
    "a prior on a mixture": FileKind(
        _save_prior(_mlp, lambda w: fit_mixture(w.z, 2, starts=1)), _load_prior
    ),
    "a prior on a flow": FileKind(
        _save_prior(_mlp, lambda w: fit_flow(w.z, steps=1, progress=False)), _load_prior
    ),
    "a prior on flow matching": FileKind(
        _save_prior(
            _mlp, lambda w: fit_flow_matching(w.z, width=4, depth=1, steps=1, progress=False)
        ),
        _load_prior,
    ),
    "an energy": FileKind(_save_energy(lambda: MLPHead((3,), width=4, depth=1)), _load_energy),
    "an energy on images": FileKind(
        _save_energy(lambda: EnergyNet((1, 8, 8), width=8)), _load_energy
    ),
    "a checkpoint of fit": FileKind(_save_run, _load_run, trains=True),
    "a checkpoint of fit_vaebm": FileKind(_save_energy_run, _load_energy_run),
    "a part": FileKind(_save_job("part-00001.safetensors"), _load_job),
    "a job.json": FileKind(_save_job("job.json"), _load_job),
}


@cache
def valid_files(kind: str) -> dict[str, bytes]:
    """The files of a world that holds a valid one, by path from the folder; the first is damaged."""
    world = World()
    try:
        with mock.patch("warnings.warn"):
            path = KINDS[kind].save(world)
        files = {str(path.relative_to(world.folder)): path.read_bytes()}
        for other in sorted(path.parent.rglob("*")):
            if other.is_file():
                files.setdefault(str(other.relative_to(world.folder)), other.read_bytes())
        return files
    finally:
        world.close()


# --- damage

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 1.5, -0.5, 1e-300, 1e300, 8000, 10**9, 10**12, 2**64),
    *(
        float("nan"),
        float("inf"),
        "",
        "text",
        "__import__('os')",
        "\x1b[31mred",
        "../../x",
        "a\0b",
    ),
    *([], [0], [-1], [[]], [1] * 1000, [10**6] * 4, {}, {"kind": "MLPHead"}, {"class": "x"}),
    *({"kind": "sir", "config": {"num_proposals": 2}}, {"kind": "sequence", "config": {}}),
    *({"kind": "ProductHead", "config": {"heads": []}}, {"kind": "custom", "config": {}}),
    *({"tensor": "0"}, {"array": ["0", "<u4", [4]]}, {"array": ["0", "|O", [1]]}, {"tuple": 3}),
    *({"float": "nan"}, {"dict": [[[], 1]]}, "NaN", "1e999"),
)
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn),
)

# A place, as a part of the whole: spread out, where hypothesis prefers small numbers.
WHERE = st.integers(0, 2**32 - 1).map(lambda n: n * 2654435761 % 2**32 / 2**32)

Damage = tuple[str, Callable[[bytes], bytes]]  # in words, and the damaged content


def damages() -> st.SearchStrategy[Damage]:
    """Damage of every kind to a file of safetensors."""
    return st.one_of(of_bytes(), of_header(), of_tensors(), of_configuration())


def of_bytes() -> st.SearchStrategy[Damage]:
    """Damage that knows nothing of the content."""
    where, bit = WHERE, st.integers(0, 7)
    return st.one_of(
        st.builds(lambda p: (f"cut at {p}", lambda d: d[: int(p * len(d))]), where),
        st.builds(lambda p, b: (f"bit {b} flipped at {p}", lambda d: _flip(d, p, b)), where, bit),
        st.builds(lambda n: (f"{n} bytes more", lambda d: d + b"\1" * n), st.integers(1, 64)),
        st.builds(
            lambda p, n: (f"{n} zeros at {p}", lambda d: _overwritten(d, p, n)),
            where,
            st.integers(1, 200),
        ),
        st.builds(
            lambda n: (f"a header of {n} bytes", lambda d: struct.pack("<Q", n) + d[8:]),
            st.sampled_from([0, 1, 9, 10**6, 2**40, 2**63, 2**64 - 1]),
        ),
        st.just(("empty", lambda d: b"")),
        st.just(("text", lambda d: b"not a file of ours")),
        st.builds(
            lambda n: (f"JSON {n} deep", lambda d: _of_text('{"a":' + "[" * n)),
            st.sampled_from([100, 5000, 100_000]),
        ),
        st.builds(
            lambda n: (f"metadata {n} deep", lambda d: _of_metadata("[" * n + "]" * n)),
            st.sampled_from([100, 5000, 100_000]),
        ),
        st.sampled_from(LARGE_HEADERS),
    )


def _flip(data: bytes, place: float, bit: int) -> bytes:
    changed = bytearray(data)
    changed[int(place * len(data))] ^= 1 << bit
    return bytes(changed)


def _overwritten(data: bytes, place: float, count: int) -> bytes:
    at = int(place * len(data))
    return data[:at] + bytes(min(count, len(data) - at)) + data[at + count :]


def _of_text(header: str) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode()


def _of_metadata(text: str) -> bytes:
    header = {"__metadata__": {"ncprior": text}}
    return _of_text(json.dumps(header))


# Each has 4 MiB, and would take twenty times as much when it is parsed.
LARGE_HEADERS: tuple[Damage, ...] = (
    ("a header of lists", lambda d: _of_text(_lists())),
    ("metadata of lists", lambda d: _of_metadata(_lists())),
    ("a header of empty entries", lambda d: _of_text(_entries())),
)


def _lists() -> str:
    return '{"a":[' + "[]," * (2**22 // 3) + "[]]}"


def _entries() -> str:
    return "{" + ",".join(f'"{number:x}":{{}}' for number in range(2**22 // 11)) + "}"


def of_header() -> st.SearchStrategy[Damage]:
    """One hostile value in the header of safetensors."""

    def damage(place: float, value: Any) -> Damage:
        def change(data: bytes) -> bytes:
            size = struct.unpack("<Q", data[:8])[0]
            header = json.loads(data[8 : 8 + size])
            changed = _put(header, place, value)
            return _of_text(json.dumps(changed)) + data[8 + size :]

        return f"{value!r:.40} at {place} of the header", change

    return st.builds(damage, WHERE, st.sampled_from(HOSTILE))


def of_configuration() -> st.SearchStrategy[Damage]:
    """One hostile value in the configuration, or an entry less or more; the checksum is right."""

    def damage(place: float, value: Any) -> Damage:
        return (
            f"{value!r:.40} at {place} of the configuration",
            lambda data: _repacked(data, lambda t, c: (t, _put(c, place, value))),
        )

    def less(place: float) -> Damage:
        return (
            f"no entry at {place} of the configuration",
            lambda data: _repacked(data, lambda t, c: (t, _put(c, place, _GONE))),
        )

    where = WHERE
    more = (
        "one more key",
        lambda data: _repacked(data, lambda t, c: (t, {**c, "more": 1})),
    )
    return st.one_of(
        st.builds(damage, where, st.sampled_from(HOSTILE)),
        st.builds(damage, where, st.sampled_from(HOSTILE)),
        st.builds(less, where),
        st.just(more),
    )


def of_tensors() -> st.SearchStrategy[Damage]:
    """A tensor less, more or of another shape, dtype or value; the checksum is right."""
    where = WHERE

    def damage(place: float, change: tuple[str, Callable[[Tensor], Tensor | None]]) -> Damage:
        name, function = change

        def apply(tensors: dict[str, Tensor], config: Any) -> tuple[dict[str, Tensor], Any]:
            if tensors:
                key = sorted(tensors)[int(place * len(tensors))]
                new = function(tensors.pop(key))
                tensors |= {} if new is None else {key: new}
            return tensors, config

        return f"tensor at {place} {name}", lambda data: _repacked(data, apply)

    changes: list[tuple[str, Callable[[Tensor], Tensor | None]]] = [
        ("gone", lambda t: None),
        ("empty", lambda t: t.reshape(-1)[:0]),
        ("of one number", lambda t: t.reshape(-1)[:1].clone()),
        ("a scalar", lambda t: torch.zeros((), dtype=t.dtype)),
        ("flat", lambda t: t.reshape(-1)),
        ("with another axis", lambda t: t[None]),
        ("twice as long", lambda t: torch.cat([t.reshape(-1)] * 2)),
        ("NaN", lambda t: t.float() * float("nan")),
        ("negative", lambda t: -t.float() - 1),
        ("zero", lambda t: torch.zeros_like(t)),
        ("huge", lambda t: t.float() + 1e30),
        *((f"as {dtype}", lambda t, dtype=dtype: t.to(dtype)) for dtype in DTYPES),
    ]
    more = (
        "a tensor more",
        lambda data: _repacked(data, lambda t, c: ({**t, "more": torch.ones(2)}, c)),
    )
    return st.builds(damage, where, st.sampled_from(changes)) | st.just(more)


_GONE = object()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of all values of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list) and value:
            yield from _places(value)


def _put(tree: Any, place: float, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if places:
        container, key = places[int(place * len(places))]
        if value is _GONE:
            del container[key]
        else:
            container[key] = value
    return tree


def _repacked(
    data: bytes, change: Callable[[dict[str, Tensor], Any], tuple[dict[str, Tensor], Any]]
) -> bytes:
    """The file with other tensors and configuration, and the checksum of those."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(data)
        tensors, config = change(*load_tensors(path))
        dumps = json.dumps

        def with_nan(*arguments: Any, **options: Any) -> str:
            return dumps(*arguments, **{**options, "allow_nan": True})

        with mock.patch("json.dumps", with_nan):
            save_tensors(path, tensors, config)
        return path.read_bytes()


def of_json() -> st.SearchStrategy[Damage]:
    """Damage to a file of JSON."""
    where = WHERE

    def damage(place: float, value: Any) -> Damage:
        def change(data: bytes) -> bytes:
            return json.dumps(_put(json.loads(data), place, value)).encode()

        return f"{value!r:.40} at {place}", change

    def less(place: float) -> Damage:
        return f"nothing at {place}", lambda d: json.dumps(
            _put(json.loads(d), place, _GONE)
        ).encode()

    whole = st.sampled_from([b"", b"[]", b"null", b"3", b"{}", b"\xff\xfe", b"[" * 100_000])
    return st.one_of(
        st.builds(damage, where, st.sampled_from(HOSTILE)),
        st.builds(less, where),
        st.builds(lambda p: (f"cut at {p}", lambda d: d[: int(p * len(d))]), where),
        st.builds(lambda text: (f"{text[:20]!r}", lambda d: text), whole),
    )


# --- the load, in a child process


def load(kind: str, damage: Damage) -> list[Finding]:
    """Loads a damaged file in a process of its own, and holds the load to the rule."""
    name, change = damage
    (target, valid), *others = valid_files(kind).items()
    damaged = change(valid)
    world = World()
    try:
        for file, content in ((target, damaged), *others):
            path = world.folder / file
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(content)
        result = in_child(lambda: _judged(world, kind, world.folder / target, len(damaged)))
    finally:
        world.close()
    TALLY["files"] += 1
    TALLY[f"files {result['outcome']}"] += 1
    if damaged == valid:
        result["kinds"] = ["refused though valid"] if result["outcome"] != "returned" else []
    return [
        Finding(f"load {kind}", ("damage",), k, (name,), result["detail"]) for k in result["kinds"]
    ]


def _judged(world: World, kind: str, path: Path, size: int) -> dict[str, Any]:
    assert world.model  # made now, as it draws weights
    world.generators = world.generators_now()
    before = State.of(world)
    with little_memory(size):
        outcome = attempt(lambda: KINDS[kind].load(world, path), 20.0, cpu=CPU_SECONDS)
    after = State.of(world)
    kinds = set(_broken(outcome, before, after, KINDS[kind].trains))
    # Finite weights are loaded; huge ones are found in use, after draws and steps of training.
    if "FloatingPointError" in outcome.detail:
        return {
            "outcome": outcome.kind,
            "detail": outcome.detail,
            "kinds": sorted(kinds & {"the VAE changed"}),
        }
    if outcome.kind != "returned" and world.generators_moved():
        kinds.add("generators moved")
    return {"outcome": outcome.kind, "detail": outcome.detail, "kinds": sorted(kinds)}


def _broken(outcome: Outcome, before: State, after: State, trains: bool) -> Iterator[str]:
    if before.vae != after.vae:
        yield "the VAE changed"
    if outcome.kind == "hang":
        yield "hang"
    failed = outcome.kind != "returned"
    prior = (before.heads, before.settings) != (after.heads, after.settings)
    if prior and (failed or not trains):
        yield "the prior changed"
    if before.files != after.files and failed:
        yield "files changed"
    if before.switches != after.switches:
        yield "switches changed"
    wanted = outcome.detail.startswith(("ValueError", "FloatingPointError", "FileNotFoundError"))
    if outcome.kind in ("cryptic", "user", "memory") or (outcome.kind == "ours" and not wanted):
        yield "cryptic"
    if "allocate memory" in outcome.detail:
        yield "cryptic"


class little_memory:
    """A limit on what may be allocated inside."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY + self.size
        resource.setrlimit(resource.RLIMIT_AS, (most, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def in_child(function: Callable[[], dict[str, Any]], seconds: float = 30.0) -> dict[str, Any]:
    """Calls a function in a forked process; a crash or a hang of that process is a result, too."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 (the parent reports it)
            result = {"outcome": "harness", "detail": repr(error), "kinds": ["cryptic"]}
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    end, answer = time.monotonic() + seconds, b""
    while time.monotonic() < end:
        if select.select([read], [], [], 0.5)[0]:
            piece = os.read(read, 2**16)
            answer += piece
            if not piece:
                break
    else:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if answer:
        found: dict[str, Any] = json.loads(answer)
        return found
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        detail = f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
        return {"outcome": "crash", "detail": detail, "kinds": ["crash"]}
    return {"outcome": "hang", "detail": f"longer than {seconds} s", "kinds": ["hang"]}
