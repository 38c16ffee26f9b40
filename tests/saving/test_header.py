"""Headers of files: bounded before they are parsed, with room for everything that is saved."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import raw

from ncprior.saving import inspect, load_tensors, read_metadata, save_tensors
from ncprior.saving.codec import pack, unpack
from ncprior.saving.header import LIMITS, LONG_LIMITS, Limits
from ncprior.saving.tensors import open_file, read_tensors, to_bytes

MIB = 2**20

EMOJI = "\U0001f600"  # of four bytes, as all letters beside it then are in memory

ENTRY = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'


def items(item: str, count: int) -> str:
    return f'{{"a": [{",".join([item] * count)}]}}'


def in_metadata(text: str) -> str:
    return json.dumps({"__metadata__": {"ncprior": text}})


def in_configuration(text: str) -> str:
    return in_metadata(f'{{"sha256": "", "configuration": {text}}}')


def entries(entry: str, count: int) -> str:
    named = ", ".join(f'"{number:x}": {entry}' for number in range(count))
    return f"{{{named}, {in_configuration('{}')[1:]}"


LARGE = {  # 4 MiB each
    "lists": lambda: items("[]", 4 * MIB // 3),
    "lists in the metadata": lambda: in_metadata(items("[]", 4 * MIB // 3)),
    "empty entries": lambda: entries("{}", 4 * MIB // 11),
}

# As large as is read, of a kind that takes the most memory each.
LARGEST: dict[str, Callable[[Limits], str]] = {
    "nested lists": lambda limits: in_configuration(items("[[[[[]]]]]", limits.marks // 6 - 9)),
    "dicts": lambda limits: in_configuration(items('{"":0}', limits.marks // 3 - 9)),
    "texts": lambda limits: items('"abcd"', min(limits.marks, limits.size // 7) - 9),
    "entries": lambda limits: entries(ENTRY, min(limits.marks // 11, limits.size // 66) - 99),
    "wide texts": lambda limits: items(f'"{EMOJI * 99}"', limits.size // (4 * 399) - 9),
    "wide letters": lambda limits: in_metadata("a" * (limits.size - 99) + EMOJI),
}

READS = """
    import sys, time
    from pathlib import Path
    from helpers.hub_problems import gaussian
    from ncprior import NCPrior
    from ncprior.saving import inspect
    from ncprior.training.resumable import load

    def memory(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

    source, limit = gaussian(), float(sys.argv[1])
    reads = [inspect, lambda path: NCPrior.from_pretrained(source, path)]
    reads = reads if limit < 100 else [load]  # of checkpoints
    for path in sys.argv[2:]:
        for read in reads:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
            before, start = memory("VmRSS"), time.process_time()
            try:
                read(path)
            except ValueError as error:
                assert "Cannot" in str(error) and len(str(error)) < 1500, error
            more, seconds = memory("VmHWM") - before, time.process_time() - start
            more -= Path(path).stat().st_size / 2**20
            print(f"{Path(path).name}: {more:.0f} MiB, {seconds:.2f} s")
            assert more < limit and seconds < 4, (path, more, seconds)
"""


def reads_in_memory(mebibytes: int, paths: list[Path]) -> None:
    """Reading each of the files takes so much memory above its size, and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READS), str(mebibytes), *map(str, paths)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def written(headers: dict[str, str], folder: Path) -> list[Path]:
    for name, text in headers.items():
        (folder / name).write_bytes(raw(None, text=text))
    return [folder / name for name in headers]


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@on_linux
@pytest.mark.parametrize("mebibytes", [50, 128])
def test_a_large_header_takes_neither_memory_nor_time(mebibytes: int, tmp_path: Path) -> None:
    reads_in_memory(mebibytes, written({name: make() for name, make in LARGE.items()}, tmp_path))


