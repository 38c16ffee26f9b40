"""Random states of all generators: kept, restored, and checked before they are."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ncprior.utils.random_state import (
    is_generator_state,
    is_random_state,
    random_state,
    seeded,
    set_random_state,
)


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_a_state_brings_back_the_draws() -> None:
    draws()
    state = random_state()
    first = draws()
    assert is_random_state(state)
    set_random_state(state)
    assert draws() == first


def test_seeded_draws_are_the_same_and_leave_the_generators() -> None:
    state = random_state()
    expected = draws()
    set_random_state(state)
    found = []
    for seed in (3, 3 + 2**32, 4):
        with seeded(seed):
            found.append(draws())
    assert found[0] == found[1] != found[2]
    assert draws() == expected


@pytest.mark.parametrize("count", [0, 1, 622, 623, 624, 625, 3000])
def test_states_at_any_position_are_whole(count: int) -> None:
    torch.manual_seed(count)
    for _ in range(count):
        torch.rand(())
    np.random.rand(count)
    assert is_random_state(random_state())


class Device:
    """A module of torch, such as ``torch.xpu``, with generators of devices that do not exist."""

    def __init__(self, count: int = 2) -> None:
        self.states = [torch.full((16,), i, dtype=torch.uint8) for i in range(count)]

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return len(self.states)

    def manual_seed_all(self, seed: int) -> None:
        for state in self.states:
            state.fill_(seed % 256)

    manual_seed = manual_seed_all

    def get_rng_state_all(self) -> list[Tensor]:
        return [state.clone() for state in self.states]

    def get_rng_state(self) -> Tensor:
        return self.states[0].clone()

    def set_rng_state(self, state: Tensor, device: int = 0) -> None:
        self.states[device] = state.clone()


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_GS2_GS3_generators_of_every_accelerator_are_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(1 if name == "mps" else 2)
    monkeypatch.setattr(torch, name, device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: name == "mps")
    before = device.get_rng_state_all()
    with seeded(3):
        assert all((state == 3).all() for state in device.states)
    assert all(map(torch.equal, device.states, before))
    assert is_random_state(random_state())


def test_a_device_that_is_used_for_the_first_time_inside_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`torch.manual_seed` seeds it before, and a seed inside must not replace that one."""
    monkeypatch.setattr(torch, "cuda", device := Device())
    monkeypatch.setattr(device, "is_initialized", lambda: False)
    torch.default_generator.manual_seed(7)
    with seeded(3):
        assert (device.states[1] == 1).all()
        monkeypatch.setattr(device, "is_initialized", lambda: True)
        device.states[0].fill_(5)  # drawn from
    assert all((state == 7).all() for state in device.states)


def test_the_seed_that_waits_for_cuda_stays() -> None:
    """The last one that is queued is what its generators begin with."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use")
    torch.manual_seed(11)
    before = [str(call) for call in vars(torch.cuda._lazy_seed_tracker).values()]
    with seeded(3):
        pass
    assert [str(call) for call in vars(torch.cuda._lazy_seed_tracker).values()] == before
    assert torch.initial_seed() == 11


def test_GC4_states_of_more_devices_than_there_are_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = random_state()
    monkeypatch.setattr(torch, "cuda", device := Device(1))
    set_random_state({**state, "cuda": [torch.full((16,), i, dtype=torch.uint8) for i in (5, 6)]})
    assert len(device.states) == 1 and (device.states[0] == 5).all()
    monkeypatch.setattr(torch, "cuda", device := Device(0))
    set_random_state({**state, "cuda": [torch.zeros(16, dtype=torch.uint8)]})
    assert not device.states


@pytest.mark.parametrize("value", [None, [], {}, {"torch": 1}, "x", 3])
def test_F1_what_is_no_state_is_seen(value: Any) -> None:
    assert not is_random_state(value)
    assert not is_generator_state(value)
    assert not is_generator_state(torch.zeros(5056, dtype=torch.uint8))
