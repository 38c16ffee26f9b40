"""Energies on images: chains, training and files on the device."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.device_vaes import strays
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCPrior, SingleGroup, sir
from ncprior.evaluation import ood_score
from ncprior.heads import MLPHead
from ncprior.vaebm import VAEBM, EnergySettings, GaussianDecoder, fit_vaebm

SIR = partial(sir, num_proposals=5)

QUICK: dict[str, Any] = {"steps": 4, "eval_every": 2, "batch_size": 32, "progress": False}


def energy(on: torch.device) -> MLPHead:
    torch.manual_seed(5)
    return MLPHead((6,), width=8, depth=1).to(on)


def test_chains_run_on_the_device(prior: NCPrior, on: torch.device) -> None:
    model = VAEBM(prior, energy(on), num_steps=2)
    assert not strays(model.sample(8, sampler=SIR), on)
    assert not strays(model.sample(8, sampler=SIR, adjusted=True), on)


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "bfloat16, noise, a buffer": (
        {"precision": torch.bfloat16, "data_noise": 0.3},
        {"settings": EnergySettings(buffer_size=64)},
    ),
    "contrast of means": ({}, {"settings": EnergySettings(contrast="mean")}),
}


@pytest.mark.parametrize("form", FORMS)
def test_energies_are_trained(form: str, prior: NCPrior, x: Tensor, on: torch.device) -> None:
    kind, options = FORMS[form]
    net = energy(on)
    data = DataLoader(TensorDataset(x), 32) if kind else x
    fit_vaebm(VAEBM(prior, net, num_steps=2, **kind), data, sampler=SIR, **options, **QUICK)
    assert not strays(list(net.parameters()), on)


def test_an_energy_on_the_cpu_is_named(prior: NCPrior, x: Tensor) -> None:
    with pytest.raises(ValueError, match="must be on one device"):
        fit_vaebm(VAEBM(prior, energy(torch.device("cpu")), num_steps=2), x, **QUICK)


def test_a_training_is_resumed_bit_for_bit(
    source: SingleGroup, x: Tensor, on: torch.device, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(row: Any) -> None:
        if row.step == 4:
            raise Stop

    def trained(file: Path | None, **options: Any) -> MLPHead:
        net = energy(on)
        torch.manual_seed(6)
        options |= {"checkpoint": file, "checkpoint_every": 2}
        options["settings"] = EnergySettings(buffer_size=40)
        fit_vaebm(VAEBM(source, net, num_steps=2), x, **options, **QUICK)
        return net

    whole, file = trained(None), tmp_path / "e.safetensors"
    with pytest.raises(Stop):
        trained(file, callback=stop)
    pairs = zip(whole.parameters(), trained(file).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_scores_and_files(prior: NCPrior, x: Tensor, on: torch.device, tmp_path: Path) -> None:
    model = VAEBM(prior, energy(on), num_steps=2)
    ood_score(model, x[:20], num_samples=8)
    model.save_pretrained(tmp_path)
    again = VAEBM.from_pretrained(prior, tmp_path)
    assert not strays((list(again.parameters()), again.sample(4, sampler=SIR)), on)


def test_a_noise_of_the_decoder(source: SingleGroup, x: Tensor, on: torch.device) -> None:
    noisy = GaussianDecoder.fitted(source, x)
    assert not strays(VAEBM(noisy, energy(on), num_steps=2).sample(4), on)
