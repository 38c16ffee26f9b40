"""Files of tensors: exact, atomic, and damage is noticed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import raw, split_raw
from helpers.equality import identical
from safetensors import safe_open
from safetensors.torch import save_file

from ncprior.saving import tensors
from ncprior.saving.tensors import load_tensors, read_metadata, save_tensors, write_atomically


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "saved.safetensors"
    save_tensors(path, {"a": torch.arange(6.0).view(2, 3)}, {"text": "π", "n": [1, None, True]})
    return path


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.rand(4, 3))
    tensors = {
        "parameter": weight,
        "shared": weight,
        "transposed": weight.mT,
        "row of it": weight[1],
        "expanded": torch.ones(1).expand(3),
        "half": torch.rand(3).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 2),
    }
    metadata = {"nested": {"a": [1, 0.1, None, "π"]}, "big": 2**80}
    save_tensors(tmp_path / "a", tensors, metadata)
    loaded, read = load_tensors(tmp_path / "a")
    assert identical(
        dict(sorted(loaded.items())), {n: tensors[n].detach() for n in sorted(tensors)}
    )
    assert read == metadata == read_metadata(tmp_path / "a")


def test_the_header_stays_what_it_was(path: Path) -> None:
    """Or else files saved before could not be loaded."""
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["ncprior"]) == {
            "sha256": "25dd8d25835772395af8f149ff57429e3378aea2dc96f5f831ad185737a7a91e",
            "configuration": {"text": "π", "n": [1, None, True]},
        }


def test_a_loaded_tensor_outlives_its_file(path: Path) -> None:
    tensors, _ = load_tensors(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3))


def test_equal_contents_make_equal_files(path: Path, tmp_path: Path) -> None:
    save_tensors(tmp_path / "again", *load_tensors(path))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_umask_decides_who_may_read(path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_configuration_holds_finite_numbers(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        save_tensors(tmp_path / "a", {}, {"a": value})


def test_a_configuration_is_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_tensors(tmp_path / "a", {}, {"a": object()})
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_refused_at_every_length(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        for read in (load_tensors, read_metadata):
            with pytest.raises(ValueError, match="saved.safetensors.*not a whole .* again"):
                read(path)


def test_a_changed_byte_is_noticed_wherever_it_is(path: Path) -> None:
    whole = path.read_bytes()
    expected = load_tensors(path)
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            loaded = load_tensors(path)
        except ValueError as error:
            assert "saved.safetensors" in str(error)
        else:  # another spelling of the same contents
            assert identical(list(loaded), list(expected))


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_refused(seed: int, path: Path) -> None:
    path.write_bytes(random.Random(seed).randbytes(1000))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_tensors(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file_is_refused(
    metadata: dict[str, str] | None, path: Path
) -> None:
    save_file({"a": torch.zeros(2)}, path, metadata)
    for read in (load_tensors, read_metadata):
        with pytest.raises(ValueError, match="saved.safetensors.* without an ncprior config"):
            read(path)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '"a"', "{}", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_a_configuration_that_is_not_ours_is_refused(text: str, path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path, {"ncprior": text})
    for read in (load_tensors, read_metadata):
        with pytest.raises(ValueError, match="saved.safetensors.*configuration is not"):
            read(path)


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}"):
        load_tensors(tmp_path / name)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file(error: type[BaseException], path: Path) -> None:
    old = path.read_bytes()
    with pytest.raises(error), write_atomically(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_contents_reach_the_disk_before_the_rename(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        steps.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def record_replace(old: Path, new: Path) -> None:
        steps.append(("replace", old.stat().st_ino))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    save_tensors(path, {}, {})
    inode = path.stat().st_ino
    assert steps == [("fsync", inode), ("replace", inode)]


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    save_tensors(tmp_path / "runs" / "1" / "a", {}, {})
    assert load_tensors(tmp_path / "runs" / "1" / "a") == ({}, {})


def test_a_full_disk_is_named_with_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    old = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OSError, match=rf"Cannot write {path}: No space left.* Make room"
    ) as caught:
        save_tensors(path, {}, {})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_none_is_named_with_the_file(path: Path) -> None:
    with pytest.raises(OSError, match=f"Cannot write {path / 'a'}: .* or pass a path that can"):
        save_tensors(path / "a", {}, {})


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "/of/others"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        OSError("a reason of others"),
    ],
)
def test_errors_that_are_not_of_the_file_are_passed_on(error: OSError, path: Path) -> None:
    with pytest.raises(OSError) as caught, write_atomically(path):
        raise error
    assert caught.value is error


def test_the_file_behind_a_symbolic_link_is_replaced(path: Path, tmp_path: Path) -> None:
    links = [tmp_path / "links" / name for name in ("direct", "second", "dangling", "circle")]
    links[0].parent.mkdir()
    for link, target in zip(links, (path, links[0], tmp_path / "new", links[3]), strict=True):
        link.symlink_to(target)
    for number, link in enumerate(links[:3]):
        save_tensors(link, {}, {"n": number})
        assert link.is_symlink() and load_tensors(link)[1] == {"n": number}
        assert not [found for found in tmp_path.rglob("*.tmp")]
    assert load_tensors(path)[1] == {"n": 1} and load_tensors(tmp_path / "new")[1] == {"n": 2}
    save_tensors(links[3], {}, {})  # leads nowhere
    assert load_tensors(links[3]) == ({}, {})


KILLED = """
import os, pathlib, signal, sys, torch
from ncprior.saving import save_tensors

