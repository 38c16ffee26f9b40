"""The documentation site: pages are staged, links are rewritten and checked; with --slow it is built."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a file of docs/site by its name, as the build does."""
    names: list[str] = []

    def tool(name: str) -> ModuleType:
        names.append(name)
        return importlib.import_module(name)

    monkeypatch.syspath_prepend(str(SITE))
    yield tool
    for name in ("api", "stage", "notebooks", "links", "llms", "build"):
        sys.modules.pop(name, None)


def test_every_page_is_in_the_navigation(tools: Any) -> None:
    stage = tools("stage")
    index = (ROOT / stage.INDEX).read_text(encoding="utf-8")
    names = stage.pages()
    listed = stage.contents(index, names)
    missing = [name for name in names.values() if f"<{name}>" not in listed and name != "index"]
    assert not missing, f"Add a row to a table of docs/README.md for {missing}."


def test_a_new_page_is_one_row(tools: Any) -> None:
    stage = tools("stage")
    index = "# A\n## Start\n| page | content |\n|---|---|\n| [New](new.md) | it |\n## Words\n| a | b |\n"
    assert stage.parts(index) == {"Start": [("New", "new.md")]}
    listed = stage.contents(index, {"docs/new.md": "new"})
    assert ":caption: Start" in listed and "New <new>" in listed
    with pytest.raises(KeyError, match="lists new.md, which is no page"):
        stage.contents(index, {})


def test_links_are_rewritten_for_the_site(tools: Any) -> None:
    stage = tools("stage")
    names = stage.pages()
    text = """[a](../README.md#results) [b](bases.md) [c](#here) [d](https://x.y/z.md) [e](../examples/)
<!-- test-setup
x = 1
-->
![f](../examples/images/demo-samples.png) [g](../examples/vaebm.py)
```python
table[0](bases.md)
```
"""
    page, linked = stage.for_site(text, "docs/samplers.md", names)
    first = page.splitlines()[0]
    assert first == (
        "[a](readme.md#results) [b](bases.md) [c](#here) [d](https://x.y/z.md) [e](examples.md)"
    )
    assert (
        "![f](pictures/examples-images-demo-samples.png) [g](files/examples-vaebm.py.md)" in page
    )
    assert "test-setup" not in page and page.count("\n") == text.count("\n")
    assert "table[0](bases.md)" in page
    assert linked == {"examples/images/demo-samples.png", "examples/vaebm.py"}
    with pytest.raises(FileNotFoundError, match=r"docs/a.md links to no.md, which does not exist"):
        stage.for_site("[x](no.md)", "docs/a.md", names)


def test_all_pages_are_staged(tools: Any, tmp_path: Path) -> None:
    pytest.importorskip("jupytext", reason="needs the extra [docs]")
    stage = tools("stage")
    texts = stage.stage(tmp_path)
    assert set(texts) == set(stage.pages().values())
    assert "{toctree}" in (tmp_path / "index.md").read_text() and "{toctree}" not in texts["index"]
    assert "(start.md)" in texts["notebook-digits"]
    assert (tmp_path / "notebook-digits.ipynb").exists()
    code = (tmp_path / "files" / "examples-vaebm.py.md").read_text()
    assert code.startswith("---\norphan: true") and "{code-block} python" in code


def test_the_reference_has_every_public_name_once(tools: Any) -> None:
    api = tools("api")
    modules = api.faces()
    assert {"ncprior", "ncprior.bases", "ncprior.jobs", "ncprior.adapters.nvae"} <= set(modules)
    pages = {module: api.page(module) for module in modules}
    for module, page in pages.items():
        for name in api.public(module):
            own = f":: {name}\n" in page
            elsewhere = f".{name}>`" in page
            assert own != elsewhere, f"{module}.{name}"
    assert ".. autofunction:: sir\n" in pages["ncprior"]
    assert ":obj:`sir <ncprior.sir>`" in pages["ncprior.samplers"]
    assert "   .. automethod:: save_pretrained\n" in pages["ncprior"]
    assert ".. autoclass:: VAE\n" in pages["ncprior.adapters.rae"]  # not the VAE of the demo


def test_bad_pages_of_a_site_are_noticed(tools: Any, tmp_path: Path) -> None:
    links = tools("links")
    assert links.problems(tmp_path) == [f"{tmp_path} has no HTML page."]
    (tmp_path / "a.html").write_text(
        """<h1 id="top">A</h1><a href="b.html#here">b</a><a href="#top">t</a><a href="https://x.y">w</a>
        <code>``kept``</code><img src="p.png"><link rel="stylesheet" href="s.css">"""
    )
    (tmp_path / "b.html").write_text('<p id="here">B</p><a href="a.html">a</a>')
    (tmp_path / "p.png").touch()
    (tmp_path / "s.css").write_text("a { src: url(p.png) url(data:x) }")
    assert links.problems(tmp_path) == []
    (tmp_path / "b.html").write_text(
        """<a href="a.html#no">a</a><a href="no.html">n</a><script src="https://cdn.x/y.js"></script>
        <p>See :func:`fit` and ``x``.</p>"""
    )
    (tmp_path / "s.css").write_text("a { src: url(https://x.y/f.woff) url('no.woff') }")
    found = sorted(links.problems(tmp_path))
    assert found == [
        "a.html links to b.html#here",
        "b.html links to a.html#no",
        "b.html links to no.html",
        "b.html loads https://cdn.x/y.js",
        "b.html shows raw markup: :func:`",
        "b.html shows raw markup: ``",
        "b.html shows raw markup: ``",
        "s.css loads https://x.y/f.woff",
        "s.css loads no.woff",
    ]


def test_the_map_for_language_models(tools: Any, tmp_path: Path) -> None:
    stage, llms = tools("stage"), tools("llms")
    index = (ROOT / stage.INDEX).read_text(encoding="utf-8")
    names = stage.pages()
    texts = {name: f"# {name}\n\n\n\nText." for name in names.values()}
    (tmp_path / "api").mkdir()
    llms.write(tmp_path, index, names, texts)
    short = (tmp_path / "llms.txt").read_text()
    assert short.startswith("# ncprior\n\n> ") and "\n## How to\n" in short
    assert "- [Choose a base](bases.md): base priors closer" in short
    assert "(llms-full.txt)" in short
    full = (tmp_path / "llms-full.txt").read_text()
    assert "# readme" in full and "# verdicts" in full and "# changelog" not in full
    assert (tmp_path / "bases.md").read_text() == "# bases\n\nText."
    assert "- [ncprior.bases](api/ncprior.bases.md): Base priors, fitted" in short
    reference = (tmp_path / "api" / "ncprior.md").read_text()
    assert "## ncprior.fit(prior: NCPrior, data: Any, *, " in reference
    assert "settings: FitSettings = FitSettings())" in reference
    assert "### NCPrior.save_pretrained(self, directory" in reference
    assert "## ncprior.Sample(x: Tensor, latents: tuple[Tensor, ...], draws: " in reference


def test_other_folders_are_not_overwritten(tools: Any, tmp_path: Path) -> None:
    build = tools("build")
    (tmp_path / "mine.txt").touch()
    pytest.importorskip("sphinx", reason="needs the extra [docs]")
    with pytest.raises(SystemExit, match="has other files"):
        build.build(tmp_path)


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs the extra [docs]")
    pytest.importorskip("furo", reason="needs the extra [docs]")
    command = [sys.executable, str(SITE / "build.py"), str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "api" / "ncprior.html").read_text()
    assert 'id="ncprior.improve"' in page and "<math" in page
