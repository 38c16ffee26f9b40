"""The rule notices all that it forbids, and nothing else."""

from __future__ import annotations

import ctypes
import faulthandler
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz.calls import TABLE, Call, Replacement, explore, smallest
from fuzz.files import in_child, load, of_bytes, valid_files
from fuzz.kinds import count, number, opened
from fuzz.rule import Finding, check
from fuzz.values import Value
from fuzz.world import World

from ncprior import NCPrior
from ncprior.utils.require import require_counts

INVALID: dict[str, tuple[str, bool | None]] = {"n": ("-1", False)}
VALID: dict[str, tuple[str, bool | None]] = {"n": ("3", True)}


def found(
    function: Callable[[World], Any],
    replaced: dict[str, tuple[str, bool | None]] = INVALID,
    *,
    trains: bool = False,
) -> list[str]:
    """The kinds of findings in a call that is made on a world."""
    world = World()
    try:
        world.folder  # noqa: B018 (made before the call)
        findings = check(
            "f",
            world,
            lambda: function(world),
            replaced,
            trains=trains,
            gated=True,
            limit=0.2,
        )
        return [finding.kind for finding in findings]
    finally:
        world.close()


def fails(world: World) -> None:
    """An exception of ours."""
    require_counts(n=-1)


def deeper(world: World) -> None:
    """An exception of torch, out of a file of ours."""
    NCPrior.for_source(world.source, world.x).log_r(0, None, None)  # type: ignore[arg-type]


def change_vae(world: World) -> None:
    world.vae.double()
    fails(world)


def change_gradient(world: World) -> None:
    for parameter in world.vae.parameters():
        parameter.grad = None


def change_heads(world: World) -> None:
    with torch.no_grad():
        next(world.prior.parameters()).add_(1)
    fails(world)


def change_strength(world: World) -> None:
    world.prior.strength = 0.5
    fails(world)


def leave_a_file(world: World) -> None:
    (world.folder / "left").touch()
    fails(world)


def draw(world: World) -> None:
    torch.rand(1)
    fails(world)


def switch(world: World) -> None:
    torch.set_grad_enabled(False)
    fails(world)


def users(world: World) -> None:
    world.vae.posterior(None)  # type: ignore[arg-type]


CASES: list[tuple[Callable[[World], Any], list[str]]] = [
    (fails, []),
    (lambda world: None, ["accepted in silence"]),
    (lambda world: {}["x"], ["cryptic"]),
    (lambda world: time.sleep(5), ["hang"]),
    (change_vae, ["the VAE changed"]),
    (change_gradient, ["the VAE changed", "accepted in silence"]),
    (change_heads, ["the prior changed"]),
    (change_strength, ["the prior changed"]),
    (leave_a_file, ["files changed"]),
    (draw, ["generators moved"]),
    (switch, ["switches changed"]),
    (users, []),
]


@pytest.mark.parametrize(("function", "kinds"), CASES)
def test_the_rule_notices(function: Callable[[World], Any], kinds: list[str]) -> None:
    try:
        assert found(function) == kinds
    finally:
        torch.set_grad_enabled(True)


def test_valid_calls_may_work_and_may_train_but_not_fail() -> None:
    def train(world: World) -> None:
        with torch.no_grad():
            next(world.prior.parameters()).add_(1)

    assert found(lambda world: None, VALID) == []
    assert found(fails, VALID) == ["refused though valid"]
    assert found(train, VALID) == ["the prior changed"]
    assert found(train, VALID, trains=True) == []


def test_a_function_without_a_gate_is_found_whatever_the_seed() -> None:
    def ungated(n: Any, scale: Any) -> Any:
        return torch.ones(3).sum() * scale

    entry = Call(
        "f", lambda world: (ungated, {"n": 3, "scale": 1.0}), {"n": count(), "scale": number(0)}
    )
    kinds = {(f.arguments, f.kind) for f in explore(entry, examples=40)}
    assert (("n",), "accepted in silence") in kinds
    assert (("scale",), "accepted in silence") in kinds


def test_the_smallest_of_a_group_is_kept() -> None:
    one = Finding("f", ("n",), "cryptic", ("nan",), "KeyError")
    longer, both = one._replace(values=("1e-30",)), one._replace(arguments=("n", "m"))
    assert smallest([both._replace(values=("nan", "3")), longer, one]) == [one]


def test_kinds_say_what_is_valid() -> None:
    assert count().verdict(3) and count(none=True).verdict(None)
    assert all(count().verdict(wrong) is False for wrong in (True, 0, 2.0, "3", None))
    assert number(0, 1).verdict(0.5) and number(0, 1).verdict(float("nan")) is False
    assert opened(count()).verdict("text") is None
    assert Replacement("n", Value("3", lambda w, v: 3)).argument == "n"
    assert all(entry.name == name for name, entry in TABLE.items())


def test_a_process_that_dies_or_hangs_is_a_finding() -> None:
    def crash() -> dict[str, Any]:
        faulthandler.disable()  # which would print where it happened
        ctypes.string_at(0)
        return {}

    assert in_child(crash)["kinds"] == ["crash"]
    assert in_child(lambda: time.sleep(60) or {}, seconds=0.5)["kinds"] == ["hang"]


def test_files_are_damaged_and_judged() -> None:
    kind = "a part"
    assert load(kind, ("cut", lambda data: data[:100])) == []  # a ValueError of ours
    content = next(iter(valid_files(kind).values()))
    assert of_bytes() is not None and len(content) > 100
