"""Samplers in files of users: what they use is a part of their identity, and nothing that changes by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cached_property, partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from helpers.problems import standard_normal
from torch.distributions import MultivariateNormal

from ncprior import sir
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


class Sampler:
    """A sampler of a user, which is called itself or by a method."""

    def __init__(self, number: int, inner: Any = sir) -> None:
        self.number, self.inner, self._cache = number, inner, list[int]()

    def __call__(self, prior: Any, log_ratio: Any) -> Any:
        return self.draw(prior, log_ratio)

    def draw(self, prior: Any, log_ratio: Any) -> Any:
        self._cache.append(self.size)
        return self.inner(prior, log_ratio, num_proposals=self.number)

    @cached_property
    def size(self) -> int:
        return self.number + 1


class Settings:
    """An object that cannot be called, with a sampler among its methods."""

    def __init__(self, number: int) -> None:
        self.number = number

    def draw(self, prior: Any, log_ratio: Any) -> Any:
        return sir(prior, log_ratio, num_proposals=self.number)

    draw_without_gradients = torch.no_grad()(draw)


OF_OBJECTS = {
    "object": Sampler,
    "method": lambda m: Sampler(m).draw,
    "method of settings": lambda m: Settings(m).draw,
    "decorated method": lambda m: Settings(m).draw_without_gradients,
}


@pytest.mark.parametrize("make", OF_OBJECTS.values(), ids=OF_OBJECTS)
def test_an_object_is_known_by_its_attributes(make: Any) -> None:
    few, again, many = map(make, (2, 2, 9))
    assert identity_of(few) == identity_of(again) != identity_of(many)
    inner = Sampler(2, partial(sir, num_proposals=5)), Sampler(2, Sampler(5))
    assert len({identity_of(it) for it in (*inner, Sampler(2))}) == 3


def test_use_of_an_object_leaves_its_identity() -> None:
    sampler = Sampler(2)
    before = identity_of(sampler)
    assert sampler.draw(standard_normal(2).expand((3,)), lambda z: z[..., 0]).z.shape == (3, 2)
    assert sampler.size == 3 and identity_of(sampler) == before
    base = MultivariateNormal(torch.zeros(2), torch.eye(2))
    before = identity_of(base.log_prob)
    assert base.precision_matrix.shape == (2, 2) and identity_of(base.log_prob) == before


OBJECTS = """
import torch
from functools import lru_cache, partial
from ncprior import sir

NUMBER = 3

class Settings:
    def __repr__(self):
        return f"Settings({NUMBER})"

class Sampler:
    def __init__(self):
        self.number = NUMBER
    def __call__(self, prior, log_ratio):
        return sir(prior, log_ratio, num_proposals=self.number)

@torch.no_grad()
def decorated(z):
    return z + NUMBER

@lru_cache
def cached(z):
    return z + NUMBER

few, settings, its = partial(sir, num_proposals=NUMBER), Settings(), Sampler()
torch.manual_seed(NUMBER)
network = torch.nn.Linear(1, 1)
"""


@pytest.mark.parametrize("name", ["decorated", "cached", "few", "settings", "its", "network"])
def test_objects_of_the_users_file_are_part_of_the_identity(name: str) -> None:
    text = f"{OBJECTS}\ndef sampler(prior, log_ratio):\n    return {name}\n"
    one, again, other = (user_file(it) for it in (text, text, text.replace("R = 3", "R = 4")))
    assert identity_of(one.sampler) == identity_of(again.sampler) != identity_of(other.sampler)


def test_functions_that_share_functions_are_described_once() -> None:
    """Every path to a function was followed: a million of them."""
    names = [f"f{i}" for i in range(60)]
    lines = [f"def {a}(z): return {b}(z), {c}(z)" for a, b, c in zip(names, names[1:], names[2:])]  # noqa: B905
    text = "\n".join([*lines, "def f58(z): return z", "def f59(z): return z"])
    one, other = user_file(text), user_file(text.replace("f59(z): return z", "f59(z): return -z"))
    assert identity_of(one.f0) != identity_of(other.f0)


def test_classes_of_functions_are_values() -> None:
    assert describe([FunctionType, int]) == identity_of([FunctionType, int]) == "(function, int)"


def test_a_function_may_be_of_no_file() -> None:
    names: dict[str, Any] = {}
    exec("n = 3\ndef sampler(prior, log_ratio): return n", names)  # noqa: S102
    before = identity_of(names["sampler"])
    names["n"] = 4
    assert identity_of(names["sampler"]) != before


COUNTING = """
class Counting:
    def __init__(self, m=5):
        self.m, self.calls = m, 0

    def __call__(self, prior, log_ratio):
        self.calls += 1

class Missing(dict):
    # which makes keys that it does not have, as addict's dictionary does
    def __getattr__(self, name):
        return self.setdefault(name, Missing())

CALLS, CONFIG = 0, Missing(m=3)

def counts(prior, log_ratio):
    global CALLS
    CALLS += 1
    return CONFIG["m"]
"""


def test_a_sampler_stays_the_same_by_use() -> None:
    module = user_file(COUNTING)
    sampler = module.Counting()
    before = identity_of(sampler), identity_of(module.counts)
    sampler(None, None), module.counts(None, None)
    assert (identity_of(sampler), identity_of(module.counts)) == before
    assert identity_of(module.Counting(6)) != identity_of(sampler)
    assert dict(module.CONFIG) == {"m": 3} and module.CALLS == 1


MODULES = """
import torch
from ncprior import sir

class Mine(torch.nn.Module):
    def __init__(self, n, sizes=None):
        super().__init__()
        self.n, self.sizes = n, sizes

    def forward(self, prior, log_ratio):
        return sir(prior, log_ratio, num_proposals=self.n)

class Listed:
    def __init__(self, sizes):
        self.sizes = sizes

    def __call__(self, prior, log_ratio):
        return sir(prior, log_ratio, num_proposals=self.sizes[0])
"""


def test_modules_and_lists_are_known_by_what_they_were_made_with() -> None:
    """Parts of one job were drawn with 1 and with 500 proposals."""
    one = user_file(MODULES)
    other = user_file(MODULES.replace("num_proposals=self.n)", "num_proposals=2 * self.n)"))
    made = [one.Mine(1), one.Mine(500), one.Mine(1, [2]), other.Mine(1)]
    made += [one.Listed(sizes) for sizes in ([5], [500], {"a": 5}, None)]
    assert len(set(map(identity_of, made))) == len(made)
    assert identity_of(one.Mine(1)) == identity_of(user_file(MODULES).Mine(1))
