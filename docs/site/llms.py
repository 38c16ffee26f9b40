"""`llms.txt`, a map of the pages for language models, and `llms-full.txt`, all pages in one file."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath

import api
from stage import INDEX, parts

HEAD = """# ncprior

> A better prior for any pretrained VAE, without changing the VAE: noise contrastive priors (Aneja et al.,
> NeurIPS 2021) in PyTorch. `prior = ncprior.improve(source, x_train)`, then `prior.sample(64).x`.

Import from `ncprior`, `ncprior.<folder>` or `ncprior.adapters.<name>`, never deeper.
"""

MAP = "\nAll pages in one file, without the reference: [llms-full.txt](llms-full.txt).\n"

BLANKS = re.compile(r"\n{4,}")  # of comments that were taken out


def write(site: Path, index: str, names: dict[str, str], texts: dict[str, str]) -> None:
    """Writes both files, and the Markdown of every page and module beside its HTML.

    Arguments:
        site: The folder of the built site.
        index: The text of the index, as it is in the repository.
        names: Names on the site of all pages, by their path in the repository.
        texts: Markdown of all pages for the site, by their names.
    """
    lines, order = [HEAD + MAP], ["readme"]
    for title, rows in parts(index).items():
        lines.append(f"\n## {title}\n")
        for label, link in rows:
            name = names.get(normpath(join(dirname(INDEX), link)))
            if name is None:
                continue
            lines.append(f"- [{label}]({name}.md): {_says(index, link)}")
            order += [name] if name not in order else []
    lines.append("\n## Reference\n")
    for module in api.faces():
        lines.append(f"- [{module}](api/{module}.md): {api.first_sentence(module)}")
        (site / "api" / f"{module}.md").write_text(api.text(module), encoding="utf-8")
    (site / "llms.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    texts = {name: BLANKS.sub("\n\n", text) for name, text in texts.items()}
    for name, text in texts.items():
        (site / f"{name}.md").write_text(text, encoding="utf-8")
    short = [name for name in order if name not in ("changelog", "benchmarks", "contributing")]
    full = "\n\n".join(f"<!-- {name}.md -->\n{texts[name].strip()}" for name in short)
    (site / "llms-full.txt").write_text(f"{HEAD}\n{full}\n", encoding="utf-8")


def _says(index: str, link: str) -> str:
    """The description of a page, from its row in the index."""
    found = re.search(rf"\({re.escape(link)}\) \| (.+?) \|$", index, re.MULTILINE)
    return found[1] if found else ""
