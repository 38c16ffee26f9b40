"""Diagnosis, likelihoods and distances, of data that lie anywhere."""

from __future__ import annotations

from functools import partial

import torch
from helpers.device_vaes import strays
from torch import Tensor

from ncprior import NCPrior, SingleGroup, sir
from ncprior.diagnostics import diagnose, match_strength, recommend_sampler
from ncprior.evaluation import (
    auroc,
    auroc_gain,
    frechet_distance,
    gap_closed,
    log_likelihood,
    log_normaliser,
    mmd,
    near_copies,
    ood_score,
    precision_recall,
    two_sample_test,
)

SIR = partial(sir, num_proposals=20)

CPU = torch.device("cpu")


def test_diagnosis_and_what_it_recommends(prior: NCPrior, x: Tensor, on: torch.device) -> None:
    report = diagnose(prior, x, train=x[:80], num_draws=200, fresh_steps=8)
    assert "group 0" in str(report)
    for budget in (20, 500):
        recommended = recommend_sampler(report, budget=budget).sampler
        assert not strays(prior.sample(8, recommended), on)


def test_heads_without_weights_are_diagnosed(source: SingleGroup, x: Tensor) -> None:
    class Slope(torch.nn.Module):
        def forward(self, z: Tensor, context: None = None) -> Tensor:
            return 0.1 * z[..., 0]

    diagnose(NCPrior(source, Slope()), x, num_draws=200, num_proposals=(5, 10), fresh_steps=0)


def test_the_strength_is_matched(prior: NCPrior, x: Tensor) -> None:
    before = prior.strength
    match_strength(prior, x, SIR, progress=False)
    prior.strength = before


def test_the_normaliser_and_likelihoods(prior: NCPrior, x: Tensor) -> None:
    log_z = log_normaliser(prior, num_particles=50, replicates=2)
    log_normaliser(prior, num_particles=20, num_temperatures=3, replicates=2)
    found = log_likelihood(prior, x[:20], num_samples=16, num_proposals=9, log_z=log_z)
    pools = {"num_pools": 2, "share_pools": True}
    found |= log_likelihood(prior, x[:20], num_samples=8, num_proposals=9, **pools)
    assert not strays([(it.lower, it.upper) for it in found.values()], CPU)


def test_distances_of_features_on_two_devices(prior: NCPrior, on: torch.device) -> None:
    draws = [prior.sample(60, SIR).x for _ in range(16)]
    arms = {"base": [3 * t for t in draws[:5]], "ours": draws[5:10], "posterior": draws[10:15]}
    gap_closed(draws[15].cpu(), num_resamples=5, **arms)
    gap_closed(draws[15], num_resamples=5, **arms)
    for measure in (frechet_distance, precision_recall, mmd):
        measure(draws[0], draws[1])
        measure(draws[0].cpu(), draws[1])


def test_tests_of_two_samples_and_copies(prior: NCPrior, x: Tensor) -> None:
    drawn = prior.sample(100, SIR).x
    two_sample_test(x[:100], drawn, folds=2)
    near_copies(x[:60], x[60:120], drawn)


def test_scores_of_outliers(prior: NCPrior, x: Tensor) -> None:
    inside, outside = (ood_score(prior, rows, num_samples=8) for rows in (x[:20], 3 + x[20:40]))
    auroc(inside.total, outside.total)
    auroc_gain(inside.total, [outside.total], than=(inside.vae, [outside.vae]))
