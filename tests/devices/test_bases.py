"""Bases: fitted where the encodings are, used where the VAE is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.device_vaes import hierarchical, strays
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCPrior, SingleGroup, fit, langevin, sir
from ncprior.bases import (
    Empirical,
    GaussianMixture,
    active_latents,
    fit_flow,
    fit_flow_matching,
    fit_flows,
    fit_gaussian,
    fit_mixture,
    fit_vamp,
    kl_per_latent,
    latents_of,
    rebase,
)
from ncprior.diagnostics import diagnose, match_strength, recommend_sampler
from ncprior.evaluation import log_normaliser
from ncprior.samplers import Sampler, independence, rejection, tempered_smc, within_components
from ncprior.source import device_of

SIR = partial(sir, num_proposals=5)

MALA = partial(langevin, num_steps=1, step_size=0.05, adjusted=True)

SMC = partial(tempered_smc, num_particles=4)

WALKED: tuple[Sampler, ...] = (SIR, MALA)

WITHIN: tuple[Sampler, ...] = (
    *(SIR, MALA, SMC, within_components(SIR), within_components(MALA)),
    *(partial(independence, num_steps=4), partial(rejection, log_bound=1.0, max_tries=3)),
)


def _mixture(covariance: str) -> Callable[[SingleGroup, Tensor, Tensor], Any]:
    return lambda source, x, z: fit_mixture(z, 3, covariance=covariance, starts=1, max_steps=3)


def _sklearn(source: SingleGroup, x: Tensor, z: Tensor) -> GaussianMixture:
    theirs = pytest.importorskip("sklearn.mixture").GaussianMixture(2, random_state=0)
    return GaussianMixture.from_sklearn(theirs.fit(z.cpu().numpy())).to(z.device)


def _flow(source: SingleGroup, x: Tensor, z: Tensor) -> Any:
    pytest.importorskip("zuko")
    return fit_flow(z, steps=2, progress=False)


def _matching(source: SingleGroup, x: Tensor, z: Tensor) -> Any:
    return fit_flow_matching(z, width=8, depth=1, num_steps=2, steps=3, progress=False)


BASES: dict[str, tuple[Callable[[SingleGroup, Tensor, Tensor], Any], tuple[Sampler, ...]]] = {
    "Gaussian": (lambda source, x, z: fit_gaussian(z), WALKED),
    "diagonal Gaussian": (lambda source, x, z: fit_gaussian(z, covariance="diagonal"), WALKED),
    "mixture": (_mixture("full"), WITHIN),
    "diagonal mixture": (_mixture("diagonal"), WITHIN),
    "mixture of scikit-learn": (_sklearn, WALKED),
    "VampPrior": (lambda source, x, z: fit_vamp(source, x, 3, steps=2, progress=False), WALKED),
    "flow": (_flow, (SIR,)),
    "flow matching": (_matching, (SIR, WITHIN[-1])),
    "encodings": (lambda source, x, z: Empirical(z), (SIR,)),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_stay_on_the_device(
    name: str,
    source: SingleGroup,
    new: Callable[..., NCPrior],
    x: Tensor,
    z: Tensor,
    on: torch.device,
    tmp_path: Path,
) -> None:
    make, samplers = BASES[name]
    closer = rebase(source, make(source, x, z))
    assert device_of(closer) == on
    prior = new(closer)
    fit(prior, x, held_out=x[:40], steps=2, batch_size=64, progress=False)
    for sampler in samplers:
        assert not strays(prior.sample(8, sampler), on)
    if name == "encodings":  # which are not saved
        return
    prior.save_pretrained(tmp_path)
    again = NCPrior.from_pretrained(source, tmp_path)
    assert device_of(again.source) == on
    torch.manual_seed(0)
    first = prior.sample(8, SIR).x
    torch.manual_seed(0)
    assert torch.allclose(first, again.sample(8, SIR).x, atol=1e-5)


def test_flows_of_groups_stay_on_the_device(on: torch.device) -> None:
    pytest.importorskip("zuko")
    kind = hierarchical(on)
    closer = rebase(kind.source, fit_flows(kind.source, kind.batch, steps=2, progress=False))
    assert device_of(closer) == on
    prior = NCPrior.for_source(closer, kind.batch, width=8, depth=1)
    fit(prior, kind.batch, steps=2, patience=None, progress=False)
    assert not strays(prior.eval().sample(8, SIR), on)


def test_heads_on_a_mixture_are_measured(
    source: SingleGroup, new: Callable[..., NCPrior], x: Tensor, z: Tensor, on: torch.device
) -> None:
    prior = new(rebase(source, _mixture("full")(source, x, z)))
    report = diagnose(prior, x, num_draws=200, num_proposals=(5, 10))
    recommended = recommend_sampler(report, budget=20).sampler
    assert not strays(prior.sample(8, recommended), on)
    match_strength(prior, x, within_components(SIR), progress=False)
    log_normaliser(prior, num_particles=20, replicates=2)


def test_encodings_are_on_the_vaes_device(
    source: SingleGroup, x: Tensor, on: torch.device
) -> None:
    assert not strays(latents_of(source, x), on)
    assert not strays(latents_of(source, DataLoader(TensorDataset(x), 50), of="means"), on)
    active_latents(source, x)
    kl_per_latent(source, x)
