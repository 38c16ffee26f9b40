"""What an installation gets: the wheel, built from the sdist as a package index would have it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import ncprior

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://example.org/ncprior"


def build(project: Path, kind: str, out: Path) -> Path:
    """Runs the build backend, which writes into the project's folder: give it a copy."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


CODE = ("ncprior", "adapters")
OTHERS = (".ci", ".github", "docs", "examples", "tests")  # folders that tests read
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FILES += ("CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "conftest.py", "constraints.txt")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked: the folder of a project."""
    folder = tmp_path_factory.mktemp("build")
    project = folder / "project"
    project.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, project)
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if "[project.urls]" not in settings:  # the repository has no public address yet
        urls = f'[project.urls]\nRepository = "{REPOSITORY}"\n'
        (project / "pyproject.toml").write_text(f"{settings}\n{urls}", encoding="utf-8")
    for name in (*CODE, *OTHERS):
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=unwanted)
    for cache in ("tests/__pycache__/test_nce.pyc", "tests/.pytest_cache/CACHEDIR.TAG"):
        (project / cache).parent.mkdir()
        (project / cache).touch()
    built = build(project, "sdist", folder / "sdist")
    with tarfile.open(built) as archive:
        archive.extractall(folder, filter="data")
    return folder / built.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = shutil.copytree(sdist, tmp_path_factory.mktemp("wheel") / "project")
    return build(project, "wheel", project.parent / "wheel")


def test_the_sdist_has_all_that_its_tests_need(sdist: Path) -> None:
    """It had the tests without their helpers, so that none of them could run."""
    wanted = {
        path.relative_to(ROOT)
        for name in OTHERS
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {path.relative_to(sdist) for path in sdist.rglob("*") if path.is_file()}
    assert {*wanted, *map(Path, FILES)} <= found
    caches = {"__pycache__", ".pytest_cache", ".hypothesis"}
    assert not [path for path in found if caches & {*path.parts} or path.suffix == ".pyc"]
    command = [
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "tests/test_single_group.py",
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=sdist, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_wheel_has_every_file_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {path.relative_to(ROOT) for path in (ROOT / "ncprior").rglob("*.py")}
    code |= {"ncprior" / path.relative_to(ROOT) for path in (ROOT / "adapters").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {path.as_posix() for path in code}
    assert {"ncprior/py.typed", "ncprior/adapters/__init__.py"} <= names
    info = f"ncprior-{ncprior.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"ncprior", info}


def test_an_index_shows_pictures_and_links_of_the_repository(wheel: Path) -> None:
    info = f"ncprior-{ncprior.__version__}.dist-info"
    found = message_from_bytes(zipfile.ZipFile(wheel).read(f"{info}/METADATA"))
    assert found["Description-Content-Type"] == "text/markdown"
    (address,) = (it.split(", ")[1] for it in found.get_all("Project-URL"))
    page, readme = str(found.get_payload()), (ROOT / "README.md").read_text(encoding="utf-8")
    links, own = (re.findall(r"\]\(([^)\s]+)\)", text) for text in (page, readme))
    assert len(links) == len(own) and not [it for it in links if not it.startswith(("http", "#"))]
    assert f"{address}/raw/main/examples/images/banner.png" in links
    assert f"{address}/blob/main/docs/start.md" in links
    back = [re.sub(f"{address}/(raw|blob)/main/", "", link) for link in links]
    assert back == own  # no other link changes


def printed_by(code: str, folder: Path) -> str:
    """What code prints in a process whose package is the wheel unpacked into folder/installed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "installed")},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_N6_the_wheel_works_without_the_project_and_beside_its_clone(
    wheel: Path, tmp_path: Path
) -> None:
    """A clone's folder has the package's name: without ``__init__.py`` it must not stand for it."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "ncprior" / "ncprior").mkdir(parents=True)
    code = """
import ncprior, ncprior.adapters
print(ncprior.__version__, ncprior.__file__, ncprior.adapters.__file__, sep="\\n")
"""
    version, *files = printed_by(code, tmp_path).splitlines()
    assert version == ncprior.__version__
    assert all(Path(file).is_relative_to(tmp_path / "installed") for file in files)


def test_the_wheel_works_without_any_extra(wheel: Path, tmp_path: Path) -> None:
    """The command and every public module but the demonstration's data need no extra."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = """
import importlib, pkgutil, sys
for name in ("matplotlib", "sklearn", "PIL", "pyarrow", "scipy", "zuko", "pythae", "diffusers", "scvi", "ctgan"):
    sys.modules[name] = None
import ncprior, ncprior.adapters
for package in (ncprior, ncprior.adapters):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from ncprior.__main__ import main
main(["--version"])
"""
    assert printed_by(code, tmp_path).strip() == f"ncprior {ncprior.__version__}"


def test_every_package_that_is_imported_is_a_dependency() -> None:
    """Imports at the top of a file; those in functions are of extras, and say so if they fail."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^dependencies = \[(.*?)\]", settings, re.MULTILINE | re.DOTALL)
    known = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', listed)}
    known |= {"ncprior", *sys.stdlib_module_names}
    missing = []
    for path in [path for name in CODE for path in (ROOT / name).rglob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", ())]
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            if isinstance(node, ast.Import | ast.ImportFrom):
                missing += [(path.name, it) for it in names if it.split(".")[0] not in known]
    assert not missing
