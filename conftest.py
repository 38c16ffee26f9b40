"""What every test and doctest shares: one thread, seed 0, generators put back, and options."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--device", help="also run the checks of devices, on cuda, cuda:1 or mps")
    parser.addoption("--data-on-device", action="store_true", help="with their data there, too")
    parser.addoption("--emulated", action="store_true", help="on an emulated device of that name")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # small tensors: more threads are slower, and results would differ
    if config.getoption("--emulated"):
        from helpers.emulated_device.install import install

        install(torch.device(config.getoption("--device")).type)  # before anything asks for it


def pytest_collection() -> None:
    from ncprior import NCPrior  # noqa: F401 (before a file of it is collected and imported twice)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Seed 0 for torch, NumPy and Python; afterwards their generators are as they were."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        yield
    np.random.set_state(numpy_state)
    random.setstate(python_state)


@pytest.fixture(autouse=True)
def doctest_names(request: pytest.FixtureRequest, seeded: None) -> None:
    """Gives doctests torch's usual names, a small `vae`, its `source`, a new `prior`, and 4 rows of `x`."""
    if isinstance(request.node, pytest.DoctestItem):
        names: dict[str, Any] = request.getfixturevalue("doctest_namespace")
        names.update(torch=torch, nn=nn, Independent=Independent, Normal=Normal)
        names.update(_small_vae())
        torch.manual_seed(0)


def _small_vae() -> dict[str, Any]:
    # Imported here, so that coverage sees it.
    from ncprior import NCPrior, SingleGroup
    from ncprior.heads.networks import MLPHead

    vae = nn.ModuleDict({"encoder": nn.Linear(3, 4), "decoder": nn.Linear(2, 3)}).eval()

    def posterior(x: Tensor) -> Independent:
        mean, log_var = vae["encoder"](x).chunk(2, dim=-1)
        return Independent(Normal(mean, (0.5 * log_var).exp()), 1)

    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)

    def likelihood(z: Tensor) -> Independent:
        return Independent(Normal(vae["decoder"](z), 1.0), 1)

    source = SingleGroup(base, posterior, vae["decoder"], module=vae, likelihood=likelihood)
    prior = NCPrior(source, MLPHead((2,)))
    return {"vae": vae, "source": source, "prior": prior, "x": torch.randn(4, 3)}
