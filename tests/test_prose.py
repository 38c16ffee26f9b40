"""Docstrings in plain English: phrases that stop non-native readers are counted and bounded.

The bounds are counts per 10,000 words of all docstrings of the package, with those of the
adapters. The first sentence of a docstring names the thing with the noun that an ML paper would
use.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ncprior

PACKAGE = Path(ncprior.__file__).parent

# Code, mathematics, roles, quotations and examples are no prose.
NO_PROSE = re.compile(
    r"``.+?``|:\w+:`.+?`|`.+?`|\"[^\"]*\"|^ *(>>>|\.\.\. ).*$|"
    r"^ *\.\. math::\n( {4,}.*\n|\n)+",
    re.MULTILINE | re.DOTALL,
)
EXAMPLE = re.compile(r"^ *Examples?:\n.*?(?=^ *[A-Z]\w+:\n|\Z)", re.MULTILINE | re.DOTALL)

TELLING = (
    r"\b(tells|told|knows|sees|seen by|"
    r"(not|cannot|can|may|must|will|would|to|they|heads|samplers|sources) (tell|know|see))\b"
)
PHRASES = {
    "what as a noun": (2, r"\bwhat\b(?![^.?]*\?)"),
    "things that tell, know or see": (9, TELLING),
    "Of at the start of a sentence": (1, r"(?:\A|(?<=[.:;?] )|(?<=\n\n))Of\b"),
    "law for distribution": (0, r"\blaws?\b"),
    "refuse for raise": (0, r"\brefus(e|es|ed|al|ing)\b"),
}


def docstrings() -> Iterator[tuple[str, str]]:
    """Yields every docstring without code and examples, with the place that it stands at."""
    for pattern in ("*.py", "*/*.py", "*/*/*.py"):
        for path in sorted(PACKAGE.glob(pattern)):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                    name = getattr(node, "name", "module")
                    yield f"{path.relative_to(PACKAGE)}:{name}", prose(text)


def prose(text: str) -> str:
    """The prose of a docstring, one paragraph a line."""
    text = NO_PROSE.sub("_", EXAMPLE.sub("", text))
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


DOCSTRINGS = list(docstrings())
WORDS = sum(len(text.split()) for _, text in DOCSTRINGS)


@pytest.mark.parametrize("phrase", PHRASES)
def test_docstrings_are_plain(phrase: str) -> None:
    most, pattern = PHRASES[phrase]
    flags = 0 if phrase.startswith("Of") else re.IGNORECASE
    found = [
        f"{place}: {text[max(0, match.start() - 40) : match.end() + 40]}"
        for place, text in DOCSTRINGS
        for match in re.finditer(pattern, text, flags)
    ]
    per_10_000 = 1e4 * len(found) / WORDS
    assert per_10_000 <= most, f"{per_10_000:.1f} per 10,000 words:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("phrase", "bad", "good"),
    [
        ("what as a noun", "Input: what heads get.", "What is measured? Input of the heads."),
        ("things that tell, know or see", "A source knows p(x).", "See :func:`f`; p is known."),
        ("Of at the start of a sentence", "Rows. Of a tuple, x.", "Rows of a tuple. Off."),
        ("law for distribution", "Its law is normal.", "Its distribution is flawless."),
        ("refuse for raise", "It refuses a list.", "It raises for a list."),
    ],
)
def test_the_counts_count(phrase: str, bad: str, good: str) -> None:
    """Each pattern finds its phrase, and not in words or sentences that only look like it."""
    _, pattern = PHRASES[phrase]
    flags = 0 if phrase.startswith("Of") else re.IGNORECASE
    assert re.search(pattern, prose(bad), flags)
    assert not re.search(pattern, prose(good), flags)


def test_examples_and_code_are_no_prose() -> None:
    text = (
        "Draws. See ``what``.\n\nExample:\n    >>> law(1)\n    refused\n\nRaises:\n    ValueError"
    )
    assert prose(text) == "Draws. See _.\n\nRaises: ValueError"
