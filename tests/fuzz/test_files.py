"""Damaged and hostile files of every kind, held to the rule of ``rule.py``.

Each file is loaded in a process of its own, with 50 MiB of memory above the size of the file and 2
seconds of the processor. Loading returns what the file held, or raises a ValueError of ours; VAE,
prior, files and global generators stay as they were.
"""

from __future__ import annotations

import os
import time

import pytest
from fuzz.calls import SETTINGS
from fuzz.files import KINDS, Damage, damages, load, of_json, valid_files
from fuzz.rule import FOUND, SEVERITY, Finding
from hypothesis import given, seed, settings

SECONDS = float(os.environ.get("NCPRIOR_FUZZ_SECONDS", "3600")) / 4  # the calls take the rest


@pytest.mark.parametrize("kind", KINDS)
def test_valid_files_load(kind: str) -> None:
    assert valid_files(kind)
    assert load(kind, ("none", lambda data: data)) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, request: pytest.FixtureRequest) -> None:
    slow = request.config.getoption("--slow")
    end = time.perf_counter() + (SECONDS / len(KINDS) if slow else 0)
    found: list[Finding] = []
    number = 0
    while number == 0 or time.perf_counter() < end:
        _try(kind, found, 50 if slow else 5, number)
        number += 1
    groups = {(finding.kind, _origin(finding.detail)): finding for finding in found}
    FOUND.extend(groups.values())
    rows = sorted(groups.values(), key=lambda finding: SEVERITY.index(finding.kind))
    assert not rows, "\n".join(map(str, rows))


def _origin(detail: str) -> str:
    """The type of an exception and the line that raised it."""
    return f"{detail.partition(':')[0]} {detail.rpartition('[')[2]}"


def _try(kind: str, found: list[Finding], examples: int, number: int) -> None:
    strategy = of_json() if kind == "a job.json" else damages()

    @seed(number)
    @settings(SETTINGS, max_examples=examples)
    @given(strategy)
    def run(damage: Damage) -> None:
        found.extend(load(kind, damage))

    run()
