"""The README keeps its word: its snippets run, and its two commands are the ones CI runs."""

import re
import subprocess
from pathlib import Path

import pytest

from ncprior import fit

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

COMMANDS = (
    "pip install -c constraints.txt -e '.[demo]' && ncprior demo",
    "pip install -c constraints.txt -e '.[test]' && pytest",
)


def blocks(text: str) -> list[tuple[int, str]]:
    """The snippets of a page, each with the number of lines above it.

    A snippet is a ```python block, or a comment `<!-- test-setup ... -->` with what the page
    takes as given, such as the reader's own VAE.
    """
    fences = r"^```python\n(?P<snippet>.*?)^```$|^<!-- test-setup\n(?P<setup>.*?)^-->$"
    found = re.finditer(fences, text, re.MULTILINE | re.DOTALL)
    return [
        (text.count("\n", 0, match.start()) + 1, match["snippet"] or match["setup"])
        for match in found
    ]


def run(text: str, name: str) -> dict[str, object]:
    """Runs the snippets in order, in one namespace; a traceback shows the page's own lines."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for above, code in blocks(text):
        exec(compile("\n" * above + code, name, "exec"), namespace)  # noqa: S102 (our own page)
    return namespace


@pytest.mark.parametrize("page", ["README.md", "adapters/README.md"])
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    snippets = text.count("```python") + text.count("<!-- test-setup")
    assert len(blocks(text)) == snippets  # none is missed for the way it is indented or closed
    monkeypatch.chdir(tmp_path)
    assert fit.__kwdefaults__ is not None
    monkeypatch.setitem(fit.__kwdefaults__, "steps", 300)  # the page trains for minutes
    run(text, str(ROOT / page))


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


def test_linked_files_are_there() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", README)
    assert not (missing := [link for link in links if not (ROOT / link).exists()]), missing


def test_the_runner_of_snippets_runs_them() -> None:
    page = """
<!-- test-setup
a = 1
-->
```python
b = a + 1
```
```bash
not python
```
```python
assert b == 3, b
```
"""
    with pytest.raises(AssertionError, match="2"):
        run(page, "page")
    assert [above for above, _ in blocks(page)] == [2, 5, 11]
