"""A trained prior, and the directory it is saved in."""

from pathlib import Path

import pytest
from helpers.hub_problems import gaussian, trained

from ncprior import NCPrior


@pytest.fixture
def prior() -> NCPrior:
    return trained(gaussian())


@pytest.fixture
def saved(prior: NCPrior, tmp_path: Path) -> Path:
    prior.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"