@on_linux
@pytest.mark.parametrize(("mebibytes", "limits"), [(50, LIMITS), (128, LONG_LIMITS)])
def test_the_largest_header_that_is_read_fits_into_the_promise(
    mebibytes: int, limits: Limits, tmp_path: Path
) -> None:
    headers = {name: make(limits) for name, make in LARGEST.items()}
    reads_in_memory(mebibytes, written(headers, tmp_path))
    for name, text in headers.items():
        size = len(text) if text.isascii() else 4 * len(text.encode())
        marks = sum(map(text.count, "[{,:"))
        assert 0.9 < max(size / limits.size, marks / limits.marks) <= 1, name


@on_linux
def test_a_checkpoint_of_any_state_fits_into_the_promise(tmp_path: Path) -> None:
    """Its checksum is right, so that its state is unpacked, too."""
    states: dict[str, Any] = {
        "nested lists": [[[[[[]]]]] for _ in range(120_000)],
        "texts": [f"{number:05x}" for number in range(900_000)],
    }
    paths = []
    for name, state in states.items():
        tree, _ = pack({"settings": {}, "rows": state})
        paths.append(tmp_path / name)
        save_tensors(paths[-1], {}, {"kind": "checkpoint", "state": tree})
    reads_in_memory(128, paths)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_header_is_named(name: str, tmp_path: Path) -> None:
    (path,) = written({"a": LARGE[name]()}, tmp_path)
    with pytest.raises(ValueError, match=rf"{path}: its header has .* bytes, and at most .* read"):
        inspect(path)
    with pytest.raises(ValueError, match="its header takes .* brackets, commas and colons"):
        load_tensors(path)


def test_brackets_that_are_hidden_by_escapes_are_counted(tmp_path: Path) -> None:
    hidden = in_metadata(items("[]", 250_000)).replace("[", r"\u005b").replace(",", r"\u002c")
    (path,) = written({"a": hidden}, tmp_path)
    assert len(hidden) < LIMITS.size * 2 and sum(map(hidden.count, "[{,:")) < 10
    with open_file(path) as file, pytest.raises(ValueError, match="500,00. brackets, commas"):
        read_tensors(path, file, Limits(LONG_LIMITS.size, LIMITS.marks))


# What is saved can be read


def test_a_prior_of_15000_tensors_can_be_read(tmp_path: Path) -> None:
    tensors = {
        f"heads.{k}.blocks.{i}.weight": torch.ones(1, 1) for k in range(300) for i in range(50)
    }
    path = tmp_path / "a"
    path.write_bytes(to_bytes(tensors, {"n": 1}))
    with open_file(path) as file:
        assert read_tensors(path, file)[0].keys() == tensors.keys()


def test_a_checkpoint_of_a_long_history_can_be_read(tmp_path: Path) -> None:
    """A million steps with 30 groups and 64 ranks."""
    losses = torch.rand(10_000, 2, 30, dtype=torch.float64).tolist()
    rows = [(100 * i, *loss, 1e-3 / (i + 1), 1.7 * i, 1) for i, loss in enumerate(losses)]
    generators = [(3, tuple(range(625)), None)] * 64
    tree, tensors = pack({"rows": rows, "generators": generators})
    save_tensors(tmp_path / "a", tensors, {"kind": "checkpoint", "state": tree})
    tensors, metadata = load_tensors(tmp_path / "a")
    assert unpack(metadata["state"], tensors) == {"rows": rows, "generators": generators}


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    save_tensors(path := tmp_path / "a", {}, {})
    before = path.read_bytes()
    for large in ([[]] * 500_001, "a" * LONG_LIMITS.size, EMOJI * (LONG_LIMITS.size // 12)):
        with pytest.raises(ValueError, match="could not be read again: its header takes"):
            save_tensors(path, {}, {"a": large})
    with pytest.raises(ValueError, match="Save large values as tensors"):
        to_bytes({}, {"a": [[]] * 100_001})
    assert path.read_bytes() == before and read_metadata(path) == {}
