"""What an installation gets: the wheel, built from the sdist as a package index would have it."""

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    project = folder / "project"
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if "[project.urls]" not in settings:  # the repository has no public address yet
        urls = f'[project.urls]\nRepository = "{REPOSITORY}"\n'
        (project / "pyproject.toml").write_text(f"{settings}\n{urls}", encoding="utf-8")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("ncprior", "adapters"):
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=unwanted)
    sdist = build(project, "sdist", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build(folder / sdist.name.removesuffix(".tar.gz"), "wheel", folder / "wheel")


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
