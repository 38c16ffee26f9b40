"""Sampling jobs in object stores: fsspec's own in memory, and S3 on a server of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from helpers.toys import ladder_prior, stir

from ncprior import NCPrior, sir
from ncprior.jobs import read_parts, sample_parts
from ncprior.saving.folders import LocalFolder, folder_at

JOB: dict[str, Any] = {"num_samples": 11, "part_size": 4, "seed": 7, "progress": False}


def made() -> NCPrior:
    """The same prior at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        prior = stir(ladder_prior(2))
    prior.sampler = partial(sir, num_proposals=20)
    return prior


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket on a server of this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "a key", "secret": "a secret"}
    fsspec.config.conf["s3"] = options
    fsspec.filesystem("s3").mkdir("bucket")
    try:
        yield "s3://bucket"
    finally:
        del fsspec.config.conf["s3"]
        fsspec.filesystem("s3", **options).clear_instance_cache()
        server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of this test."""
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory:/"
    return f"{root}/{tmp_path.name}"


def contents(url: str) -> dict[str, bytes]:
    files, path = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {name.rpartition("/")[2]: files.cat_file(name) for name in files.find(path)}


def put(url: str, data: bytes) -> None:
    files, path = fsspec.core.url_to_fs(url)
    files.pipe_file(path, data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the job on this machine."""
    folder = tmp_path_factory.mktemp("whole")
    sample_parts(made(), folder, **JOB)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_job_is_the_same_in_any_place(url: str, whole: dict[str, bytes]) -> None:
    first = sample_parts(made(), url, parts=[2], **JOB)
    files = sample_parts(made(), f"{url}/", **JOB)
    assert files == [f"{url}/{name}" for name in sorted(whole) if name != "job.json"]
    assert first == files[2:] and contents(url) == whole
    parts = list(read_parts(url))
    assert [len(part["z_1"]) for part in parts] == [4, 4, 3]
    assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for p in parts for t in p.values())


def test_whole_parts_are_kept_and_damaged_ones_drawn_again(
    url: str, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in whole.items():
        put(f"{url}/{name}", content[:-3] if name == "part-00001.safetensors" else content)
    rows = []
    sample = NCPrior.sample

    def counted(self: NCPrior, num: int, *arguments: Any, **options: Any) -> Any:
        rows.append(num)
        return sample(self, num, *arguments, **options)

    monkeypatch.setattr(NCPrior, "sample", counted)
    with pytest.raises(ValueError, match=f"Cannot read {url}/part-00001.* not a whole"):
        list(read_parts(url))
    sample_parts(made(), url, **JOB)
    assert rows == [4] and contents(url) == whole
    changed = bytearray(whole["part-00000.safetensors"])
    changed[-1] ^= 1
    put(f"{url}/part-00000.safetensors", bytes(changed))
    with pytest.raises(ValueError, match="the checksum differs"):
        list(read_parts(url))


def test_another_job_and_a_part_of_one_are_refused(url: str, whole: dict[str, bytes]) -> None:
    with pytest.raises(FileNotFoundError, match=f"{url} holds no sampling job"):
        next(read_parts(url))
    sample_parts(made(), url, parts=[0], **JOB)
    with pytest.raises(ValueError, match=f"{url} holds parts of another job"):
        sample_parts(made(), url, **{**JOB, "seed": 8})
    with pytest.raises(FileNotFoundError, match=f"no file {url}/part-00001"):
        list(read_parts(url))
    put(f"{url}/part-00001.safetensors", whole["part-00000.safetensors"])
    with pytest.raises(ValueError, match=f"{url}/part-00001.* is not this part of .*{url}/job"):
        sample_parts(made(), url, **JOB)
    put(f"{url}/job.json", b"{}")
    with pytest.raises(ValueError, match=f"{url}/job.json holds no job of sample_parts"):
        next(read_parts(url))


def test_a_part_is_seen_by_others_only_when_it_is_whole(
    whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write is one call with all bytes: an object store shows no part of it."""
    written: list[tuple[str, bytes]] = []
    pipe_file = MemoryFileSystem.pipe_file

    def pipe(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
        written.append((path.rpartition("/")[2], value))
        pipe_file(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe)
    sample_parts(made(), "memory://written", **JOB)
    assert sorted(written) == sorted(whole.items())


def test_places_that_are_none(tmp_path: Path) -> None:
    found = folder_at(f"file://{tmp_path}/job")
    assert isinstance(found, LocalFolder) and found.path == tmp_path / "job"
    for place, error, words in (
        (Path("s3://bucket/job"), ValueError, "A URL must be a text"),
        ("nothing://bucket/job", ValueError, "nothing"),
    ):
        with pytest.raises(error, match=words):
            sample_parts(made(), place, **JOB)
