"""Objects of the user's own Python code, named on a command line, and the line that an error is in."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from ncprior.utils.require import described, real_tensor

_PACKAGE = Path(__file__).parents[1]


def load_object(where: str) -> Any:  # noqa: ANN401
    """Returns the object ``FILE.py:NAME`` or ``MODULE:NAME``; a plain function is called first."""
    place, _, name = where.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"Expected FILE.py:NAME or MODULE:NAME; got {where}.")
    if place.endswith(".py"):
        module = _import_file(place)
    else:
        _add_to_path(Path.cwd())
        module = importlib.import_module(place)
    if not hasattr(module, name):
        raise LookupError(f"{place} has no {name}. Give a name that it defines.")
    found = getattr(module, name)
    return found() if hasattr(found, "__code__") else found


def load_data(where: str) -> Any:  # noqa: ANN401
    """Returns data as :func:`load_object` does."""
    data = load_object(where)
    array = data.to_numpy() if hasattr(data, "to_numpy") else data
    if isinstance(array, np.ndarray) and array.dtype.kind not in "fiub":
        real_tensor(where, data)  # raises, unless they are numbers after all
    if isinstance(data, type) or not (hasattr(data, "__getitem__") or hasattr(data, "__iter__")):
        raise TypeError(
            f"{where} must be data: a tensor, an array, a table, a dataset or a DataLoader; got "
            f"{described(data)}."
        )
    return data


def _import_file(place: str) -> Any:  # noqa: ANN401
    path = Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {place}. Give the path of a Python file.")
    _add_to_path(path.parent)
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        digest = hashlib.sha256(str(path).encode()).hexdigest()
        name = f"{name}_{digest[:8]}"  # beside the module that has this name already
    if name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # imported once, also for several names
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _add_to_path(folder: Path) -> None:
    """Lets the user's files import their neighbours, as ``python FILE.py`` does."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def line_of_the_user(error: BaseException) -> str | None:
    """Returns ``"FILE:LINE: "`` of the last line of the user's own code that led to an error."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}: "
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _is_the_users(frame):
            return f"{frame.f_code.co_filename}:{line}: "
    return None


def _is_the_users(frame: FrameType) -> bool:
    """Returns whether a frame is of no code of Python, of an installed package or of this one."""
    path = Path(frame.f_code.co_filename)
    others = (Path(os.__file__).parent, _PACKAGE)
    return (
        path.is_file()
        and frame.f_globals.get("__name__", "").partition(".")[0] != "ncprior"
        and not any(path.is_relative_to(folder) for folder in others)
        and not {"site-packages", "dist-packages"} & set(path.parts)
    )
