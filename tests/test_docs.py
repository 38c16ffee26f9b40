"""The pages are correct: snippets run, imports are public, links lead somewhere, commands are CI's."""

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.reports import improvement

import ncprior
from ncprior import fit, training
from ncprior.diagnostics import Verdict
from ncprior.recipe import judge

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "adapters/README.md", "examples/README.md"),
    *("examples/benchmarks/RESULTS.md",),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("examples/**/*.py"))]

COMMANDS = (
    "pip install -c constraints.txt '.[demo]' && ncprior demo",
    "pip install -c constraints.txt -e '.[test]' && pytest",
)


def blocks(text: str) -> list[tuple[int, str]]:
    """The snippets of a page, each with the number of lines above it.

    A snippet is a ```python block, or a comment `<!-- test-setup ... -->` with code that the page
    assumes, such as the reader's own VAE.
    """
    fences = r"^```python\n(?P<snippet>.*?)^```$|^<!-- test-setup\n(?P<setup>.*?)^-->$"
    found = re.finditer(fences, text, re.MULTILINE | re.DOTALL)
    return [
        (text.count("\n", 0, match.start()) + 1, match["snippet"] or match["setup"])
        for match in found
    ]


def run(text: str, name: str, namespace: dict[str, object] | None = None) -> dict[str, object]:
    """Runs the snippets in order, in one namespace; a traceback shows the page's own lines."""
    names: dict[str, object] = {"__name__": "__main__", **(namespace or {})}
    for above, code in blocks(text):
        exec(compile("\n" * above + code, name, "exec"), names)  # noqa: S102 (our own page)
    return names


def first_snippets(text: str, count: int) -> str:
    """A page up to the end of its first ```python blocks."""
    end = 0
    for _ in range(count):
        end = text.index("```\n", text.index("```python\n", end) + 3) + 4
    return text[:end]


def briefly(prior: Any, data: Any, **options: Any) -> Any:
    """A fit of few steps: the pages train for minutes."""
    steps = min(options.pop("steps", 40), 40)
    return fit(prior, data, steps=steps, **options)


def improved_briefly(source: Any, data: Any, **_: Any) -> ncprior.NCPrior:
    """The prior of `improve` after a few steps, with a report made by hand."""
    prior = ncprior.NCPrior.for_source(source, data[:256])
    briefly(prior, data)
    prior.sampler, prior.report = partial(ncprior.sir, num_proposals=50), improvement()
    return prior


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(TEXTS[page])])
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page with the mark `<!-- test-after README.md -->` continues from its first two snippets."""
    text = TEXTS[page]
    snippets = text.count("```python") + text.count("<!-- test-setup")
    assert len(blocks(text)) == snippets  # none is missed for the way it is indented or closed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ncprior, "fit", briefly)
    monkeypatch.setattr(ncprior, "improve", improved_briefly)
    monkeypatch.setattr(judge, "_STEPS", 50)
    monkeypatch.setattr(training, "fit_encoder", partial(training.fit_encoder, steps=20))
    namespace: dict[str, object] = {}
    if "<!-- test-after README.md -->" in text:
        namespace = run(first_snippets(README, 2), str(ROOT / "README.md"))
    run(text, str(ROOT / page), namespace)


def hidden_imports(text: str) -> set[str]:
    """Names that visible snippets use, and that only a hidden setup imports."""
    found: dict[str, set[str]] = {"hidden": set(), "shown": set(), "used": set()}
    hidden = {
        above for above, _ in blocks(re.sub(r"^```python$", "```py", text, flags=re.MULTILINE))
    }
    for above, code in blocks(text):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
                found["hidden" if above in hidden else "shown"] |= names
            elif isinstance(node, ast.Name) and above not in hidden:
                found["used"].add(node.id)
    return found["hidden"] & found["used"] - found["shown"]


@pytest.mark.parametrize("page", PAGES)
def test_readers_see_the_imports_that_snippets_need(page: str) -> None:
    assert not hidden_imports(TEXTS[page])


def test_hidden_imports_are_noticed() -> None:
    page = "<!-- test-setup\nimport torch\nimport math\n-->\n```python\ntorch.ones(1)\n```\n"
    assert hidden_imports(page) == {"torch"}
    assert not hidden_imports(page.replace("torch.ones", "import torch\ntorch.ones"))


def test_the_runner_of_snippets_runs_them() -> None:
    page = """
<!-- test-setup
a = 1
-->
```python
b = a + c
```
```bash
not python
```
```python
assert b == 3, b
```
"""
    with pytest.raises(AssertionError, match="2"):
        run(page, "page", {"c": 1})
    assert run(first_snippets(page, 1), "page", {"c": 1})["b"] == 2
    assert [above for above, _ in blocks(page)] == [2, 5, 11]


def is_face(name: str) -> bool:
    """Whether users may import from a module: the package, a folder, a top file, an adapter."""
    parts = name.split(".")
    allowed = 3 if parts[:2] == ["ncprior", "adapters"] else 2
    return len(parts) <= allowed and not any(part.startswith("_") for part in parts)


def is_public(module: str, name: str) -> bool:
    """Whether a name is listed by its face, or defined in a face that has no list."""
    found = importlib.import_module(module)
    if name.startswith("_") and name != "__version__":
        return False
    return name in found.__all__ if hasattr(found, "__all__") else hasattr(found, name)


def ours(code: str) -> Iterator[tuple[str, str | None]]:
    """The imports of this package in a piece of code: modules, and names where they are given."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ncprior":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.split(".")[0] == "ncprior")


