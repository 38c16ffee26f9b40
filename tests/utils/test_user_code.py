"""Files of users may have the name of any module."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ncprior
from ncprior.utils.user_code import load_object

FILE = """
from dataclasses import dataclass

@dataclass
class Rows:
    count: int

x = Rows({count})
"""


@pytest.fixture(autouse=True)
def modules_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = sys.modules.copy()
    yield
    sys.modules.clear()
    sys.modules.update(before)


def user_file(path: Path, count: int = 1) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(FILE.format(count=count))
    return f"{path}:x"


@pytest.mark.parametrize("module", [json, ncprior])
def test_a_file_does_not_replace_a_module_of_its_name(module: object, tmp_path: Path) -> None:
    name = module.__name__  # type: ignore[attr-defined]
    found = load_object(user_file(tmp_path / f"{name}.py"))
    assert sys.modules[name] is module
    assert pickle.loads(pickle.dumps(found)) == found


def test_files_of_one_name_are_both_imported_once(tmp_path: Path) -> None:
    """The second took the place of the first, whose objects could be pickled no longer."""
    places = [user_file(tmp_path / f"{n}" / "model_of_test.py", n) for n in range(2)]
    found = [load_object(place) for place in places]
    assert [it.count for it in found] == [0, 1]
    assert copy.deepcopy(found) == pickle.loads(pickle.dumps(found)) == found
    assert all(load_object(place) is it for place, it in zip(places, found, strict=True))


def test_a_file_that_fails_can_be_imported_again(tmp_path: Path) -> None:
    path = tmp_path / "json.py"
    path.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_object(f"{path}:x")
    assert sys.modules["json"] is json
    assert load_object(user_file(path)).count == 1
