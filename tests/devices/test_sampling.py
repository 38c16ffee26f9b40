"""Samplers, jobs and files: draws are on the VAE's device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.device_vaes import flat, strays

from ncprior import NCPrior, SingleGroup, langevin, sir
from ncprior.bases import JointSource
from ncprior.jobs import read_parts, sample_parts
from ncprior.samplers import (
    Sampler,
    at_temperature,
    budgeted_rejection,
    independence,
    rejection,
    sequence,
    tempered_smc,
)
from ncprior.training import nested

SIR = partial(sir, num_proposals=20)

MALA = partial(langevin, num_steps=2, step_size=0.05, adjusted=True)

SAMPLERS: dict[str, Sampler] = {
    "sir": SIR,
    "sir in chunks": partial(sir, num_proposals=100, chunk_size=64),
    "shared proposals": partial(sir, num_proposals=50, share_proposals=True),
    "budgeted": partial(budgeted_rejection, num_proposals=20, chunk_size=64),
    "pool": partial(budgeted_rejection, num_proposals=20, chunk_size=64, share_proposals=True),
    "ula": partial(langevin, num_steps=2, step_size=0.05),
    "mala": MALA,
    "smc": partial(tempered_smc, num_particles=8),
    "shared particles": partial(tempered_smc, num_particles=1, share_particles=True),
    "rejection": partial(rejection, log_bound=0.5, max_tries=5),
    "independence": partial(independence, num_steps=20, chunk_size=64),
    "temperature": at_temperature(SIR, 0.7),
    "sequence": sequence(SIR, MALA),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_on_the_device(name: str, prior: NCPrior, on: torch.device) -> None:
    assert not strays(prior.sample(8, SAMPLERS[name]), on)


def test_chains_start_where_they_are_told_to(prior: NCPrior, on: torch.device) -> None:
    for init in (torch.zeros(8, 3, device=on), torch.zeros(8, 3)):
        for sampler in (partial(MALA, init=init), partial(independence, num_steps=3, init=init)):
            assert not strays(prior.sample(8, sampler), on)


def test_products_in_bfloat16(prior: NCPrior, on: torch.device) -> None:
    prior.precision = torch.bfloat16
    try:
        assert not strays(prior.sample(8, SIR), on)
    finally:
        prior.precision = torch.float32


def test_a_disabled_prior_is_the_base(prior: NCPrior, source: SingleGroup) -> None:
    with prior.disabled():
        torch.manual_seed(3)
        z = prior.sample(8, SIR).latents[0]
    torch.manual_seed(3)
    assert torch.equal(z, source.group(source.start(8)).prior.sample())


def test_draws_of_x_and_log_ratios(prior: NCPrior, on: torch.device) -> None:
    assert not strays(prior.sample(8, SIR, draw_x=True), on)
    assert not strays(prior.log_ratio([torch.randn(5, 3)]), on)  # z comes from anywhere


def test_stages_of_one_anothers_draws(
    prior: NCPrior, new: Callable[..., NCPrior], on: torch.device
) -> None:
    assert not strays(new(nested(prior, SIR)).sample(8, SIR), on)
    prior.sampler = SIR
    assert not strays(new(JointSource(prior)).sample(8, SIR), on)


def test_jobs_write_what_a_draw_returns(prior: NCPrior, tmp_path: Path) -> None:
    sample_parts(prior, tmp_path, num_samples=12, sampler=SIR, part_size=8, progress=False)
    parts = list(read_parts(tmp_path))
    assert [len(part["x"]) for part in parts] == [8, 4]
    assert not strays(parts, torch.device("cpu"))


def test_files_go_from_device_to_device(
    prior: NCPrior, source: SingleGroup, on: torch.device, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    on_cpu: Any = flat(torch.device("cpu"))
    prior.save_pretrained(tmp_path / "a")
    there = NCPrior.from_pretrained(on_cpu, tmp_path / "a")
    assert not strays((list(there.parameters()), there.sample(4, SIR)), torch.device("cpu"))
    there.save_pretrained(tmp_path / "b")
    back = NCPrior.from_pretrained(source, tmp_path / "b")
    assert not strays((list(back.parameters()), back.sample(4, SIR)), on)
    for a, b in zip(prior.parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b)
