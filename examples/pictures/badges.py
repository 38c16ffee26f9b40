"""Draws the badges of the README from pyproject.toml, as files of the repository: no page loads them from elsewhere.

python examples/pictures/badges.py examples/images
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
GREY, BLUE = "#4a535c", "#0a5fa8"

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{left}: {right}">
<clipPath id="round"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#round)"><rect width="{middle}" height="20" fill="{grey}"/>
<rect x="{middle}" width="{rest}" height="20" fill="{blue}"/></g>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="7" y="14" textLength="{left_length}">{left}</text>
<text x="{start}" y="14" textLength="{right_length}">{right}</text></g>
</svg>
"""


def badges(project: str) -> dict[str, str]:
    """The texts of pyproject.toml as badges, by their file."""
    (licence,) = re.findall(r'^license = "(.+)"$', project, re.MULTILINE)
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    texts = {
        "licence": ("licence", licence),
        "python": ("Python", f"{versions[0]}–{versions[-1]}"),
        "docs": ("docs", "by task"),
    }
    return {f"badge-{name}.svg": svg(*both) for name, both in texts.items()}


def svg(left: str, right: str) -> str:
    """A badge with two texts."""
    left_length, right_length = length(left), length(right)
    middle, rest = left_length + 14, right_length + 14
    return SVG.format(
        left=left,
        right=right,
        left_length=left_length,
        right_length=right_length,
        middle=middle,
        rest=rest,
        width=middle + rest,
        start=middle + 7,
        grey=GREY,
        blue=BLUE,
    )


def length(text: str) -> int:
    """About the length in pixels of a text of Verdana, 11 pixels high."""
    return round(sum(3.8 if letter in "il.-t " else 6.8 for letter in text))


def main() -> None:
    (folder,) = sys.argv[1:]
    for name, text in badges(PROJECT.read_text(encoding="utf-8")).items():
        Path(folder, name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
