"""The compiler's part: a shared library per kind of device, version of torch and source text."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

KINDS = ("cuda", "mps")

_SOURCE = Path(__file__).with_name("device.cpp")
_TORCH = "2.13"  # it is tied to internals of torch; another minor version may need another line


def why_not() -> str | None:
    """Why there can be no emulated device here, or None."""
    if sys.platform != "linux" or torch.version.cuda or torch.version.hip:
        return "an emulated device needs Linux and a build of torch for CPUs"
    if torch.__version__.split("+")[0].rsplit(".", 1)[0] != _TORCH:
        return f"the emulated device is written for torch {_TORCH}"
    if _compiler() is None:
        return "no C++ compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "no Python.h"
    return None


def built(kind: str) -> Path:
    """The library of one kind of device; it is compiled where it is not kept yet."""
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-DAT_PER_OPERATOR_HEADERS"]
    flags += ["-DEMULATE_MPS"] if kind == "mps" else []
    text = [_SOURCE.read_text(), torch.__version__, torch.__file__, sys.version, *flags]
    key = hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "ncprior-tests")
    library = folder / f"emulated_{kind}_{key}.so"
    with _alone(folder):
        if not library.exists():
            _compile(library, kind, flags)
    return library


def loaded(kind: str) -> ModuleType:
    """The library as a module: from here on, the device is one of this process."""
    name = f"emulated_{kind}"
    spec = importlib.util.spec_from_file_location(name, built(kind))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A context that one process at a time enters."""
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(library: Path, kind: str, flags: list[str]) -> None:
    include = [sysconfig.get_paths()["include"], *cpp_extension.include_paths()]
    (libraries,) = cpp_extension.library_paths()
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch, "device.so")
        command = [
            *(str(_compiler()), *flags, f"-DTORCH_EXTENSION_NAME=emulated_{kind}", str(_SOURCE)),
            *(word for path in include for word in ("-isystem", path)),
            *(f"-L{libraries}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
            *("-o", str(made)),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        made.replace(library)  # whole or not at all


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
