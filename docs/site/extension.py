"""Sphinx: formulas as MathML, references to public names, and docstrings as they are written here."""

from __future__ import annotations

import pkgutil
import re
from typing import Any

import api
from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.writers.html5 import HTML5Translator

NAMES = {module: set(api.public(module)) for module in api.faces()}


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline, None), block_renderers=(block, None)
    )
    app.connect("missing-reference", resolve)
    app.connect("doctree-read", link_names)
    app.connect("doctree-read", our_headings)
    app.connect("autodoc-process-docstring", results_are_prose, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", escape_bars, priority=900)
    app.connect("autodoc-process-signature", short_signature)
    app.connect("object-description-transform", returns_together, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def mathml(formula: str, display: str) -> str:
    """A formula as MathML, with a space behind the names of functions, such as log."""
    text = convert(formula, display=display)
    return re.sub(
        r"(<mi>(?:log|exp|sin|cos|max|min)</mi>)(?!<mo[^>]*>(?:\(|\[|&#x0002[8B];|&#x0005B;))",
        r'\1<mspace width="0.17em"/>',
        text,
    )


def inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(writer: HTML5Translator, node: nodes.math_block) -> None:
    formula = node.astext()
    if "\\\\" in formula or "&" in formula:
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    writer.body.append(f'<div class="formula">{mathml(formula, "block")}</div>\n')
    raise nodes.SkipNode


def full_name(target: str) -> str | None:
    """The public name that a reference means, with its module, or ``None``."""
    target = target.removeprefix("~").removesuffix("()")
    if target in NAMES:
        return target
    *modules, name = target.split(".")
    for size in range(len(modules), 0, -1):
        module = ".".join(modules[:size])
        if module in NAMES and (modules[size:] or [name])[0] in NAMES[module]:
            return target
    for place, part in enumerate(target.split(".")):
        if part in api.HOMES:
            return ".".join([api.HOMES[part], *target.split(".")[place:]])
    return None


def resolve(
    app: Sphinx,
    env: BuildEnvironment,
    node: addnodes.pending_xref,
    contnode: nodes.Element,
) -> nodes.Element | None:
    """A reference that Sphinx does not find: a name of a deeper file, of torch, or a private one."""
    if node.get("refdomain") != "py":
        return None
    wanted = node["reftarget"]
    target = full_name(wanted)
    if target and target != wanted:
        domain = env.get_domain("py")
        for kind in ("obj", "mod"):
            where = (env, node["refdoc"], app.builder, kind, target, node, contnode)
            if (found := domain.resolve_xref(*where)) is not None:
                return found
    is_ours = wanted.startswith("ncprior")
    return contnode if not is_ours or exists(wanted) else None  # else a warning


def exists(name: str) -> bool:
    """Whether a dotted name leads to an object, such as a nested class that has no entry."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def link_names(app: Sphinx, document: nodes.document) -> None:
    """Names of the package in the prose, such as `fit_mixture`, lead to their docstring."""
    page = app.env.docname
    if page.startswith("files/") or (page.startswith("api/") and page != "api/ncprior"):
        return
    for literal in list(document.findall(nodes.literal)):
        if isinstance(literal.parent, nodes.title | nodes.reference | addnodes.pending_xref):
            continue
        text = literal.astext()
        name = re.match(r"[A-Za-z_][\w.]*\b", text)
        if not name or text[name.end() :][:1] not in ("", "("):
            continue
        in_map = page == "api/ncprior" and f"ncprior.{text}" in NAMES  # the map of the package
        target = f"ncprior.{text}" if in_map else _of_prose(name[0])
        if target is None:
            continue
        reference = addnodes.pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=target,
            refwarn=True,
            refdoc=page,
            refexplicit=True,
        )
        literal.replace_self(reference)
        reference += literal


def our_headings(app: Sphinx, document: nodes.document) -> None:
    """Lists of fields have the headings that the docstrings have."""
    names = {"Parameters": "Arguments", "Variables": "Attributes"}
    for heading in document.findall(nodes.field_name):
        if heading.astext() in names:
            heading.children = [nodes.Text(names[heading.astext()])]


def _of_prose(name: str) -> str | None:
    """The target of a name in the prose; common words, such as `split`, mean something else."""
    if name.startswith("ncprior."):
        return full_name(name)
    first = name.split(".")[0]
    telling = first in NAMES["ncprior"] | {"diagnose", "auroc", "mmd"}
    telling |= "_" in first or first != first.lower()
    known = api.HOMES.get(first) not in (None, "ncprior.demo", "ncprior.utils")
    return full_name(name) if telling and known and "." not in name else None


def results_are_prose(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    lines: list[str],
) -> None:
    """A colon in the sentence on a result does not end the name of a type; an empty type says so."""
    for place, line in enumerate(lines[:-1]):
        if line.strip() in ("Returns:", "Yields:"):
            text = lines[place + 1].lstrip()
            lines[place + 1] = f"{lines[place + 1][: -len(text)]}: {text}"


def escape_bars(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    lines: list[str],
) -> None:
    """Bars in the prose of docstrings are absolute values, not reStructuredText's substitutions."""
    in_math = -1
    for place, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if in_math >= 0 and line.strip() and indent <= in_math:
            in_math = -1
        if line.lstrip().startswith(".. math::"):
            in_math = indent
        if in_math < 0 and not line.lstrip().startswith((">>>", "...", "| ")):
            pieces = re.split(r"(`+[^`]+`+)", line)
            pieces[::2] = [piece.replace("|", r"\|") for piece in pieces[::2]]
            lines[place] = "".join(pieces)


def short_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Signatures without the fields of their defaults."""
    return signature and api.shorten(signature), returns


def returns_together(
    app: Sphinx, domain: str, objtype: str, content: addnodes.desc_content
) -> None:
    """The type of a result stands behind its description, not at the end of all fields."""
    for fields in content.findall(nodes.field_list):
        by_name = {field[0].astext().split()[0]: field for field in fields.children}
        if "returns" in by_name and "rtype" in by_name:
            kind = by_name["rtype"]
            fields.remove(kind)
            fields.insert(fields.index(by_name["returns"]) + 1, kind)
