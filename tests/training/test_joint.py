"""One head for all groups together, on a pair whose joint ratio is known."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.problems import Codes, CorrelatedPair, ExactRatio
from scipy import stats
from torch import Tensor

from ncprior import NCPrior, fit, sir
from ncprior.adapters.hvae import HVAE, HVAESource
from ncprior.heads import MLPHead
from ncprior.source import sample_posterior
from ncprior.training import FitSettings, JointSource

ONE = partial(sir, num_proposals=1)


def untrained() -> NCPrior:
    """The base: z_1 and z_2 are independent."""
    problem = CorrelatedPair()
    return NCPrior(problem, problem.heads(scale=0.0))


def log_r(z: Tensor) -> Tensor:
    return CorrelatedPair().log_r(z[..., 1:], z[..., :1])


def correlation(z: tuple[Tensor, ...]) -> float:
    return torch.corrcoef(torch.cat(z, 1).T)[0, 1].item()


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # of a VAE that is not trained
def test_a_joint_latent_is_a_walk_with_its_mean() -> None:
    torch.manual_seed(0)
    source = HVAESource(HVAE(num_groups=3, width=16, hidden=8).eval())
    joint = JointSource(
        NCPrior.for_source(source, torch.rand(32, 1, 28, 28).round(), width=8), ONE
    )
    x = torch.rand(5, 1, 28, 28).round()
    torch.manual_seed(1)
    latents, walked = sample_posterior(source, x)
    torch.manual_seed(1)
    state = joint.start(5, joint.encode(x))
    posterior = joint.group(state).posterior
    assert posterior is not None
    z = posterior.sample()
    assert all(map(torch.equal, joint.latents(z), latents))
    state = joint.advance(state, z)
    assert torch.equal(joint.decode(state), source.decode(walked))
    assert torch.equal(joint.likelihood(state).mean, source.likelihood(walked).mean)
    proposals = joint.group(joint.start(5)).prior.sample((2,))
    assert proposals.shape == (2, 5, 3 * 2 * 4 * 4 + 28 * 28)
    assert joint.features(0, proposals).shape == (2, 5, 1, 28, 28)
    assert len(proposals.flatten(0, 1).unique(dim=0)) == 10  # a walk for each proposal and row


def test_proposals_are_walked_one_after_another_so_that_memory_does_not_grow() -> None:
    sizes = []

    def counted(prior: Any, log_ratio: Any) -> Any:
        sizes.append(prior.batch_shape[0])
        return ONE(prior, log_ratio)

    first = untrained()
    joint = JointSource(first, counted)
    sizes.clear()
    joint.group(joint.start(5)).prior.sample((3,))
    assert sizes == [5] * 6  # three walks through two groups


def test_the_exact_joint_ratio_correlates_the_groups() -> None:
    """Resampling M walks leaves about (E_p[r^2] - 1) / M of the correlation missing: 0.018."""
    torch.manual_seed(0)
    first = untrained()
    assert abs(correlation(first.sample(4000, ONE).latents)) < 4 / math.sqrt(4000)
    joint = JointSource(first, ONE)
    whole = NCPrior(joint, ExactRatio(log_r))
    z = whole.sample(4000, partial(sir, num_proposals=100)).latents[0]
    assert correlation(joint.latents(z)) == pytest.approx(0.8, abs=0.018 + 4 * 0.36 / 4000**0.5)


def test_a_joint_head_learns_what_separate_heads_missed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problem = CorrelatedPair()
    first = NCPrior(problem, [MLPHead((1,)), MLPHead((1,), context_shape=(1,))]).eval()
    joint, x = JointSource(first, ONE), problem.data(8000)
    whole = NCPrior.for_source(joint, x[:256], width=32)
    settings = FitSettings(num_cached_proposals=8000, weight_decay=0.1)
    history = fit(whole, x, steps=600, settings=settings, progress=False)
    assert history.best_loss is not None
    assert history.best_loss[0] == pytest.approx(2 * math.log(2) - 2 * problem.jsd, abs=0.08)
    z = first.sample(1000, ONE)
    learnt = whole.log_ratio([torch.cat([*z.latents, z.x], 1)])[:, 0]
    assert stats.spearmanr(learnt.detach(), log_r(z.x)).statistic > 0.9
    whole.save_pretrained(tmp_path)
    again = NCPrior.from_pretrained(JointSource(first, ONE), tmp_path)
    assert torch.equal(again.log_ratio([torch.cat([*z.latents, z.x], 1)])[:, 0], learnt)
    other = NCPrior(problem, [MLPHead((1,)), MLPHead((1,), context_shape=(1,))])
    with pytest.raises(ValueError, match="fingerprint"):
        NCPrior.from_pretrained(JointSource(other, ONE), tmp_path)


def test_what_a_joint_head_cannot_see_raises() -> None:
    with pytest.raises(ValueError, match="does not see conditions"):
        JointSource(untrained(), ONE).start(2, condition=torch.zeros(2))
    with pytest.raises(TypeError, match="real numbers; got torch.int64"):
        JointSource(NCPrior.for_source(Codes().source(), Codes().data(50)), ONE)
    with pytest.raises(ValueError, match="sampler"):
        JointSource(untrained())
    state = JointSource(untrained(), ONE).start(2)
    with pytest.raises(ValueError, match="advance"):
        JointSource(untrained(), ONE).decode(state)
