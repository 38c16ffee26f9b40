"""The size of the house: the core, every file, and the whole package."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

import ncprior

PACKAGE = Path(ncprior.__file__).parent

CORE = ("source", "prior", "nce", "trainer", "heads/networks", "samplers/base")
CORE += ("samplers/sir", "samplers/langevin")

MOST_OF_CORE, MOST_OF_FILE, MOST_OF_PACKAGE = 1500, 400, 14_000

# All files but those of the adapters, to which `ncprior/adapters` links.
FILES = sorted(p for pattern in ("*.py", "*/*.py") for p in PACKAGE.glob(pattern))
FILES = [path for path in FILES if "adapters" not in path.relative_to(PACKAGE).parts]


def lines_of_code(code: str) -> int:
    """The number of lines that hold more than blanks, comments and docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node, clean=False) is not None and first is not None:
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in (*blank, tokenize.ENDMARKER):
            held |= set(range(token.start[0], token.end[0] + 1))
    return len(held - docstrings)


def test_lines_of_code_are_counted_without_prose() -> None:
    code = '''"""A docstring
of two lines."""

import os  # a comment behind code


# a comment
def f(
    x: int,
) -> str:
    """One line."""
    return """text
in three
lines"""


class C:
    """With nothing else."""
'''
    assert lines_of_code(code) == 1 + 3 + 3 + 1


def test_the_core_is_read_in_an_afternoon() -> None:
    sizes = {name: lines_of_code((PACKAGE / f"{name}.py").read_text()) for name in CORE}
    assert sum(sizes.values()) < MOST_OF_CORE, sizes


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_OF_FILE, f"{path.relative_to(PACKAGE)} has {lines} lines. Split it."


@pytest.mark.xfail(
    strict=True,
    reason="still above by some 1,300 lines; strict, so that the mark goes when it is met",
)
def test_the_package_is_small() -> None:
    total = sum(len(path.read_text().splitlines()) for path in FILES)
    assert total <= MOST_OF_PACKAGE, f"The package has {total:,} lines."
