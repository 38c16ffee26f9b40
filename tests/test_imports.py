"""Modules import downwards only, the public names are these, and each is documented by example."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import pytest

import ncprior

PACKAGE = Path(ncprior.__file__).parent

PUBLIC = {
    *("NCPrior", "LatentSource", "Group", "SingleGroup"),
    *("sir", "langevin", "nce_loss", "NCETrainer", "fit", "Draw", "Sample", "__version__"),
}

# Modules that know nothing of the package; the core, which is these and the walk; what serves it.
GROUND = {
    *("distributions", "heads", "nce", "batches", "fitting", "rows", "ranks", "blocks"),
    *("products", "calibration", "evaluation", "files", "fingerprints", "geometry", "bounds"),
    *("energies", "spectral", "replay", "precision"),
}
BASES = {"mixtures", "mixture_fit", "flow_matching", "bases", "vamp"}
SAMPLERS = {"proposals", "samplers", "dynamics", "smc", "accept", "combine", "components"}
ENERGY = {"noise_walk", "decoder_noise", "vaebm"}
WALK = {
    "source",
    "features",
    "inference",
    "batched",
    "walks",
    "loader",
    "contrasts",
    "prior",
    "stages",
}
CORE = {*GROUND, *BASES, *SAMPLERS, *ENERGY, *WALK}
SERVICES = {
    *("gap", "checks"),
    *("runs", "trainer", "training", "loop", "parts", "normaliser", "likelihood", "testing"),
    *("vaebm_trainer", "vaebm_fit", "ood"),
    *(
        "diagnostics",
        "report",
        "report_plot",
        "strength",
        "recommend",
        "repository",
        "hub",
        "card",
    ),
    *("energy_hub", "energy_card"),
}
DEMO_PARTS = {"data", "plots", "demo_models", "demo_arms", "demo_files"}

# What each module may import of the package when it is imported itself. Imports inside functions
# and under `if TYPE_CHECKING:` are free.
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set() for name in GROUND},
    **{name: {"samplers"} for name in ("dynamics", "accept", "combine")},
    **{name: {"precision"} for name in ("heads", "blocks", "energies")},
    "components": {"mixtures", "samplers"},
    "smc": {"proposals", "samplers", "dynamics"},
    "source": {"distributions"},
    "mixtures": set(),
    "mixture_fit": {"fitting", "mixtures"},
    "flow_matching": {"fitting", "batches"},
    "bases": {"distributions", "source", "batches", "mixtures", "mixture_fit"},
    "vamp": {"distributions", "source", "batches", "fitting", "mixtures", "bases"},
    "adapters": {
        "source",
        "precision",
        "bases",
        "distributions",
        "batches",
        "fitting",
        "adapters",
    },
    "features": {"source"},
    "inference": {"blocks", "heads", "precision", "products"},
    "batched": {"heads", "precision"},
    "parts": {"batches", "combine", "files", "prior", "ranks", "repository", "samplers", "source"},
    "walks": {"batches", "distributions", "rows", "source"},
    "proposals": {"distributions"},
    "samplers": {"proposals"},
    "contrasts": {"nce", "source"},
    "prior": {"source", "features", "precision", "heads", "inference", "samplers", "contrasts"},
    **dict.fromkeys(("trainer", "normaliser", "testing", "card"), CORE),
    "likelihood": {*CORE, "normaliser"},
    "ood": {*CORE, "likelihood", "normaliser"},
    "noise_walk": {"dynamics", "mixtures", "precision", "prior", "samplers", "source"},
    "decoder_noise": {"bases", "batches", "source"},
    "vaebm": {"dynamics", "noise_walk", "precision", "prior", "samplers", "source"},
    "stages": {"samplers", "smc", "source", "bases", "prior"},
    "vaebm_trainer": {*CORE, "trainer"},
    "vaebm_fit": {*CORE, "runs", "vaebm_trainer", "energy_hub"},
    "loader": {"batches", "source"},
    "gap": {"evaluation"},
    "runs": {"batches", "files", "loader", "ranks"},
    "training": {*CORE, "trainer", "runs"},
    "checks": {*CORE, "diagnostics"},
    "loop": {*CORE, "trainer", "training", "runs", "diagnostics", "checks"},
    "report": {"calibration"},
    "recommend": {"combine", "components", "report", "samplers", "smc"},
    "report_plot": {"report"},
    "diagnostics": {*CORE, "report"},
    "strength": {*CORE, "diagnostics"},
    "energy_card": {"vaebm"},
    "energy_hub": {*CORE, "repository", "energy_card"},
    "repository": {"files", "fingerprints"},
    "hub": {*CORE, "card", "adapters", "repository"},
    **dict.fromkeys(DEMO_PARTS, CORE),
    "demo": {*CORE, *SERVICES, *DEMO_PARTS},
    "cli": {*CORE, *SERVICES, "demo", "__init__"},
    "__main__": {"cli"},
    "__init__": {"source", "prior", "samplers", "dynamics", "nce", "trainer", "loop"},
}

# What the extras bring: `import ncprior` must do without.
EXTRAS = ["sklearn", "matplotlib", "pyarrow", "PIL", "scipy"]
EXTRAS += ["torch_fidelity", "pythae", "diffusers", "scvi", "zuko"]


def names_of(path: Path) -> tuple[str, str]:
    """The dotted name of a file of the package, and its row in the table."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    row = parts[0]
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(("ncprior", *(p for p in parts if p != "__init__"))), row


