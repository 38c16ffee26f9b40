"""Temporaries of dead processes are removed, and those of living ones stay."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ncprior.saving import write_atomically
from ncprior.utils.leftovers import new_in_use, remove_unused

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


def test_F22_only_unmarked_files_of_such_a_name_are_removed(tmp_path: Path) -> None:
    for name in ("rows-01234567", "rows-short", "other-01234567", "target"):
        (tmp_path / name).write_text("a file")
    (tmp_path / "rows-folder12").mkdir()
    (tmp_path / "rows-linkedto").symlink_to(tmp_path / "target")
    left = ["other-01234567", "rows-folder12", "rows-linkedto", "rows-short", "target"]
    with new_in_use(iter([tmp_path / "rows-89abcdef"])):
        remove_unused(tmp_path, "rows-")
        assert names(tmp_path) == sorted([*left, "rows-89abcdef"])
    remove_unused(tmp_path, "rows-")
    assert names(tmp_path) == left
    remove_unused(tmp_path / "absent", "rows-")


@pytest.mark.parametrize("step", ["before the lock", "while another has the lock"])
def test_a_new_file_that_another_process_takes_for_a_leftover_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What can happen between its creation and its lock; without it, 13 of 8,692 writes failed."""
    lock, taken = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not taken:
            taken.append(descriptor)
            if step == "before the lock":
                (tmp_path / "first").unlink()
            else:
                raise BlockingIOError
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with new_in_use(tmp_path / name for name in ("first", "second")) as path:
        assert path.name == "second" and path.exists()