def private_imports(code: str) -> list[str]:
    """Imports that are deeper than a face, or of names that the face does not list."""
    return [
        f"{module}: {name}"
        for module, name in ours(code)
        if not is_face(module) or (name is not None and not is_public(module, name))
    ]


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS])
def test_imports_are_public(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    codes = [code for _, code in blocks(text)] if path.endswith(".md") else [text]
    assert not (private := [found for code in codes for found in private_imports(code)]), private


def test_private_imports_are_noticed() -> None:
    code = """
from ncprior import sir, NCPrior
from ncprior.samplers import tempered_smc
from ncprior.adapters.nvae import NVAESource
from ncprior.source import sample_posterior
def main():
    import ncprior.samplers.sir
    from ncprior.samplers.smc import tempered_smc
    from ncprior.adapters.nvae.source import NVAESource
    from ncprior.samplers import _chunks
    from ncprior import nonsense
"""
    assert private_imports(code) == [
        "ncprior.samplers.sir: None",
        "ncprior.samplers.smc: tempered_smc",
        "ncprior.adapters.nvae.source: NVAESource",
        "ncprior.samplers: _chunks",
        "ncprior: nonsense",
    ]


def is_there(name: str) -> bool:
    """Whether a dotted name, such as `ncprior.samplers.sir`, is a face or a public name of one."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    module = next(prefix for prefix in prefixes if is_face(prefix) and is_module(prefix))
    rest = name[len(module) + 1 :].split(".") if name != module else []
    if rest and not is_public(module, rest[0]):
        return False
    found = importlib.import_module(module)
    for part in rest:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CONTRIBUTING.md"])
def test_names_in_the_prose_exist(page: str) -> None:
    names = set(re.findall(r"`[^`\n]*?\b(ncprior(?:\.[A-Za-z_]\w*)+)", TEXTS[page]))
    names -= {name for name in names if name.endswith((".safetensors", ".json", ".py"))}
    assert not (missing := sorted(name for name in names if not is_there(name))), missing


def test_missing_names_are_noticed() -> None:
    assert is_there("ncprior.samplers.sir") and is_there("ncprior.fit")
    assert is_there("ncprior.bases.GaussianMixture.from_sklearn")
    assert not is_there("ncprior.samplers.smc.tempered_smc")
    assert not is_there("ncprior.samplers.nonsense") and not is_there("ncprior.nonsense")


def headings(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: str, text: str) -> list[str]:
    """Relative links of a page to files or headings that do not exist."""
    dead = []
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        path = (ROOT / page).parent / file
        if not path.exists():
            dead.append(link)
        elif anchor:
            target = path.read_text(encoding="utf-8") if file else text
            dead += [link] if anchor not in headings(target) else []
    return dead


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert not (dead := dead_links(page, TEXTS[page])), dead


def test_dead_links_are_noticed() -> None:
    text = """# A `b`: c-d?
[x](docs/README.md) [x](#a-b-c-d) [x](docs/README.md#the-api-at-a-glance) [x](https://no.where)
[x](docs/nothing.md) [x](#nothing) ![x](docs/README.md#nothing)
```bash
# comment
```
[x](#comment)
"""
    expected = ["docs/nothing.md", "#nothing", "docs/README.md#nothing", "#comment"]
    assert dead_links("README.md", text) == expected


def test_every_page_of_the_docs_is_listed() -> None:
    """The index is the table of contents of the site, too: docs/site/stage.py reads it."""
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"]({page.removeprefix('docs/')}) |" in TEXTS["docs/README.md"]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200
    (table,) = re.findall(r"<!-- table .*?<!-- end -->", README, re.DOTALL)
    assert len(re.findall(r"^\| ", table, re.MULTILINE)) <= 11  # a title and ten rows


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_in_plain_english(page: str) -> None:
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\blaws?\b|\brefus\w+", text)
    found += re.findall(r"(?:^|[.:!?*] )(Of\b.*)$", text, re.MULTILINE)
    assert not found, found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands_are_there(command: str) -> None:
    lines = [line for line in README.splitlines() if command in line]
    assert len(lines) == 1, f"README.md must have one line with {command!r}."


@pytest.mark.parametrize("command", COMMANDS)
def test_ci_runs_the_readme_command(command: str) -> None:
    script = (ROOT / ".ci" / "run").read_text()
    (reader,) = re.findall(r"^line=\$\((.*)\)$", script, re.MULTILINE)
    end = command.rpartition(" && ")[2]
    done = subprocess.run(
        ["bash", "-c", f"end={end!r}; {reader}"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == command, done.stderr


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["version"] == ncprior.__version__
    assert citation["license"] == "Apache-2.0"
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()


def test_every_verdict_has_a_section() -> None:
    sections = re.findall(r"^## (.*)$", TEXTS["docs/verdicts.md"], re.MULTILINE)
    assert sections == [str(verdict) for verdict in Verdict]


def test_paths_in_the_guide_for_contributors_exist() -> None:
    text = TEXTS["CONTRIBUTING.md"]
    paths = set(re.findall(r"\b(?:tests|ncprior|adapters|examples|docs)/[\w./]*\w/?", text))
    assert paths
    assert not (missing := sorted(path for path in paths if not (ROOT / path).exists())), missing


def test_both_maps_of_the_house_show_every_room() -> None:
    paths = [p for p in (ROOT / "ncprior").iterdir() if p.suffix in ("", ".py")]
    rooms = {p.stem: p for p in paths if not p.stem.startswith("_")}
    assert len(rooms) > 15
    for room, path in rooms.items():
        assert f"\n``{room}``" in (ncprior.__doc__ or ""), room
        entry = f"`ncprior/{path.name}{'' if path.suffix else '/'}`"
        assert room == "adapters" or entry in TEXTS["CONTRIBUTING.md"], entry
