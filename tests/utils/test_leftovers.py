"""Temporaries of dead processes are removed, and those of living ones stay."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ncprior.saving import write_atomically
from ncprior.utils.leftovers import in_use, remove_unused

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs locks of POSIX")

WRITES = """
import os, signal, sys
from ncprior.saving import write_atomically
with write_atomically(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_F22_a_temporary_of_a_killed_writer_is_removed_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*.bin"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdin is not None and writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    (unfinished,) = names(tmp_path)
    for _ in range(2):  # it lives
        with write_atomically(path) as temporary:
            temporary.write_bytes(b"whole")
        assert names(tmp_path) == sorted([unfinished, path.name])
    writer.stdin.write(b"\n")
    writer.stdin.close()
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    assert unfinished in names(tmp_path)
    with write_atomically(path) as temporary:
        temporary.write_bytes(b"whole")
    assert names(tmp_path) == [path.name]


def test_F22_folders_are_removed_too_and_nothing_else(tmp_path: Path) -> None:
    for name in ("rows-01234567", "rows-89abcdef", "rows-short", "other-01234567"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "rows-link.txt").write_text("a file of the user's")
    (tmp_path / "target").mkdir()
    (tmp_path / "rows-linkedto").symlink_to(tmp_path / "target")
    with in_use(tmp_path / "rows-89abcdef"):
        remove_unused(tmp_path, "rows-")
    left = ["other-01234567", "rows-89abcdef", "rows-linkedto", "rows-short", "target"]
    assert [name for name in names(tmp_path) if name != "rows-link.txt"] == left
    remove_unused(tmp_path, "rows-")
    assert "rows-89abcdef" not in names(tmp_path)
    remove_unused(tmp_path / "absent", "rows-")
