"""Every import looks down the floors of the house, and the public faces are whole and documented."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest

import ncprior

PACKAGE = Path(ncprior.__file__).parent

FLOORS = """
    _version < _commands utils < distributions nce < source < single_group < heads data testing < bases < samplers < saving
    < prior < trainer diagnostics jobs < training < vaebm < evaluation < recipe < adapters < demo < cli
"""
FLOOR = {room: i for i, floor in enumerate(FLOORS.split("<")) for room in floor.split()}
FLOOR |= {"__init__": len(FLOOR), "__main__": len(FLOOR)}

PUBLIC = {
    *("NCPrior", "LatentSource", "Group", "SingleGroup"),
    *(
        "sir",
        "langevin",
        "nce_loss",
        "NCETrainer",
        "fit",
        "improve",
        "Draw",
        "Sample",
        "__version__",
    ),
}

# What the extras bring: `import ncprior` must do without.
EXTRAS = ["sklearn", "matplotlib", "pyarrow", "PIL", "scipy"]
EXTRAS += ["torch_fidelity", "pythae", "diffusers", "scvi", "zuko", "ctgan", "sdmetrics"]
EXTRAS += ["lightning", "accelerate", "tensorboard", "wandb"]


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("ncprior", *(part for part in parts if part != "__init__")))


def files() -> list[Path]:
    """All files of the package, with those of ``adapters``, which is a symbolic link."""
    return sorted(p for pattern in ("*.py", "*/*.py", "*/*/*.py") for p in PACKAGE.glob(pattern))


FILES = files()
MODULES = [module_of(path) for path in FILES if path.stem != "__main__"]
FACES = [module_of(path) for path in FILES if path.stem == "__init__"]
FACES += [m for m in MODULES if m.count(".") == 1 and m not in FACES and "._" not in m]
ADAPTERS = [m for m in MODULES if m.startswith("ncprior.adapters.") and m.count(".") == 2]


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[1:] else "__init__"


def imported_rooms(code: str, module: str, *, is_package: bool) -> set[str]:
    """The rooms that a module imports, anywhere: in functions and for type checkers too."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{origin}.{alias.name}" for alias in node.names]
    ours = [name.split(".") for name in names if name.split(".")[0] in ("ncprior", "adapters")]
    rooms = {parts[1] if parts[0] == "ncprior" and parts[1:] else "adapters" for parts in ours}
    return {room if room in FLOOR else "__init__" for room in rooms}


def test_the_reader_of_imports_sees_them() -> None:
    code = """
import math, ncprior.saving
from ncprior import heads
from ncprior.prior import NCPrior
from .cli import main
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ncprior.training import fit
class C:
    from ncprior.nce import nce_loss
    def method(self):
        from ncprior import __version__
"""
    seen = {"saving", "heads", "prior", "cli", "training", "nce", "__init__"}
    assert imported_rooms(code, "ncprior.x", is_package=False) == seen
    above = "from ..source import Group"
    assert imported_rooms(above, "ncprior.adapters.x", is_package=False) == {"source"}
    assert imported_rooms("from . import rae", "ncprior.adapters", is_package=True) == {"adapters"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_import_looks_down(path: Path) -> None:
    module = module_of(path)
    room = room_of(module)
    assert room in FLOOR, f"Put {room!r} on a floor of FLOORS in {Path(__file__).name}."
    rooms = imported_rooms(path.read_text(), module, is_package=path.stem == "__init__")
    upward = {r for r in rooms - {room} if FLOOR[r] >= FLOOR[room]}
    assert not upward, f"{module} imports {sorted(upward)}, which are not on a lower floor."


def test_no_circle_of_files() -> None:
    """Within a folder, too, files can be put in an order in which each imports earlier ones."""
    names = set(MODULES)
    below: dict[str, set[str]] = {}
    for path in FILES:
        module, found = module_of(path), set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)} & names
        below[module] = found - {module, "ncprior"}
    placed: set[str] = set()
    while ready := [module for module, needs in below.items() if needs <= placed]:
        placed.update(ready)
        for module in ready:
            del below[module]
    assert not below, f"These import one another: {below}."


def test_the_top_is_small() -> None:
    files = [*PACKAGE.glob("*.py")]
    folders = [p for p in PACKAGE.iterdir() if p.is_dir() and not p.is_symlink()]
    folders = [p for p in folders if p.name != "__pycache__"]
    assert len(files) <= 12
    assert len(files) + len(folders) <= 24


def test_public_names() -> None:
    assert set(ncprior.__all__) == PUBLIC
    assert len(ncprior.__all__) == len(PUBLIC)
    assert all(hasattr(ncprior, name) for name in PUBLIC)


def test_importing_the_package_alone_gives_all_of_it() -> None:
    """Files of the core are imported with its first name, and then all can be reached by name."""
    code = """
import sys, ncprior
assert "torch" not in sys.modules
assert ncprior.samplers.within_components and ncprior.bases.fit_mixture
for name in ("no_such_name", "_no_such_name"):
    assert not hasattr(ncprior, name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


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


def public_objects(name: str) -> dict[str, type | Callable[..., Any]]:
    """Public classes and functions: of a face those it lists, of a top-level file its own."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None)
    if names is None:
        own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == name}
        names = [k for k in own if not k.startswith("_")]
    found = {k: getattr(module, k) for k in names}
    return {
        k: v
        for k, v in found.items()
        if get_origin(v) is None and (inspect.isclass(v) or inspect.isroutine(v))
    }


def signatures(value: type | Callable[..., Any], name: str) -> Iterator[tuple[str, int]]:
    """The numbers of arguments of a function, or of a class's constructor and public methods."""
    if not inspect.isclass(value):
        yield name, len(inspect.signature(value).parameters)
        return
    for method, part in vars(value).items():
        if inspect.isroutine(getattr(value, method)) and not method.startswith("_"):
            function = part.__func__ if isinstance(part, classmethod | staticmethod) else part
            yield f"{name}.{method}", len(inspect.signature(function).parameters)
    if "__init__" in vars(value):
        yield name, len(inspect.signature(value.__init__).parameters)


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
def test_every_file_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__, f"{name} has no docstring."


@pytest.mark.parametrize("name", [*FACES, *ADAPTERS])
def test_public_names_have_a_docstring_and_an_example(name: str) -> None:
    objects: Iterator[tuple[str, Any]] = iter(sorted(public_objects(name).items()))
    bare = [(k, documented(v), exemplified(v)) for k, v in objects]
    assert not (missing := [k for k, doc, _ in bare if not doc]), f"No docstring: {missing}."
    assert not (missing := [k for k, _, doctest in bare if not doctest]), f"No doctest: {missing}."


@pytest.mark.parametrize("name", [*FACES, *ADAPTERS])
def test_public_functions_have_at_most_16_arguments(name: str) -> None:
    found = [pair for k, value in public_objects(name).items() for pair in signatures(value, k)]
    assert not (many := [pair for pair in found if pair[1] > 16]), f"Too many: {many}."


def test_arguments_of_methods_and_constructors_are_counted() -> None:
    class Example:
        def __init__(self, a: int) -> None: ...
        def method(self, a: int, *, b: int = 0) -> None: ...
        @classmethod
        def make(cls, a: int) -> None: ...

    found = dict(signatures(Example, "E"))
    assert found == {"E": 2, "E.method": 3, "E.make": 2}
