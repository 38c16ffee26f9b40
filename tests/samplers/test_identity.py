"""Samplers in files of users: what they use is a part of their identity, and nothing that changes by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ncprior.samplers.identity import describe, identity_of

FILE = """
import torch

class Thing:
    pass

class Tempered(torch.nn.Module):
    def __init__(self, t=1.0):
        super().__init__()
        self.t = torch.nn.Parameter(torch.tensor(t))

    def draw(self, prior, log_ratio):
        return self.t

NUMBER, NAMES, TENSOR = 3, frozenset({"a", "b", "c", "d"}), torch.zeros(2)

def helper(z):
    return z + NUMBER

def uses_a_number(prior, log_ratio):
    return NUMBER

def uses_one_deeper(prior, log_ratio):
    return [NUMBER for _ in range(2)]

def uses_a_tensor(prior, log_ratio):
    return TENSOR

def uses_a_helper(prior, log_ratio):
    return helper(1)

def uses_another_module(prior, log_ratio):
    return torch.zeros(3), NAMES

def calls_itself(prior, log_ratio):
    return calls_itself

def holds(thing):
    def sampler(prior, log_ratio):
        return thing
    return sampler

of_a_thing = holds(Thing())
of_a_list = holds([Thing(), {"a", "b", "c", "d"}])
of_a_method = Tempered().draw
"""

NAMES = ("a_number", "one_deeper", "a_tensor", "a_helper", "another_module")

STABLE = (
    *(f"uses_{name}" for name in NAMES),
    "calls_itself",
    "of_a_thing",
    "of_a_list",
    "of_a_method",
)


def user_file(text: str = FILE) -> Any:
    module = ModuleType("user_file")
    exec(compile(text, "user_file.py", "exec"), vars(module))  # noqa: S102
    return module


@pytest.mark.parametrize("name", ("a_number", "one_deeper", "a_helper"))
def test_a_number_of_the_users_file_changes_the_identity(name: str) -> None:
    before, after = user_file(), user_file(FILE.replace("= 3, froz", "= 4, froz"))
    assert identity_of(getattr(before, f"uses_{name}")) != identity_of(
        getattr(after, f"uses_{name}")
    )
    same = user_file().uses_another_module
    assert identity_of(same) == identity_of(after.uses_another_module)


def test_a_tensor_of_the_users_file_changes_the_identity() -> None:
    before, after = user_file(), user_file(FILE.replace("torch.zeros(2)", "torch.ones(2)"))
    assert identity_of(before.uses_a_tensor) != identity_of(after.uses_a_tensor)


def test_a_method_is_known_by_its_module() -> None:
    module = user_file()
    half, again = (module.Tempered(t).draw for t in (0.5, 0.5))
    assert identity_of(half) == identity_of(again) != identity_of(module.Tempered(0.7).draw)
    assert describe(half) == "Tempered.draw"


def test_a_closure_may_have_no_value_yet() -> None:
    def make() -> tuple[Any, str]:
        def sampler(prior: Any, log_ratio: Any) -> Any:
            return later

        found = identity_of(sampler)
        later = torch.ones(1)
        return sampler, found

    sampler, found = make()
    assert found != identity_of(sampler)


def test_identities_are_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "user_file.py").write_text(FILE)
    run = (
        "import user_file; from ncprior.samplers.identity import identity_of\n"
        f"print([identity_of(getattr(user_file, name)) for name in {STABLE}])"
    )
    found = set()
    for seed in ("1", "2"):
        path = os.pathsep.join([str(tmp_path), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", run],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1
    assert "0x" not in found.pop()
