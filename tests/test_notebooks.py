"""Notebooks of the site: cells, outputs, pages; with --slow they are run."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

for name in ("jupytext", "nbclient", "ipykernel"):
    pytest.importorskip(name, reason="needs the extra [docs]")

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))

SCRIPT = """# %% [markdown]
# # Title
#
# A *text*.

# %%
import sys

x = 1
x + 1

# %%
class Picture:
    def _repr_mimebundle_(self, **options):
        return {"image/png": "cG5n", "text/plain": "a picture"}


print("printed")
print("a warning", file=sys.stderr)
Picture()
"""


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The module, with a cache of its own."""
    monkeypatch.syspath_prepend(str(SITE))
    module = importlib.import_module("notebooks")
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    yield module
    sys.modules.pop("notebooks", None)


def run(notebooks: ModuleType, folder: Path, script: str) -> Any:
    path = folder / "name.py"
    path.write_text(script)
    return notebooks.run(path)


def test_a_notebook_is_run_once_and_shows_its_outputs(
    notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(notebooks, tmp_path, SCRIPT)
    page, pictures = notebooks.page(ran, "notebook-name")
    assert page.startswith(
        "# Title\n\nThis page is a notebook: {download}`download it for Jupyter <notebook-name.ipynb>`"
    )
    assert ".\n\nA *text*.\n\n```python\nimport sys" in page
    assert "x + 1\n```\n\n```text\n2\n```" in page
    assert page.endswith(
        "```text\nprinted\n```\n\n![Output of the code above](made:output-0.png)\n"
    )
    assert pictures == {"output-0.png": b"png"} and "stderr" not in str(ran.cells[2].outputs)
    assert [cell.id for cell in ran.cells] == ["cell-0", "cell-1", "cell-2"]
    monkeypatch.setattr("nbclient.NotebookClient", None)
    assert run(notebooks, tmp_path, SCRIPT) == ran  # from the cache


def test_only_the_outputs_of_the_present_notebook_are_kept(
    notebooks: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "name-0.ipynb").touch()
    (tmp_path / "kept" / "other-0.ipynb").touch()
    run(notebooks, tmp_path, SCRIPT)
    assert len(list((tmp_path / "kept").glob("name-*"))) == 1
    assert (tmp_path / "kept" / "other-0.ipynb").exists()


@pytest.mark.parametrize("line", ["import no_such_package", "open('no-such-file')"])
def test_without_its_packages_or_data_a_page_has_no_outputs(
    notebooks: ModuleType, tmp_path: Path, line: str
) -> None:
    ran = run(notebooks, tmp_path, SCRIPT.replace("x = 1", line, 1))
    page, pictures = notebooks.page(ran, "name")
    assert "\n\n*This page was built without outputs: " in page and "no" in ran.metadata.missing
    assert not pictures and "```text" not in page and not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x = 1", "from ncprior import no_such_name"),  # a mistake of ours
        ("x = 1", "x = 1 / 0"),
        ('print("printed")', "import no_such_package"),  # not in the first cell
    ],
)
def test_any_other_error_fails_the_build(
    notebooks: ModuleType, tmp_path: Path, old: str, new: str
) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)name\.py failed:\n.*Error"):
        run(notebooks, tmp_path, SCRIPT.replace(old, new, 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_begin_with_a_title_and_their_needs(notebooks: ModuleType, path: Path) -> None:
    first, second, *_ = cells = notebooks.read(path).cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "on one core" in first.source
    assert second.source.startswith("%matplotlib inline\n") and "import torch" in second.source
    texts = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "../../" in texts  # where to read on


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebooks: ModuleType, path: Path) -> None:
    ran = notebooks.run(path)
    if "missing" in ran.metadata:
        pytest.skip(ran.metadata.missing)
    _, pictures = notebooks.page(ran, path.stem)
    assert pictures and sum(map(len, pictures.values())) < 1_000_000
