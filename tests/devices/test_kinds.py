"""VAEs of other kinds, adapters among them: the main capabilities of each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.device_vaes import KINDS, NEEDS, Kind, strays

from ncprior import NCPrior, fit, langevin, sir
from ncprior.adapters.hvae import HVAE
from ncprior.adapters.rae import RAE, VAE
from ncprior.diagnostics import diagnose
from ncprior.evaluation import log_likelihood, log_normaliser
from ncprior.jobs import read_parts, sample_parts
from ncprior.source import device_of
from ncprior.testing import check_source
from ncprior.training import FitSettings
from ncprior.utils.batches import take_rows
from ncprior.utils.require import floats_of_batch

SIR = partial(sir, num_proposals=5)

MALA = partial(langevin, num_steps=1, step_size=0.01, adjusted=True)

QUICK: dict[str, Any] = {"steps": 2, "eval_every": 2, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, on: torch.device) -> Kind:
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    if (request.param, on.type) == ("diffusers", "mps") and request.config.getoption("--emulated"):
        pytest.skip("the emulated device lacks MPS's own attention")
    torch.manual_seed(0)
    return KINDS[request.param](on)


@pytest.fixture(scope="module")
def heads(kind: Kind) -> NCPrior:
    torch.manual_seed(1)
    return NCPrior.for_source(kind.source, kind.batch, width=8, depth=1)


def test_the_source_keeps_the_laws(kind: Kind, on: torch.device) -> None:
    assert device_of(kind.source) == on
    check_source(kind.source, kind.batch, condition=kind.rows_of_condition)


@pytest.mark.parametrize("model", (RAE, VAE))
def test_losses_take_images_from_anywhere(model: type[RAE | VAE], on: torch.device) -> None:
    with torch.device(on):
        autoencoder = model("mnist", width=0.05)
    assert autoencoder.loss(torch.rand(2, 1, 32, 32, device="cpu")).device.type == on.type


def test_an_elbo_takes_images_from_anywhere(on: torch.device) -> None:
    x = torch.rand(2, 1, 28, 28, device="cpu").bernoulli()
    vae = HVAE(num_groups=2, width=16, hidden=8).to(on)
    assert vae.negative_elbo(x).device.type == on.type


def test_a_wrong_first_batch_is_told_again(on: torch.device) -> None:
    vae = torch.nn.Linear(1, 1)
    x = torch.rand(2, 1, device=on)
    for _ in range(2):
        with pytest.raises(ValueError, match="takes x in"):
            floats_of_batch("A VAE", 255 * (x + 1), "Scale x.", (0, 1), vae)
    assert floats_of_batch("A VAE", x, "Scale x.", (0, 1), vae) is x


@pytest.mark.parametrize("cache_epochs", (None, 1))
def test_heads_are_trained(
    cache_epochs: int | None, kind: Kind, heads: NCPrior, on: torch.device
) -> None:
    options = {**QUICK, "settings": FitSettings(cache_epochs=cache_epochs)}
    if cache_epochs and not kind.is_cached:
        with pytest.raises(TypeError, match="cache_epochs=None"):
            fit(heads, kind.data, held_out=[kind.batch], **options)
        return
    fit(heads, kind.data, held_out=[kind.batch], **options)
    assert not strays(list(heads.parameters()), on)


def test_draws_and_jobs(kind: Kind, heads: NCPrior, on: torch.device, tmp_path: Path) -> None:
    condition = _rows(kind, 8)
    for sampler in (SIR, MALA)[: 1 + kind.is_continuous]:
        assert not strays(heads.sample(8, sampler, condition=condition), on)
    job: dict[str, Any] = {"num_samples": 8, "part_size": 4, "progress": False}
    sample_parts(heads, tmp_path, sampler=SIR, condition=condition, **job)
    assert not strays(list(read_parts(tmp_path)), torch.device("cpu"))


def _rows(kind: Kind, count: int) -> Any:
    return take_rows(kind.rows_of_condition, slice(count))


def test_measures(kind: Kind, heads: NCPrior) -> None:
    diagnose(heads, [kind.batch], num_draws=32, num_proposals=(5, 10), fresh_steps=0)
    log_normaliser(heads, num_particles=10, replicates=2, condition=_rows(kind, 1))
    if kind.has_density:
        log_likelihood(heads, [kind.batch], num_samples=2, num_proposals=4)


def test_files(kind: Kind, heads: NCPrior, on: torch.device, tmp_path: Path) -> None:
    heads.save_pretrained(tmp_path)
    again = NCPrior.from_pretrained(kind.source, tmp_path)
    assert not strays(list(again.parameters()), on)
