"""Pages on the public names of the package, one for each module that users import from."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ncprior
from ncprior import adapters

# Top-level files and folders; those that serve the demonstration or the package itself come last.
FACES = [
    *("ncprior", "ncprior.bases", "ncprior.samplers", "ncprior.heads", "ncprior.training"),
    *("ncprior.diagnostics", "ncprior.evaluation", "ncprior.recipe", "ncprior.vaebm"),
    *("ncprior.jobs", "ncprior.source", "ncprior.testing", "ncprior.data", "ncprior.saving"),
    *("ncprior.utils", "ncprior.demo"),
]


def faces() -> list[str]:
    """The modules that users import from; a new folder of the package is added at the end."""
    folders = [f"ncprior.{m.name}" for m in pkgutil.iter_modules(ncprior.__path__) if m.ispkg]
    further = [name for name in folders if name not in (*FACES, "ncprior.adapters")]
    adapter_modules = [
        f"ncprior.adapters.{m.name}" for m in pkgutil.iter_modules(adapters.__path__)
    ]
    return [*FACES, *further, *sorted(adapter_modules)]


def public(module: str) -> dict[str, Any]:
    """The public names of a module: those that it lists, or its own classes and functions."""
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None)
    if names is None:
        own = {k: v for k, v in vars(found).items() if getattr(v, "__module__", "") == module}
        names = [k for k, v in own.items() if inspect.isclass(v) or inspect.isroutine(v)]
    return {name: getattr(found, name) for name in names if not name.startswith("_")}


def homes() -> dict[str, str]:
    """The page of each public name: the first of the modules that have it."""
    return {name: module for module in reversed(faces()) for name in public(module)}


def methods(value: type) -> Iterator[tuple[str, str]]:
    """Directives and names of the documented methods of a class, but those of a public parent."""
    of_package = [cls for cls in value.__mro__ if cls.__module__.split(".")[0] == "ncprior"]
    parents = [cls for cls in of_package[1:] if _is_public(cls)]
    inherited = {name for cls in parents for name in vars(cls)}
    found: dict[str, str] = {}
    for cls in reversed(of_package):
        for name, part in vars(cls).items():
            is_new = cls is value or name not in inherited
            if name.startswith("_") or not is_new or not inspect.getdoc(part):
                continue
            if inspect.isroutine(getattr(value, name)):
                found[name] = "automethod"
            elif isinstance(part, property):
                found[name] = "autoproperty"
    for name, directive in found.items():
        yield directive, name


def page(module: str) -> str:
    """The page of a module, in reStructuredText."""
    names = dict(sorted(public(module).items(), key=lambda pair: _order(*pair)))
    elsewhere = {
        name: home
        for name, value in names.items()
        if (home := HOMES[name]) != module and public(home)[name] is value
    }
    own = {name: value for name, value in names.items() if name not in elsewhere}
    lines = [module, "=" * len(module), "", f".. automodule:: {module}", ""]
    lines += [f".. currentmodule:: {module}", ""]
    if elsewhere:
        links = ", ".join(f":obj:`{name} <{home}.{name}>`" for name, home in elsewhere.items())
        lines += [f"Also imported from here: {links}.", ""]
    for name, value in own.items():
        if inspect.isclass(value):
            lines += [f".. autoclass:: {name}", ""]
            for directive, method in methods(value):
                lines += [f"   .. {directive}:: {method}", ""]
        elif inspect.isroutine(value):
            lines += [f".. autofunction:: {name}", ""]
        else:
            lines += [f".. autodata:: {name}", "   :no-value:", ""]
    files = {getattr(value, "__module__", module) for value in own.values()} - {module}
    if further := sorted(file for file in files if _is_long(file)):
        lines += ["Background", "----------", ""]
        for file in further:
            lines += [f".. automodule:: {file}", "   :no-index:", ""]
    return "\n".join(lines)


def text(module: str) -> str:
    """The reference of a module as plain text: signatures and docstrings, for language models."""
    lines = [f"# {module}", "", inspect.getdoc(importlib.import_module(module)) or "", ""]
    for name, value in sorted(public(module).items(), key=lambda pair: _order(*pair)):
        home = HOMES[name]
        if home != module and public(home)[name] is value:
            lines += [f"`{name}` is described in {home}.", ""]
        elif inspect.isclass(value) or inspect.isroutine(value):
            lines += [
                f"## {module}.{name}{_signature(value)}",
                "",
                inspect.getdoc(value) or "",
                "",
            ]
            for _, method in methods(value) if inspect.isclass(value) else ():
                part = getattr(value, method)
                lines += [f"### {name}.{method}{_signature(part)}", "", inspect.getdoc(part) or ""]
                lines += [""]
    return "\n".join(lines)


def shorten(signature: str) -> str:
    """A signature whose defaults, such as `FitSettings(...)`, stand without their fields."""
    return re.sub(r"(\b[A-Z]\w+)\([^()]+\)", r"\1()", signature)


def unquoted(signature: str) -> str:
    """A signature whose annotations stand without quotes, and whose functions without addresses.

    Example:
        >>> unquoted("(x: 'Tensor', z: ForwardRef('int', module='m') = 'a') -> 'None'")
        "(x: Tensor, z: int = 'a') -> None"
    """
    signature = re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"'\1'", signature)
    signature = re.sub(r"<function (\S+) at \w+>", r"\1", signature)
    return re.sub(r"(: |-> )(?:'([^']*)'|\"([^\"]*)\")", r"\1\2\3", signature)


def _signature(value: Any) -> str:  # noqa: ANN401
    try:
        return shorten(unquoted(str(inspect.signature(value))))
    except (TypeError, ValueError):
        return ""  # a property, or a class without a constructor of its own


def write(folder: Path) -> None:
    """Writes the pages of all modules and their index."""
    (folder / "api").mkdir(parents=True)
    for module in faces():
        (folder / "api" / f"{module}.rst").write_text(page(module), encoding="utf-8")
    (folder / "api" / "index.rst").write_text(_index(), encoding="utf-8")


def _index() -> str:
    title = "API reference"
    rows = "\n".join(
        f"* :doc:`{module} <{module}>`: {first_sentence(module)}" for module in faces()
    )
    tree = "\n   ".join([".. toctree::\n   :hidden:\n", *faces()])
    return f"{title}\n{'=' * len(title)}\n\n{rows}\n\n{tree}\n"


def first_sentence(module: str) -> str:
    """The first sentence of a module's docstring."""
    text = inspect.getdoc(importlib.import_module(module)) or ""
    return " ".join(text.split("\n\n")[0].split())


def _is_public(cls: type) -> bool:
    home = HOMES.get(cls.__name__)
    return home is not None and public(home)[cls.__name__] is cls


def _order(name: str, value: object) -> tuple[bool, bool, str]:
    """Functions first, then classes, then the tuples that functions return, and constants."""
    is_class = inspect.isclass(value)
    return not inspect.isroutine(value), not is_class, name.lower()


def _is_long(module: str) -> bool:
    """Whether the docstring of a file says more than a sentence: a derivation, a method."""
    text = inspect.getdoc(importlib.import_module(module)) or ""
    return "\n\n" in text


HOMES = homes()
