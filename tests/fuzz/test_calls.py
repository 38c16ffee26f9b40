"""Malformed calls of every public function, held to the rule of ``rule.py``.

By default a few hundred calls, the same every time. With ``--slow`` every bad value in the place of
every argument, and then random ones, for ``NCPRIOR_FUZZ_SECONDS`` in all; the findings of all calls
are printed at the end, grouped by call, arguments and kind:

    python -m pytest tests/fuzz --slow -n 0
"""

from __future__ import annotations

import inspect
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz import (
    calls_adapters,
    calls_bases,
    calls_codes,
    calls_core,
    calls_recipe,
    calls_training,
)
from fuzz.calls import TABLE, explore
from fuzz.rule import FOUND, SEVERITY
from test_imports import ADAPTERS, FACES, public_objects

SECONDS = 0.75 * float(os.environ.get("NCPRIOR_FUZZ_SECONDS", "3600"))  # files take the rest
assert calls_adapters and calls_bases and calls_core  # they fill the table
assert calls_codes and calls_recipe and calls_training

# Public names without a row of the table, each with the reason.
WITHOUT = {
    "ncprior.LatentSource": "a base class; its methods are the user's",
    "ncprior.data.RowData": "a base class; its methods are the user's",
    "ncprior.distributions.Sampleable": "a protocol",
    "ncprior.diagnostics.Verdict": "an enumeration",
    "ncprior.demo.digits": "takes no arguments",
    "ncprior.demo.read_images": "reads the Hugging Face Hub",
    "ncprior.adapters.diffusers.DiffusersSource": "methods need diffusers",
    "ncprior.adapters.vq.VQModelSource": "needs diffusers",
    "ncprior.adapters.pythae.NCPSampler": "methods need pythae",
    "ncprior.adapters.pythae.PythaeSource": "methods need pythae",
    "ncprior.adapters.tvae.capture_encoder": "takes no arguments, and needs ctgan",
    "ncprior.adapters.rae.RAESource": "methods of SingleGroup",
    "ncprior.distributions.is_prior": "a question of yes or no",
    "ncprior.distributions.is_point": "a question of yes or no",
    "ncprior.distributions.is_half": "a question of yes or no",
    "ncprior.distributions.naming_bad_rows": "a context that explains errors",
    "ncprior.trainer.require_trainable": "a check of the trainer",
    "ncprior.vaebm.VAEBM.start_sampler": "a check of the trainer",
    "ncprior.vaebm.VAEBM.push_to_hub": "as NCPrior.push_to_hub",
    "ncprior.adapters.nvae.NVAESource.facts": "takes no arguments",
    "ncprior.adapters.vdvae.VDVAESource.facts": "takes no arguments",
    "ncprior.adapters.tvae.TVAESource.facts": "takes no arguments",
    "ncprior.adapters.scvi.SCVISource.facts": "takes no arguments",
    "ncprior.bases.Rebased.facts": "takes no arguments",
    "ncprior.training.AmortisedSource.facts": "takes no arguments",
    "ncprior.training.ResampledPosterior.facts": "takes no arguments",
    "ncprior.vaebm.GaussianDecoder.facts": "takes no arguments",
    "ncprior.data.CachedEncodings": "methods are called by fit",
    "ncprior.data.CachedGroupsSource": "methods are called by fit",
    "ncprior.data.EncodedSource": "methods are called by fit",
    "ncprior.data.Loader": "methods are called by fit",
    "ncprior.data.Stream": "methods are called by fit",
}


def public_calls() -> Iterator[str]:
    """The names of public functions and classes that are no results, and of their own methods."""
    seen: set[int] = set()
    for module in [*FACES, *ADAPTERS]:
        for name, value in public_objects(module).items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            is_class = inspect.isclass(value)
            if not (is_class and issubclass(value, tuple)):  # a named tuple is what a call returns
                yield f"{module}.{name}"
            for method in vars(value) if is_class else ():
                if inspect.isroutine(getattr(value, method)) and not method.startswith("_"):
                    yield f"{module}.{name}.{method}"


def is_excused(name: str) -> bool:
    """Whether a name, or the class of a method, is left out for a reason."""
    return name in TABLE or name in WITHOUT or name.rpartition(".")[0] in WITHOUT


def test_every_public_name_is_in_the_table() -> None:
    missing = [name for name in public_calls() if not is_excused(name)]
    assert not missing, f"Add a row to tests/fuzz/calls_….py, or a reason to WITHOUT: {missing}."


def test_the_table_has_public_names_only() -> None:
    inherited = ("save_pretrained", "push_to_hub", "from_pretrained")
    attributes = ("strength", "active", "precision", "sampler")
    names = set(public_calls())
    strange = [
        name
        for name in TABLE
        if name not in names and name.rpartition(".")[2] not in (*inherited, *attributes)
    ]
    names.add("ncprior.__main__")  # the command line
    owners = [name for name in strange if name.rpartition(".")[0] not in names]
    assert not owners, f"These are not public: {owners}."


@pytest.fixture(autouse=True, scope="module")
def little_memory() -> Iterator[None]:
    """At most 4 GiB more than now, so that a call that wants all memory fails by itself."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + 2**32
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own as the working directory, no network, and no progress bars."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TABLE)
def test_malformed_calls(name: str, request: pytest.FixtureRequest) -> None:
    entry = TABLE[name]
    seconds = SECONDS / len(TABLE) if request.config.getoption("--slow") else None
    found = explore(entry, examples=1 if entry.slow else 3, seconds=seconds)
    FOUND.extend(found)
    found.sort(key=lambda finding: SEVERITY.index(finding.kind))
    assert not found, "\n".join(map(str, found))
