"""Builds the documentation site, warnings as errors, and checks its links.

    pip install -c constraints.txt -e '.[docs,demo]'
    python docs/site/build.py site-html

The folder is made anew. The notebooks of `examples/notebooks` are run, which takes minutes; equal runs are kept in
`.notebooks/`. Nothing is fetched, neither by the build nor by the built pages, but what the notebooks read.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import api
import fonts
import links
import llms
import notebooks
import stage


def build(site: Path) -> list[str]:
    """Builds the site into a folder that is made anew, and returns its problems.

    Arguments:
        site: The folder; what a former build left there is removed.
    """
    from sphinx.cmd.build import build_main

    if site.exists() and not (site / "llms.txt").exists() and any(site.iterdir()):
        raise SystemExit(f"{site} has other files. Name a new folder, or one of a former build.")
    shutil.rmtree(site, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        pages = Path(scratch, "pages")
        pages.mkdir()
        texts = stage.stage(pages, notebooks.run)
        api.write(pages)
        options = ["--fail-on-warning", "--quiet", "--conf-dir", str(HERE)]
        options += ["--doctree-dir", str(Path(scratch, "doctrees"))]
        if build_main([*options, str(pages), str(site)]):
            return ["The build had warnings."]
    fonts.write(site / "_static")
    index = (stage.ROOT / stage.INDEX).read_text(encoding="utf-8")
    llms.write(site, index, stage.pages(), texts)
    (site / ".nojekyll").touch()  # GitHub Pages leaves out folders such as _static otherwise
    return links.problems(site)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit((__doc__ or "").strip())
    found = build(Path(sys.argv[1]))
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
