"""Notebooks of the site: cells, outputs, pages; with --slow they are run."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))

SCRIPT = '''"""About it."""

# %% [markdown]
# # Title
#
# A *text*.
#
# ![a film](film.gif)

# %%
from pathlib import Path

x = 1
Path("film.gif").write_bytes(b"film")
x + 1

# %%
class Picture:
    def savefig(self, path, dpi):
        path.write_bytes(b"png")


print("printed")
Picture()
'''


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The module, with a cache of its own."""
    monkeypatch.syspath_prepend(str(SITE))
    module = importlib.import_module("notebooks")
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    yield module
    sys.modules.pop("notebooks", None)


def run(notebooks: ModuleType, folder: Path, script: str) -> object:
    path = folder / "name.py"
    path.write_text(script)
    return notebooks.run(path)


def test_a_notebook_is_run_once_and_shows_its_outputs(
    notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(notebooks, tmp_path, SCRIPT)
    assert ran == notebooks.Ran(
        [("2\n", []), ("printed\n", ["output-1.png"])],
        {"film.gif": b"film", "output-1.png": b"png"},
    )
    assert (tmp_path / "kept").exists() and not (tmp_path / "film.gif").exists()
    monkeypatch.setattr(notebooks, "subprocess", None)
    assert run(notebooks, tmp_path, SCRIPT) == ran  # from the cache
    monkeypatch.undo()
    monkeypatch.setattr(notebooks, "KEPT", tmp_path / "kept")
    run(notebooks, tmp_path, SCRIPT + "x\n")
    assert len(list((tmp_path / "kept").iterdir())) == 1  # that of the notebook as it is now
    page = notebooks.page(SCRIPT, "notebook-name", ran)
    assert page.startswith(
        "# Title\n\nThis page is a notebook: {download}`download it for Jupyter <notebook-name.ipynb>`"
    )
    assert "A *text*.\n\n![a film](made:film.gif)" in page and "About it" not in page
    assert "x + 1\n```\n\n```text\n2\n```" in page
    assert page.endswith(
        "```text\nprinted\n```\n\n![Output of the code above](made:output-1.png)\n"
    )


def test_a_file_for_jupyter_has_the_cells_and_outputs(
    notebooks: ModuleType, tmp_path: Path
) -> None:
    made = json.loads(notebooks.jupyter(SCRIPT, run(notebooks, tmp_path, SCRIPT)))
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    text, first, second = made["cells"]
    assert text["cell_type"] == "markdown" and text["source"].startswith("# Title\n\nA")
    assert first["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "2\n"}]
    assert second["outputs"][1]["data"] == {"image/png": "cG5n"}
    assert len({cell["id"] for cell in made["cells"]}) == 3


@pytest.mark.parametrize("line", ["import no_such_package", "open('no-such-file')"])
def test_without_its_packages_or_data_a_page_has_no_outputs(
    notebooks: ModuleType, tmp_path: Path, line: str
) -> None:
    script = SCRIPT.replace("x = 1", line, 1)
    ran = run(notebooks, tmp_path, script)
    assert not ran.outputs and "no" in ran.missing and not (tmp_path / "kept").exists()
    page = notebooks.page(script, "name", ran)
    assert f"*This page was built without outputs: {ran.missing}.*" in page
    assert "film.gif)" not in page and "```text" not in page


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
    first, second, *_ = notebooks.cells(path.read_text(encoding="utf-8"))
    assert first.is_text and first.source.startswith("# ") and "on one core" in first.source
    assert not second.is_text and "import torch" in second.source
    texts = "".join(cell.source for cell in notebooks.cells(path.read_text()) if cell.is_text)
    assert "../../" in texts  # where to read on


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebooks: ModuleType, path: Path) -> None:
    ran = notebooks.run(path)
    if ran.missing:
        pytest.skip(ran.missing)
    assert ran.files and sum(map(len, ran.files.values())) < 1_000_000