FILES = sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")])
MODULES = [names_of(path)[0] for path in FILES if path.stem != "__main__"]


def runtime_statements(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield statement
                yield from runtime_statements(statement)
            continue
        yield child
        yield from runtime_statements(child)


def imports(code: str, module: str, *, is_package: bool) -> set[str]:
    """The parts of the package that a module imports, by their row in the table."""
    names = []
    for node in runtime_statements(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            dots = "." * node.level
            origin = importlib.util.resolve_name(dots + (node.module or ""), package)
            names += [f"{origin}.{alias.name}" for alias in node.names]
    ours = [name.split(".") for name in names if name.split(".")[0] in ("ncprior", "adapters")]
    return {parts[1] if parts[0] == "ncprior" and parts[1:] else "__init__" for parts in ours}


def test_the_reader_of_imports_sees_them() -> None:
    code = """
import math, ncprior.hub
from ncprior import heads
from ncprior.prior import NCPrior
from .cli import main
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ncprior.loop import fit
else:
    from . import data
try:
    import ncprior
except ImportError:
    pass
class C:
    from ncprior.nce import nce_loss
    def method(self):
        from ncprior.plots import plot
"""
    seen = {"hub", "heads", "prior", "cli", "data", "__init__", "nce"}
    assert imports(code, "ncprior.x", is_package=False) == seen
    assert imports("from ..source import Group", "ncprior.adapters.x", is_package=False) == {
        "source"
    }
    assert imports("from . import nvae", "ncprior.adapters", is_package=True) == {"adapters"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: names_of(path)[0])
def test_modules_import_downwards_only(path: Path) -> None:
    module, row = names_of(path)
    assert row in MAY_IMPORT, f"Add {row!r} to the table MAY_IMPORT in {Path(__file__).name}."
    found = imports(path.read_text(), module, is_package=path.stem == "__init__")
    allowed = MAY_IMPORT[row]
    assert found <= allowed, f"{module} may import {sorted(allowed)}; it imports {sorted(found)}."


def test_the_table_has_no_circle() -> None:
    """Every module's row can be put above the rows that it imports."""
    placed: set[str] = set()
    rest = {row: below - {row} for row, below in MAY_IMPORT.items()}
    while ready := [row for row, below in rest.items() if below <= placed]:
        placed.update(ready)
        for row in ready:
            del rest[row]
    assert not rest


def test_public_names() -> None:
    assert set(ncprior.__all__) == PUBLIC
    assert len(ncprior.__all__) == len(PUBLIC)
    assert all(hasattr(ncprior, name) for name in PUBLIC)


def test_importing_needs_no_extra() -> None:
    code = (
        f"import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({EXTRAS}))\n"  # None: importing it fails
        f"import ncprior, ncprior.adapters\n"
        f"[importlib.import_module(m) for m in {MODULES}]\n"
        f"[getattr(ncprior, name) for name in ncprior.__all__]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def public_objects(module: ModuleType) -> Iterator[tuple[str, type | Callable[..., Any]]]:
    for name in module.__all__:
        value = getattr(module, name)
        if get_origin(value) is None and (inspect.isclass(value) or inspect.isroutine(value)):
            yield f"{module.__name__}.{name}", value


def documented(value: type | Callable[..., Any]) -> bool:
    generated = f"{value.__name__}("  # what a NamedTuple or a dataclass gets without a docstring
    return bool(value.__doc__) and not value.__doc__.startswith(generated)


def exemplified(value: type | Callable[..., Any]) -> bool:
    """Whether a function, or a class or one of its methods, has a doctest.

    A named tuple is what some function returns, and that function has the example.
    """
    if inspect.isclass(value) and issubclass(value, tuple):
        return True
    members = vars(value).values() if inspect.isclass(value) else ()
    return any(">>>" in (inspect.getdoc(part) or "") for part in (value, *members))


@pytest.mark.parametrize("name", MODULES)
def test_public_names_have_a_docstring_and_an_example(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring."
    if name.startswith("ncprior.adapters") and not hasattr(module, "__all__"):
        return
    assert hasattr(module, "__all__"), f"{name} has no __all__."
    objects = dict(public_objects(module))
    assert not (bare := [k for k, v in objects.items() if not documented(v)]), (
        f"Without a docstring: {bare}."
    )
    assert not (bare := [k for k, v in objects.items() if not exemplified(v)]), (
        f"Without a doctest: {bare}."
    )
