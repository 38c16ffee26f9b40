"""Where the VAE and the data are; the checks of devices are collected for `--device` alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.device_vaes import flat, rows
from helpers.emulated_device.waits import Waits, counted
from torch import Tensor

from ncprior import NCPrior, SingleGroup, fit
from ncprior.bases import flow_matching, latents_of
from ncprior.training import held_out

DRIVER = "test_emulated.py"  # runs the others in processes of their own


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    on_cpu = config.getoption("--device") is None
    is_check = collection_path.name.startswith("test_") and collection_path.name != DRIVER
    is_wrong = is_check if on_cpu else collection_path.name == DRIVER
    return True if is_wrong else None


@pytest.fixture(scope="session")
def on(pytestconfig: pytest.Config) -> torch.device:
    """Where the VAE is."""
    device = torch.device(pytestconfig.getoption("--device"))
    if device.index is None:  # tensors say which one they are on
        device = torch.empty(0, device=device).device
    return device


@pytest.fixture(scope="session")
def source(on: torch.device) -> SingleGroup:
    """A VAE of one group."""
    torch.manual_seed(0)
    return flat(on)


@pytest.fixture(scope="session")
def x(pytestconfig: pytest.Config, on: torch.device) -> Tensor:
    """Its data, on the CPU if not asked otherwise."""
    return rows().to(on if pytestconfig.getoption("--data-on-device") else "cpu")


@pytest.fixture(scope="session")
def new(source: SingleGroup, x: Tensor) -> Callable[..., NCPrior]:
    """Makes a new prior of the VAE, or of another source."""

    def make(of: Any = source) -> NCPrior:
        torch.manual_seed(1)
        return NCPrior.for_source(of, x[:64], width=8, depth=1)

    return make


@pytest.fixture(scope="session")
def prior(new: Callable[..., NCPrior], x: Tensor) -> NCPrior:
    """A trained prior, which no check may change."""
    made = new()
    fit(made, x, held_out=x[:40], steps=40, learning_rate=1e-2, eval_every=40, progress=False)
    return made


@pytest.fixture(scope="session")
def z(source: SingleGroup, x: Tensor) -> Tensor:
    """Encodings of the data."""
    return latents_of(source, x)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures by few draws: devices are tried here, not numbers."""
    monkeypatch.setattr(held_out, "_HELD_OUT_DRAWS", 64)
    monkeypatch.setattr(flow_matching, "_HELD_OUT_DRAWS", 64)


@pytest.fixture
def waits(pytestconfig: pytest.Config) -> Callable[[], AbstractContextManager[Waits]]:
    """Counts waits of the host for the device in a block of code."""
    return partial(counted, emulated=pytestconfig.getoption("--emulated"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    untrained = pytest.mark.filterwarnings("ignore:Reconstructions of a row are no closer")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(untrained)
