"""Sampling within the components of a mixture base."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import GaussianPair, SampleOnly, SIRLaw
from scipy import stats
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import Draw, langevin, sir
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.mixture_em import fit_mixture
from ncprior.samplers.base import Sampler
from ncprior.samplers.mixture import within_components
from ncprior.samplers.smc import tempered_smc

FAR = 20.0
PAIR = GaussianPair(kl=4.0, dim=1)


def mixture(covariance: str = "full") -> GaussianMixture:
    torch.manual_seed(0)
    factor = torch.randn(3, 4, 4).tril(-1) + torch.eye(4) * torch.rand(3, 1, 4).add(0.5)
    scale = factor if covariance == "full" else factor.diagonal(dim1=1, dim2=2).contiguous()
    return GaussianMixture(torch.randn(3), torch.randn(3, 4), scale, event_shape=(2, 2))


def two_components() -> GaussianMixture:
    """2/5 of N(0, 1) and 3/5 of N(FAR, 1)."""
    return GaussianMixture(
        torch.tensor([2.0, 3.0]).log(), torch.tensor([[0.0], [FAR]]), torch.ones(2, 1)
    )


def log_r(z: Tensor) -> Tensor:
    """q leaves the first component as it is and moves the second away by a KL of 4 nats."""
    u = z[..., 0]
    return torch.where(u < FAR / 2, 0.0, PAIR.log_r(z - FAR))


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_rows_have_the_law_of_their_component(covariance: str) -> None:
    whole, count, means = mixture(covariance), 60_000, []

    def one_draw(prior: Any, log_ratio: Any) -> Draw:
        noise = prior.sample()
        assert noise.shape == (count, 2, 2)
        means.append(log_ratio(0 * noise))
        assert torch.equal(log_ratio(torch.stack([noise, noise]))[1], log_ratio(noise))
        return Draw(noise)

    z = within_components(one_draw)(whole.expand((count,)), lambda z: z.flatten(-2)).z.flatten(1)
    labels = torch.cdist(means[0], whole.loc).argmin(1)
    assert torch.equal(means[0], whole.loc[labels])
    scale = whole.scale if whole.is_full else torch.diag_embed(whole.scale)
    for j, weight in enumerate(whole.logits.softmax(0)):
        drawn, cov = z[labels == j], scale[j] @ scale[j].T
        n, variance = len(drawn), cov.diagonal()
        assert abs(n / count - weight) < 4.5 * math.sqrt(0.25 / count)
        assert ((drawn.mean(0) - whole.loc[j]).abs() < 4.5 * (variance / n).sqrt()).all()
        spread = (variance[:, None] * variance + cov.square()) / n
        assert ((drawn.T.cov() - cov).abs() < 4.5 * spread.sqrt()).all()


def test_best_of_m_takes_mass_from_hard_components_and_within_them_it_does_not() -> None:
    num_proposals, rows = 20, 20_000
    prior, sampler = two_components().expand((rows,)), partial(sir, num_proposals=num_proposals)
    u, step = PAIR.law.nodes, np.arange(-9.0, 9.0, 0.05)
    easy = np.exp(-0.5 * step**2)
    law = SIRLaw(
        np.concatenate([step, FAR + u]),
        np.concatenate([0.4 * easy / easy.sum(), 0.6 * PAIR.law.weight]),
        np.concatenate([0 * step, PAIR.law.log_r]),
    )
    expected = law.mean((law.nodes > FAR / 2).astype(float), num_proposals)
    assert expected < 0.45  # q gives it 0.6
    torch.manual_seed(0)
    shares = [
        (s(prior, log_r).z > FAR / 2).float().mean().item()
        for s in (sampler, within_components(sampler))
    ]
    error = 4.5 * math.sqrt(0.25 / rows)
    assert abs(shares[0] - expected) < error
    assert abs(shares[1] - 0.6) < error


def test_within_a_component_the_draw_has_the_samplers_own_law() -> None:
    num_proposals, rows = 50, 20_000
    torch.manual_seed(0)
    draw = within_components(partial(sir, num_proposals=num_proposals))(
        two_components().expand((rows,)), log_r
    )
    hard = draw.z[:, 0] > FAR / 2
    u = draw.z[hard, 0] - FAR
    nodes = PAIR.law.nodes
    exact = PAIR.law.mean(nodes, num_proposals)
    sd = math.sqrt(PAIR.law.mean((nodes - exact) ** 2, num_proposals))
    assert abs(u.mean().item() - exact) < 4.5 * sd / math.sqrt(len(u))
    assert draw.log_mean_weight is not None
    assert draw.log_mean_weight[~hard].abs().max() < 1e-5  # log Z_j of r = 1
    log_z = PAIR.law.mean_log_z(num_proposals)
    measured = draw.log_mean_weight[hard]
    assert abs(measured.mean().item() - log_z) < 4.5 * measured.std().item() / math.sqrt(len(u))


def test_chains_and_populations_stay_within_their_component_too() -> None:
    walk = partial(langevin, num_steps=40, step_size=0.8, adjusted=True)
    smc = partial(tempered_smc, num_particles=32)
    for sampler in (walk, smc):
        torch.manual_seed(0)
        z = within_components(sampler)(two_components().expand((1000,)), log_r).z[:, 0]
        hard = z > FAR / 2
        assert abs(hard.float().mean().item() - 0.6) < 4.5 * math.sqrt(0.25 / 1000)
        assert stats.kstest(z[~hard].numpy(), stats.norm().cdf).pvalue > 0.01
        exact = stats.norm(loc=FAR + PAIR.shift).cdf
        assert stats.kstest(z[hard].numpy(), exact).statistic < 0.2


def test_chains_walk_in_the_noise_of_their_component() -> None:
    """Where one direction is a thousand times as wide as another, and r moves both by one sd."""
    width = torch.tensor([0.001, 1.0])
    prior = GaussianMixture(torch.zeros(1), torch.zeros(1, 2), width[None]).expand((2000,))
    walk = partial(langevin, num_steps=40, step_size=0.8, adjusted=True)
    torch.manual_seed(0)
    z = within_components(walk)(prior, lambda z: (z / width).sum(-1)).z / width
    for u in z.T:
        assert stats.kstest(u.numpy(), stats.norm(loc=1.0).cdf).pvalue > 0.01


def test_where_expectation_maximisation_rests_every_component_has_z_of_one() -> None:
    torch.manual_seed(0)
    z = torch.cat([torch.randn(6000, 1).exp(), -3 + 0.5 * torch.rand(4000, 1)])  # no Gaussians
    fitted = fit_mixture(z, 3, max_steps=2000, tolerance=1e-9)
    # Z_j = E_q[p(j | z)] / π_j, with q the law of the encodings
    responsible = fitted.log_joint(z).softmax(1).mean(0)
    assert torch.allclose(responsible, fitted.logits.softmax(0), rtol=0.02)


def test_what_rows_of_several_components_cannot_share_is_refused() -> None:
    prior = two_components().expand((50,))
    for sampler in (
        partial(sir, num_proposals=9, share_proposals=True),
        partial(tempered_smc, num_particles=1, share_particles=True),
    ):
        with pytest.raises(ValueError, match=r"r\(z\) differs between rows"):
            within_components(sampler)(prior, lambda z: z[..., 0])


def test_other_priors_are_refused() -> None:
    sampler = within_components(partial(sir, num_proposals=5))
    for prior in (Independent(Normal(torch.zeros(3, 2), 1.0), 1), SampleOnly(PAIR.prior)):
        with pytest.raises(TypeError, match="needs a mixture base.*got (Independent|SampleOnly)"):
            sampler(prior, log_r)
    with pytest.raises(ValueError, match=r"batch shape \(B,\)"):
        sampler(two_components(), log_r)


@pytest.mark.parametrize(
    "sampler",
    [
        partial(sir, num_proposals=500),
        partial(tempered_smc, num_particles=1, num_moves=20, num_leapfrogs=3),
    ],
)
def test_latents_that_are_numbers(sampler: Sampler) -> None:
    """log r = z shifts both components by one."""
    scalars = GaussianMixture(
        torch.zeros(2), torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1), event_shape=()
    )
    torch.manual_seed(0)
    z = within_components(sampler)(scalars.expand((4000,)), lambda z: z).z
    assert z.shape == (4000,)
    assert abs((z - 9 * z.sign()).mean() - 1) < 4 / math.sqrt(4000)
