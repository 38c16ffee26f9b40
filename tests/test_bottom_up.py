"""Posteriors that are drawn in another order than the prior: encode draws, the groups replay."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers.bottom_up import COVARIANCE, BottomUp, Code, evidence, heads, law_of_z, log_r
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import NCPrior, fit, sir
from ncprior.data import CachedEncodings
from ncprior.distributions import PointMass, build, parameters
from ncprior.evaluation import log_likelihood
from ncprior.source import sample_posterior
from ncprior.testing import check_source


def test_the_source_keeps_the_rules() -> None:
    check_source(BottomUp(), BottomUp().data(16))


def test_encodings_have_the_aggregate_posterior() -> None:
    latents, _ = sample_posterior(BottomUp(), BottomUp().data(40_000))
    z = torch.cat(latents, 1).double()
    covariance = torch.tensor(COVARIANCE)
    diagonal = covariance.diagonal()
    error = ((covariance**2 + diagonal[:, None] * diagonal) / len(z)).sqrt()
    assert ((z.mT @ z / len(z) - covariance).abs() < 4.5 * error).all()


def test_exact_heads_draw_the_aggregate_posterior() -> None:
    prior = NCPrior(BottomUp(), heads()).eval()
    z = torch.cat(prior.sample(8000, partial(sir, num_proposals=100)).latents, 1).double()
    law = law_of_z()
    for power in (1, 2):
        values = z[:, 0] ** power
        exact = law.mean(law.nodes**power, 100)
        assert abs(values.mean().item() - exact) < 4.5 * values.std().item() / math.sqrt(len(z))
    ours = z.mT @ z / len(z)
    assert (ours - torch.tensor(COVARIANCE)).abs().max() < 0.06  # 4.5 errors and a bias of 1/M


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # the VAE is noisy
def test_heads_learn_the_ratios() -> None:
    source = BottomUp()
    prior = NCPrior.for_source(source, source.data(256), width=16, depth=0)
    fit(prior, source.data(3000), steps=120, learning_rate=1e-2, progress=False)
    latents, _ = sample_posterior(source, source.data(1000))
    ours = prior.log_ratio(latents)
    for k in range(3):
        context = torch.cat(latents[:k], 1) if k else None
        exact = log_r(k, latents[k], context)
        assert torch.corrcoef(torch.stack([ours[:, k], exact]))[0, 1] > 0.9


def test_the_weights_are_unbiased() -> None:
    x = torch.full((4000, 1), 0.8)
    ratio = (log_likelihood(BottomUp(), x, num_samples=1)["base"].lower - evidence(x)).exp()
    assert abs(ratio.mean().item() - 1) < 4.5 * ratio.std().item() / math.sqrt(len(x))


def test_every_draw_of_the_likelihood_encodes_anew() -> None:
    """The bound rises towards log p(x) with S; with one encoding for all, it would stay the ELBO."""
    x = BottomUp().data(200)
    gaps = [
        (evidence(x) - log_likelihood(BottomUp(), x, num_samples=s)["base"].lower).mean().item()
        for s in (1, 200)
    ]
    assert gaps[0] > 0.2
    assert abs(gaps[1]) < 0.03


class Elsewhere(BottomUp):
    """Says that z has the density of another draw."""

    def encode(self, x: Tensor) -> Code:
        code = super().encode(x)
        return code._replace(log_q_z=code.log_q_z.flip(0))


def test_a_wrong_log_density_is_seen_in_the_likelihood() -> None:
    x = torch.full((4000, 1), 0.8)
    ratio = (log_likelihood(Elsewhere(), x, num_samples=1)["base"].lower - evidence(x)).exp()
    assert abs(ratio.mean().item() - 1) > 4.5 * ratio.std().item() / math.sqrt(len(x))


def test_a_replayed_draw() -> None:
    q = Independent(Normal(torch.randn(5, 2), 1.0), 1)
    z = q.sample()
    replayed = PointMass(z, q.log_prob(z))
    assert replayed.sample((3,)).shape == (3, 5, 2)
    assert torch.equal(replayed.mean, z)
    other = z.clone()
    other[1, 0] += 1
    log_p = replayed.log_prob(torch.stack([z, other]))
    assert torch.equal(log_p[0], q.log_prob(z))
    assert log_p[1, 1] == -math.inf
    assert torch.isfinite(log_p[1]).sum() == 4
    tree = parameters(replayed)
    assert tree is not None
    again = build(tree)
    assert torch.equal(again.sample(), z)
    assert torch.equal(again.log_prob(z), q.log_prob(z))
    with pytest.raises(ValueError, match=r"log_q must have shape \(B,\).*sums over the axes"):
        PointMass(z, Normal(torch.zeros(5, 2), 1.0).log_prob(z))
    with pytest.raises(TypeError, match="z must be of type Tensor"):
        PointMass([0.0], q.log_prob(z))  # type: ignore[arg-type]


def test_codes_and_scalars_are_replayed() -> None:
    z = torch.tensor([3, 1, 4])
    replayed = PointMass(z, torch.zeros(3))
    assert replayed.event_shape == ()
    assert replayed.log_prob(z + torch.tensor([0, 1, 0])).tolist() == [0.0, -math.inf, 0.0]


def test_a_cache_of_encodings_renews_the_draws() -> None:
    cache = CachedEncodings(BottomUp(), BottomUp().data(8), batch_size=4, seed=0)

    def first_group() -> Tensor:
        rows = cache[torch.arange(8)]
        q = cache.source.group(cache.source.start(8, rows)).posterior
        assert q is not None
        return q.sample()

    z = first_group()
    assert torch.equal(first_group(), z)
    cache.renew(1)
    assert not torch.equal(first_group(), z)
