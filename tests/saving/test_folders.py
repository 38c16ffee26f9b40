"""Folders of whole files: their temporary files, and versions of a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ncprior.saving.folders import LocalFolder

WRITES = """
import os, signal, sys
from pathlib import Path
from ncprior.saving.folders import LocalFolder
fsync = os.fsync
def fsync_and_wait(descriptor):
    fsync(descriptor)
    print("ready", flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync_and_wait
LocalFolder(Path(sys.argv[1])).write("a", b"half")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks of POSIX")
def test_a_temporary_file_stays_while_its_writer_lives(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdin is not None and writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    (unfinished,) = os.listdir(tmp_path)
    LocalFolder(tmp_path).write("a", b"whole")
    assert sorted(os.listdir(tmp_path)) == [unfinished, "a"]
    writer.stdin.write(b"\n")
    writer.stdin.close()
    writer.wait()
    writer.stdout.close()
    assert unfinished in os.listdir(tmp_path)
    LocalFolder(tmp_path).write("a", b"whole")  # before it writes: a full disk has room again
    assert os.listdir(tmp_path) == ["a"]


def test_temporary_files_are_those_of_one_file(tmp_path: Path) -> None:
    """And files with other names are someone's own."""
    kept = [".a.0badcafe.tmp.txt", ".a.short.tmp", ".ab.0badcafe.tmp", "a.0badcafe.tmp"]
    for name in (*kept, ".a.0badcafe.tmp", ".a.01234567.tmp"):
        (tmp_path / name).touch()
    LocalFolder(tmp_path).tidy("a")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_file_is_created_once(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "new")
    for data in (b"first", b"second"):
        folder.create("a", data)
    assert os.listdir(folder.path) == ["a"] and folder.at("a").read_bytes() == b"first"


def test_a_version_changes_with_the_file(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    assert folder.version("a") is None
    found = []
    for data in (b"1", b"22", b"333"):
        folder.write("a", data)
        found += 2 * [folder.version("a")]
    assert len(set(found)) == 3