def write_half(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

save_tensors(sys.argv[1], {"a": torch.ones(1000)}, {"n": 1})
pathlib.Path.write_bytes = write_half
save_tensors(sys.argv[1], {"a": torch.zeros(1000)}, {"n": 2})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_9_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the old file, and half of the new one beside it
    tensors, metadata = load_tensors(path)
    assert metadata == {"n": 1} and torch.equal(tensors["a"], torch.ones(1000))


def test_F9_a_file_that_is_replaced_while_it_is_read_is_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, other = load_tensors(path), path.with_name("other")
    save_tensors(other, {"b": torch.zeros(1000)}, {"n": 2})
    read = tensors.read_header

    def replaced(*arguments: Any) -> Any:
        content = read(*arguments)
        os.replace(other, path)
        return content

    monkeypatch.setattr(tensors, "read_header", replaced)
    assert identical(list(load_tensors(path)), list(old))
    monkeypatch.undo()
    assert load_tensors(path)[1] == {"n": 2}


WRITES_ON = """
import sys, torch
from ncprior.saving import save_tensors
n = 0
while True:
    save_tensors(sys.argv[1], {"a": torch.full((50 + n % 7,), float(n))}, {"n": n})
    n += 1
    if n == 3:
        print("ready", flush=True)
"""


def test_F9_a_reader_beside_a_writer_finds_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer = subprocess.Popen([sys.executable, "-c", WRITES_ON, str(path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        seen = set()
        for _ in range(400):
            found, metadata = load_tensors(path)
            assert (found["a"] == metadata["n"]).all() and len(found["a"]) == 50 + metadata[
                "n"
            ] % 7
            seen.add(metadata["n"])
        assert len(seen) > 1
    finally:
        writer.kill()
        writer.communicate()


def test_tensors_of_odd_places_are_read(path: Path) -> None:
    """Bytes before others leave the others at places that are no multiples of their size."""
    parts = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(5.0), "c": torch.zeros(0)}
    save_tensors(path, parts, {})
    header, body = split_raw(path.read_bytes())
    header["a"]["data_offsets"], header["b"]["data_offsets"] = [0, 3], [3, 23]
    header["c"]["data_offsets"] = [23, 23]
    path.write_bytes(raw(header, parts["a"].numpy().tobytes() + parts["b"].numpy().tobytes()))
    assert len(body) == 23 and identical(dict(sorted(load_tensors(path)[0].items())), parts)


def test_a_file_is_read_into_its_own_size_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    save_tensors(path, {"a": torch.zeros(30, 2**18)}, {})  # 30 MiB
    tracemalloc.start()  # which does not see the memory of tensors
    try:
        loaded, _ = load_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 0.1 * path.stat().st_size
    finally:
        tracemalloc.stop()
    assert loaded["a"].untyped_storage().nbytes() == 30 * 2**20


def test_a_loaded_tensor_lies_in_memory_like_any_other(path: Path) -> None:
    """At other alignments, a matrix product can be rounded differently."""
    save_tensors(path, {"a": torch.ones(1), "b": torch.ones(3), "c": torch.ones(5)}, {})
    places = {tensor.data_ptr() % 64 for tensor in load_tensors(path)[0].values()}
    assert places == {torch.ones(3).data_ptr() % 64} == {0}
