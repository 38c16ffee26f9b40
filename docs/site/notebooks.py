"""Notebooks of `examples/notebooks`: scripts with cells, run once, as pages and as Jupyter files.

A notebook is a Python script in the *percent* format that Jupyter (by jupytext), VS Code and PyCharm open:
`# %% [markdown]` begins a text, `# %%` begins code. The value of the last line of a cell is shown. A picture
that the script has written is shown by a text that links to it. A notebook whose first code cell finds a package or
data missing has a page without outputs; any other error fails the build.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple

MARK = re.compile(r"^# %%(?: \[(markdown)\])?.*\n", re.MULTILINE)
PICTURE = re.compile(r"(!\[[^\]]*\]\()([\w-]+\.(?:png|gif))\)")  # in the folder of the notebook
ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".notebooks"  # what former runs left


class Cell(NamedTuple):
    """A text in Markdown, or code."""

    is_text: bool
    source: str


class Ran(NamedTuple):
    """What a run left: printed text and pictures (file names) per code cell, or what is missing."""

    outputs: list[tuple[str, list[str]]]
    files: dict[str, bytes]
    missing: str = ""


def cells(script: str) -> list[Cell]:
    """The cells of a script; what stands above the first mark, such as its docstring, is left out.

    Example:
        >>> cells("# %% [markdown]\\n# # Title\\n# %%\\nx = 1\\n")
        [Cell(is_text=True, source='# Title'), Cell(is_text=False, source='x = 1')]
    """
    _, *pieces = MARK.split(script)
    found = []
    for kind, source in zip(pieces[::2], pieces[1::2], strict=True):
        if kind:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        found.append(Cell(bool(kind), source.strip("\n")))
    return found


def run(path: Path) -> Ran:
    """Runs a notebook in a process and a folder of its own, or reads what an equal run left."""
    kept = KEPT / f"{path.stem}-{_fingerprint(path)}"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, str(path.resolve()), scratch]
            done = subprocess.run(
                command,
                cwd=scratch,
                env=_environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{path.name} failed:\n{done.stderr[-3000:]}")
            ran = _read(Path(scratch))
            if ran.missing:
                return ran
            for former in KEPT.glob(f"{path.stem}-*"):
                shutil.rmtree(former)
            kept.mkdir(parents=True)
            for name, data in ran.files.items():
                (kept / name).write_bytes(data)
            (kept / "outputs.json").write_text(json.dumps(ran.outputs), encoding="utf-8")
    return _read(kept)


def not_run(path: Path) -> Ran:
    """A notebook without outputs, for tests of its page."""
    return Ran([], {}, "it was not asked to run")


def page(script: str, name: str, ran: Ran) -> str:
    """The notebook as a Markdown page; its pictures are `made:FILE`, and its download is `name`.ipynb."""

    def shown(link: re.Match[str]) -> str:
        return f"{link[1]}made:{link[2]})" if link[2] in ran.files else ""

    parts, code = [], 0
    for cell in cells(script):
        if cell.is_text:
            parts.append(PICTURE.sub(shown, cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        text, pictures = ran.outputs[code] if code < len(ran.outputs) else ("", [])
        parts += [f"```text\n{text.rstrip()}\n```"] if text.strip() else []
        parts += [f"![Output of the code above](made:{picture})" for picture in pictures]
        code += 1
    note = f"*This page was built without outputs: {ran.missing}.*" if ran.missing else ""
    get = f"This page is a notebook: {{download}}`download it for Jupyter <{name}.ipynb>`."
    title, *rest = parts
    head, _, body = title.partition("\n")
    return "\n\n".join(part for part in (head, get, note, body.strip(), *rest) if part) + "\n"


def jupyter(script: str, ran: Ran) -> str:
    """The notebook as a file for Jupyter, with its outputs."""
    found: list[dict[str, Any]] = []
    outputs = iter(ran.outputs)
    for number, cell in enumerate(cells(script)):
        made: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}, "source": cell.source}
        if cell.is_text:
            found.append({**made, "cell_type": "markdown"})
            continue
        text, pictures = next(outputs, ("", []))
        shown: list[dict[str, Any]] = []
        if text.strip():
            shown.append({"output_type": "stream", "name": "stdout", "text": text})
        for picture in pictures:
            data = {"image/png": base64.b64encode(ran.files[picture]).decode()}
            shown.append({"output_type": "display_data", "data": data, "metadata": {}})
        found.append({**made, "cell_type": "code", "execution_count": None, "outputs": shown})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = {
        "cells": found,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def execute(script: str, out: Path) -> None:
    """Runs all cells in this process, and writes outputs.json and the pictures to a folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs: list[tuple[str, list[str]]] = []
    for number, cell in enumerate(it for it in cells(script) if not it.is_text):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                value = _value(cell.source, names)
        except (ImportError, FileNotFoundError) as error:
            own = (getattr(error, "name", None) or "").split(".")[0] == "ncprior"
            if number or own:
                raise
            missing = str(error).splitlines()[0].rstrip(".")
            (out / "outputs.json").write_text(json.dumps({"missing": missing}), encoding="utf-8")
            return
        pictures = []
        if hasattr(value, "savefig"):
            pictures = [f"output-{number}.png"]
            value.savefig(out / pictures[0], dpi=110)
        elif value is not None:
            printed.write(f"{value!r}\n")
        outputs.append((printed.getvalue(), pictures))
    (out / "outputs.json").write_text(json.dumps(outputs), encoding="utf-8")


def _value(code: str, names: dict[str, Any]) -> Any:  # noqa: ANN401
    """Runs a cell and returns the value of its last line, if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)  # noqa: S102 (our own notebook)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def _read(folder: Path) -> Ran:
    found = json.loads((folder / "outputs.json").read_text(encoding="utf-8"))
    if isinstance(found, dict):
        return Ran([], {}, found["missing"])
    pictures = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".gif")]
    files = {path.name: path.read_bytes() for path in pictures}
    return Ran([(text, names) for text, names in found], files)


def _fingerprint(path: Path) -> str:
    """Changes with the notebook, with this file and with the package."""
    code = [*sorted((ROOT / "ncprior").rglob("*.py")), *sorted((ROOT / "adapters").rglob("*.py"))]
    digest = hashlib.sha256()
    for file in (path, Path(__file__), *code):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _environment() -> dict[str, str]:
    there = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, there)), "MPLBACKEND": "agg"}


if __name__ == "__main__":
    try:
        execute(Path(sys.argv[1]).read_text(encoding="utf-8"), Path(sys.argv[2]))
    except Exception:  # noqa: BLE001 (shown by the build)
        traceback.print_exc()
        raise SystemExit(1) from None
