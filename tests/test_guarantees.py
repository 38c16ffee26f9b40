"""Every test that the page of guarantees names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def is_there(path: str, name: str) -> bool:
    """Whether a file of tests has a function of a name."""
    if not (ROOT / path).is_file():
        return False
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists() -> None:
    missing = sorted({f"{path}::{name}" for path, name in NAMED if not is_there(path, name)})
    assert not missing, f"docs/guarantees.md names tests that are not there: {missing}."


def test_every_promise_names_a_test() -> None:
    promises = PAGE.split("\n## ")[1:-1]  # the last section is about the tests
    bare = [text.partition("\n")[0] for text in promises if "::test_" not in text]
    assert len(promises) > 5 and not bare, bare


def test_names_of_missing_tests_are_noticed() -> None:
    here = "tests/test_guarantees.py"
    assert is_there(here, "test_every_named_test_exists")
    assert not is_there(here, "test_nothing") and not is_there("tests/nothing.py", "test_nothing")
