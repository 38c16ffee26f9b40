"""Pages of the site, made of the Markdown files of the repository.

The files are written for GitHub. Here their links are rewritten for the site, comments are taken out,
and the table of contents is read from `docs/README.md`: each of its headings with a table of links is a
part of the navigation. A new page is one row of such a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

import notebooks

ROOT = Path(__file__).resolve().parents[2]

INDEX = "docs/README.md"

NOTEBOOKS = "examples/notebooks"

# Pages outside of docs/, with their names on the site.
OTHERS = {
    "README.md": "readme",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "SECURITY.md": "security",
    "adapters/README.md": "adapters",
    "examples/README.md": "examples",
    "examples/benchmarks/RESULTS.md": "benchmarks",
}

LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s]+)(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
ROW = re.compile(r"^\| \[(?P<title>.+?)\]\((?P<link>[^)\s]+)\) \|", re.MULTILINE)
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)

LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".yml": "yaml", ".cff": "yaml"}


def pages(root: Path = ROOT) -> dict[str, str]:
    """The Markdown files and notebooks, by their path in the repository; the values are names on the site."""
    own = {f"docs/{path.name}": path.stem for path in sorted((root / "docs").glob("*.md"))}
    found = sorted((root / NOTEBOOKS).glob("*.py"))
    scripts = {f"{NOTEBOOKS}/{path.name}": f"notebook-{path.stem}" for path in found}
    return {**own, INDEX: "index", **OTHERS, **scripts}


def parts(index: str) -> dict[str, list[tuple[str, str]]]:
    """The navigation: headings of the index, each with the titles and links of its table.

    Example:
        >>> parts("## Start\\n| [First steps](start.md) | five minutes |\\n## Words\\n| a | b |")
        {'Start': [('First steps', 'start.md')]}
    """
    _, *pieces = HEADING.split(index)
    found = {
        title: [(row["title"], row["link"]) for row in ROW.finditer(text)]
        for title, text in zip(pieces[::2], pieces[1::2], strict=True)
    }
    return {title: rows for title, rows in found.items() if rows}


def stage(
    folder: Path, run: Callable[[Path], Any] = notebooks.read, root: Path = ROOT
) -> dict[str, str]:
    """Writes all pages to a folder, as they are for the site, and returns their texts by name.

    Arguments:
        folder: The folder, which exists.
        run: Returns a notebook, with its outputs if it is run.
        root: The root of the repository.
    """
    names, texts = pages(root), {}
    linked: set[str] = set()
    for path, name in names.items():
        if path.endswith(".py"):
            text = _notebook(run(root / path), name, folder)
        else:
            text = (root / path).read_text(encoding="utf-8")
        texts[name], targets = for_site(text, path, names, root)
        linked |= targets
    index = (root / INDEX).read_text(encoding="utf-8")
    written = {**texts, "index": texts["index"] + contents(index, names)}
    for name, text in written.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    for path in sorted(linked):
        _copy(root / path, folder / _place(path))
    return texts


def for_site(
    text: str, path: str, names: dict[str, str], root: Path = ROOT
) -> tuple[str, set[str]]:
    """A page with links for the site, without comments, and the other files that it links to.

    Arguments:
        text: The page.
        path: Its path in the repository.
        names: Names on the site of all pages, by their path.
        root: The root of the repository.
    """
    linked: set[str] = set()

    def rewritten(match: re.Match[str]) -> str:
        file, hash_, anchor = match[1].partition("#")
        if not file:
            return match[1]
        target = normpath(join(dirname(path), file))
        if (root / target).is_dir():
            target = join(target, "README.md")
        if target in names:
            return f"{names[target]}.md{hash_}{anchor}"
        if not (root / target).exists():
            raise FileNotFoundError(f"{path} links to {match[1]}, which does not exist.")
        linked.add(target)
        return _place(target)

    text = COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    pieces = FENCE.split(text)
    pieces[::2] = [LINK.sub(rewritten, piece) for piece in pieces[::2]]
    page = "".join(pieces)
    return page.replace("](made:", f"](pictures/{names[path]}-"), linked


def _notebook(notebook: Any, name: str, folder: Path) -> str:  # noqa: ANN401 (of nbformat)
    """The page of a notebook; its pictures and its file for Jupyter are written beside it."""
    text, pictures = notebooks.page(notebook, name)
    (folder / "pictures").mkdir(exist_ok=True)
    for file, data in pictures.items():
        (folder / "pictures" / f"{name}-{file}").write_bytes(data)
    whole = json.dumps(notebook, indent=1, ensure_ascii=False)
    (folder / f"{name}.ipynb").write_text(f"{whole}\n", encoding="utf-8")
    return text


def contents(index: str, names: dict[str, str]) -> str:
    """The table of contents of the site, for the end of its first page."""
    parts_ = {
        title: [(label, link) for label, link in rows if "#" not in link]
        for title, rows in parts(index).items()
    }
    trees = [
        "\n".join([f"{label} <{_name(link, names)}>" for label, link in rows])
        for rows in parts_.values()
    ]
    options = [f":hidden:\n:caption: {title}\n" for title in parts_]
    trees, options = [*trees, "api/index"], [*options, ":hidden:\n:caption: Reference\n"]
    return "".join(
        f"\n\n```{{toctree}}\n{option}\n{tree}\n```\n"
        for option, tree in zip(options, trees, strict=True)
    )


def _name(link: str, names: dict[str, str]) -> str:
    target = normpath(join(dirname(INDEX), link))
    if target not in names:
        raise KeyError(f"{INDEX} lists {link}, which is no page of the site.")
    return names[target]


def _place(path: str) -> str:
    """The place on the site of a file that is no page: pictures as they are, texts as a page."""
    if Path(path).suffix in (".png", ".svg", ".gif"):
        return f"pictures/{path.replace('/', '-')}"
    return f"files/{path.replace('/', '-')}.md"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix != ".md":
        target.write_bytes(source.read_bytes())
        return
    title = relpath(source, ROOT)
    language = LANGUAGES.get(source.suffix, "text")
    body = source.read_text(encoding="utf-8")
    page = f"---\norphan: true\nnosearch: true\n---\n\n# `{title}`\n\n````{{code-block}} {language}\n{body}\n````\n"
    target.write_text(page, encoding="utf-8")
