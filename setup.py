"""The description of the package on an index: the README, whose links lead to the repository.

All settings are in pyproject.toml. Links stay as they are until it says where the repository is:

    [project.urls]
    Repository = "https://github.com/OWNER/ncprior"
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")


def description(readme: str, settings: str) -> str:
    """The README with absolute links, for a page that does not lie beside the repository."""
    address = re.search(r'^Repository = "(.+?)/?"$', settings, re.MULTILINE)
    if address is None:
        return readme

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1].endswith((".png", ".svg")) else "blob"
        return f"]({address[1]}/{kind}/main/{link[1]})"

    return LINK.sub(absolute, readme)


readme, settings = (ROOT / name for name in ("README.md", "pyproject.toml"))
setup(
    long_description=description(readme.read_text("utf-8"), settings.read_text("utf-8")),
    long_description_content_type="text/markdown",
)
