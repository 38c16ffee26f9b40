"""Notebooks of the site: run by Jupyter's own client, as pages and as files for Jupyter.

A notebook is a script in the percent format of jupytext. Its outputs are kept until the notebook or the package
changes. A notebook whose first code cell finds a package or data missing has a page without outputs; any other
error fails the build.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".notebooks"  # what former runs left
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
MISSING = {"ImportError", "ModuleNotFoundError", "FileNotFoundError"}
PICTURES = {"image/png": "png", "image/gif": "gif"}


def read(path: Path) -> NotebookNode:
    """The notebook as it is written, without outputs."""
    import jupytext

    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata["kernelspec"] = KERNEL
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # instead of a random one
    return notebook


def run(path: Path) -> NotebookNode:
    """The notebook with its outputs, run in a folder of its own, or as an equal run left it.

    If something is missing, the notebook has no outputs, and `missing` of its metadata says what.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    kept = KEPT / f"{path.stem}-{_fingerprint(path)}.ipynb"
    if kept.exists():
        return nbformat.read(kept, as_version=4)
    notebook = read(path)
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=None, record_timing=False, resources=place)
        client.extra_arguments = ["--IPKernelApp.log_level=ERROR"]
        try:
            client.execute(env=_environment())
        except CellExecutionError as error:
            if not _is_missing(error, notebook):
                raise RuntimeError(f"{path.name} failed:\n{error}") from None
            notebook = read(path)
            notebook.metadata["missing"] = error.evalue.splitlines()[0].rstrip(".")
            return notebook
    for cell in _code(notebook):
        cell.outputs = [it for it in cell.outputs if it.get("name") != "stderr"]
    KEPT.mkdir(exist_ok=True)
    for former in KEPT.glob(f"{path.stem}-*"):
        former.unlink()
    nbformat.write(notebook, kept)
    return notebook


def page(notebook: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """The notebook as a Markdown page, and the pictures that are `made:FILE` on it, by their names.

    Arguments:
        notebook: The notebook.
        name: Name of its file for Jupyter, without the ending.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        is_code = cell.cell_type == "code"
        parts.append(f"```python\n{cell.source}\n```" if is_code else cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text")})
            if kind := next((kind for kind in PICTURES if kind in data), None):
                file = f"output-{len(pictures)}.{PICTURES[kind]}"
                pictures[file] = base64.b64decode(data[kind])
                parts.append(f"![Output of the code above](made:{file})")
            else:
                parts.append(f"```text\n{data['text/plain'].rstrip()}\n```")
    note = [f"This page is a notebook: {{download}}`download it for Jupyter <{name}.ipynb>`."]
    if missing := notebook.metadata.get("missing"):
        note.append(f"*This page was built without outputs: {missing}.*")
    title, _, body = parts[0].partition("\n")
    return "\n\n".join([title, *note, body.strip(), *parts[1:]]) + "\n", pictures


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _is_missing(error: Exception, notebook: NotebookNode) -> bool:
    """Whether the first code cell did not find data, or a package that is not ours."""
    is_first = any(it.output_type == "error" for it in _code(notebook)[0].outputs)
    return is_first and error.ename in MISSING and "'ncprior" not in error.evalue


def _fingerprint(path: Path) -> str:
    """Changes with the notebook, with this file and with the package."""
    code = [*sorted((ROOT / "ncprior").rglob("*.py")), *sorted((ROOT / "adapters").rglob("*.py"))]
    digest = hashlib.sha256()
    for file in (path, Path(__file__), *code):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _environment() -> dict[str, str]:
    there = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, there))}
