"""Check of a built site: links lead to files and anchors, nothing is fetched, no markup is left raw."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Tags whose address a browser loads by itself, with the attribute that has it.
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
URL = re.compile(r"url\(['\"]?(?!data:|#)([^'\")]+)")  # of style sheets

VERBATIM = {"pre", "code", "script", "style"}

# Markup of docstrings and pages that a reader must not see.
RAW = re.compile(
    r":(?:func|class|meth|mod|obj|math|attr):`|``|\.\. \w+::|\]\(\w+\.md|<!--|\$\$|[\^_]\{"
)

QUIET = {"canonical", "prev", "next", "index", "search", "help", "author", "edit"}  # rel of <link>


class Page(HTMLParser):
    """Anchors, links and loaded files of one HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.raw: list[str] = []
        self._code = 0  # depth inside of code and scripts, where markup is meant
        self.feed(text)

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in VERBATIM

    def handle_data(self, data: str) -> None:
        if self._code == 0:
            self.raw += RAW.findall(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._code += tag in VERBATIM
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in LOADS and LOADS[tag] in values:
            quiet = tag == "link" and set(values.get("rel", "").split()) & QUIET
            (self.links if quiet else self.loads).append(values[LOADS[tag]])


def problems(site: Path) -> list[str]:
    """Dead links, files from elsewhere and raw markup, one line each; empty if all is well.

    Arguments:
        site: The folder of the built site.
    """
    built = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [f"{site} has no HTML page."] if not built else []
    for path, page in built.items():
        name = path.relative_to(site)
        found += [f"{name} shows raw markup: {raw}" for raw in page.raw]
        found += [f"{name} loads {url}" for url in page.loads if urlsplit(url).netloc]
        found += [
            f"{name} links to {url}"
            for url in {*page.links, *page.loads}
            if not _leads_somewhere(url, path, built)
        ]
    for path in sorted(site.rglob("*.css")):
        for url in URL.findall(path.read_text(encoding="utf-8")):
            if url.startswith(("http", "//")) or not (path.parent / url.split("?")[0]).exists():
                found.append(f"{path.relative_to(site)} loads {url}")
    return found


def _leads_somewhere(url: str, page: Path, built: dict[Path, Page]) -> bool:
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return True  # of the web, which is not asked
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or target not in built or anchor in built[target].anchors
