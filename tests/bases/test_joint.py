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
from ncprior.bases import Empirical, JointSource, rebase
from ncprior.heads import MLPHead
from ncprior.jobs import sample_parts
from ncprior.saving import inspect
from ncprior.saving.tensors import load_tensors, to_bytes
from ncprior.source import sample_posterior
from ncprior.training import FitSettings

ONE = partial(sir, num_proposals=1)

UNKNOWN = pytest.mark.filterwarnings("ignore:The (file|source) has no fingerprint of the VAE")


def untrained() -> NCPrior:
    """The base: z_1 and z_2 are independent."""
    problem = CorrelatedPair()
    return with_sampler(NCPrior(problem, problem.heads(scale=0.0)))


def with_sampler(prior: NCPrior) -> NCPrior:
    prior.sampler = ONE
    return prior


def log_r(z: Tensor) -> Tensor:
    return CorrelatedPair().log_r(z[..., 1:], z[..., :1])


def correlation(z: tuple[Tensor, ...]) -> float:
    return torch.corrcoef(torch.cat(z, 1).T)[0, 1].item()


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # of a VAE that is not trained
def test_a_joint_latent_is_a_walk_with_its_mean() -> None:
    torch.manual_seed(0)
    source = HVAESource(HVAE(num_groups=3, width=16, hidden=8).eval())
    first = NCPrior.for_source(source, torch.rand(32, 1, 28, 28).round(), width=8)
    first.sampler = ONE
    joint = JointSource(first)
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


def test_a_disabled_joint_head_draws_the_base_prior() -> None:
    """The heads of the groups, which move z_1 to the right, are off as well."""
    pair = CorrelatedPair()
    heads = [ExactRatio(lambda z, c=None: 3 * z[..., 0]) for _ in range(2)]
    first = NCPrior(pair, torch.nn.ModuleList(heads)).eval()
    first.sampler = partial(sir, num_proposals=50)
    whole = with_sampler(NCPrior(JointSource(first), MLPHead((2,))).eval())
    torch.manual_seed(0)
    with first.disabled():
        base = first.sample(100)
    torch.manual_seed(0)
    with whole.disabled():
        drawn = whole.sample(100)
    assert torch.equal(drawn.x, base.x)
    assert whole.sample(100).x.mean() > base.x.mean() + 1


class OtherPair(CorrelatedPair):
    """A pair whose decoder returns another type of numbers."""

    dtype = torch.float64

    def decode(self, state: Any) -> Tensor:
        return super().decode(state).to(self.dtype) / 3


@pytest.mark.parametrize(
    ("dtype", "row"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_latents_and_means_keep_their_types(dtype: torch.dtype, row: torch.dtype) -> None:
    source = OtherPair()
    source.dtype = dtype
    joint = JointSource(with_sampler(NCPrior(source, CorrelatedPair().heads())))
    z = joint.group(joint.start(5)).prior.sample()
    mean = joint.decode(joint.advance(joint.start(5), z))
    assert (z.dtype, mean.dtype) == (row, dtype)
    latents = joint.latents(z)
    assert [part.dtype for part in latents] == [torch.float32] * 2
    assert torch.equal(mean, torch.cat(latents, 1).to(dtype) / 3)


def test_proposals_are_walked_one_after_another_so_that_memory_does_not_grow() -> None:
    sizes = []

    def counted(prior: Any, log_ratio: Any) -> Any:
        sizes.append(prior.batch_shape[0])
        return ONE(prior, log_ratio)

    first = untrained()
    first.sampler = counted
    joint = JointSource(first)
    sizes.clear()
    joint.group(joint.start(5)).prior.sample((3,))
    assert sizes == [5] * 6  # three walks through two groups


def test_the_exact_joint_ratio_correlates_the_groups() -> None:
    """Resampling M walks leaves about (E_p[r^2] - 1) / M of the correlation missing: 0.018."""
    torch.manual_seed(0)
    first = untrained()
    assert abs(correlation(first.sample(4000, ONE).latents)) < 4 / math.sqrt(4000)
    joint = JointSource(first)
    whole = NCPrior(joint, ExactRatio(log_r))
    z = whole.sample(4000, partial(sir, num_proposals=100)).latents[0]
    assert correlation(joint.latents(z)) == pytest.approx(0.8, abs=0.018 + 4 * 0.36 / 4000**0.5)


def test_a_joint_head_learns_what_separate_heads_missed() -> None:
    torch.manual_seed(0)
    problem = CorrelatedPair()
    first = NCPrior(problem, [MLPHead((1,)), MLPHead((1,), context_shape=(1,))]).eval()
    joint, x = JointSource(with_sampler(first)), problem.data(8000)
    whole = NCPrior.for_source(joint, x[:256], width=32)
    settings = FitSettings(num_cached_proposals=8000, weight_decay=0.1)
    history = fit(whole, x, steps=600, settings=settings, progress=False)
    assert history.best_loss is not None
    assert history.best_loss[0] == pytest.approx(2 * math.log(2) - 2 * problem.jsd, abs=0.08)
    z = first.sample(1000, ONE)
    learnt = whole.log_ratio([torch.cat([*z.latents, z.x], 1)])[:, 0]
    assert stats.spearmanr(learnt.detach(), log_r(z.x)).statistic > 0.9


def saved(folder: Path) -> tuple[NCPrior, NCPrior, JointSource]:
    """A joint head on a first prior, in a folder."""
    torch.manual_seed(0)
    problem = CorrelatedPair()
    first = NCPrior(problem, [MLPHead((1,)), MLPHead((1,), context_shape=(1,))]).eval()
    first.sampler, first.strength, first.active = partial(sir, num_proposals=3), 0.5, [True, False]
    for p in first.parameters():
        p.data.normal_()
    joint = JointSource(first)
    whole = NCPrior.for_source(joint, problem.data(50), width=8)
    whole.heads[0].load_state_dict({n: t + 1 for n, t in whole.heads[0].state_dict().items()})
    whole.sampler = partial(sir, num_proposals=4)
    whole.save_pretrained(folder)
    return whole, first, joint


def draws(prior: NCPrior) -> Tensor:
    torch.manual_seed(1)
    return prior.sample(50).latents[0]


@UNKNOWN
def test_the_first_prior_is_saved_with_the_joint_head(tmp_path: Path) -> None:
    whole, first, joint = saved(tmp_path)
    again = NCPrior.from_pretrained(CorrelatedPair(), tmp_path)
    assert isinstance(again.source, JointSource)
    assert torch.equal(draws(again), draws(whole))
    found = again.source.prior
    assert isinstance(found, NCPrior)
    assert (found.strength, found.active) == (0.5, [True, False])
    assert inspect(tmp_path)["base"]["config"]["num_groups"] == 2
    assert "head for each of the 2 groups" in (tmp_path / "README.md").read_text()
    assert torch.equal(draws(NCPrior.from_pretrained(joint, tmp_path)), draws(whole))
    first.heads[0].load_state_dict({n: 2 * t for n, t in first.heads[0].state_dict().items()})
    with pytest.raises(ValueError, match="fingerprint"):
        NCPrior.from_pretrained(JointSource(first), tmp_path)


def test_a_job_of_another_first_prior_is_another_job(tmp_path: Path) -> None:
    whole, first, _ = saved(tmp_path)
    job = {"num_samples": 4, "part_size": 2, "progress": False}
    sample_parts(whole, tmp_path / "job", **job)
    before = draws(whole)
    first.strength = 0.4
    assert not torch.equal(draws(whole), before)
    with pytest.raises(ValueError, match="another job"):
        sample_parts(whole, tmp_path / "job", **job)
    first.strength, first.sampler = 0.5, ONE
    with pytest.raises(ValueError, match="another job"):
        sample_parts(whole, tmp_path / "job", **job)


@UNKNOWN
def test_a_damaged_first_prior_is_not_loaded(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "ncprior.safetensors"
    tensors, config = load_tensors(file)

    def load(tensors: dict[str, Tensor], base: Any) -> None:
        file.write_bytes(to_bytes(tensors, {**config, "base": base}))
        NCPrior.from_pretrained(CorrelatedPair(), tmp_path)

    def changed(**values: Any) -> Any:
        return {"kind": "NCPrior", "config": {**config["base"]["config"], **values}}

    load(tensors, config["base"])
    without = {name: t for name, t in tensors.items() if name != "base.heads.1.scale"}
    for base, wrong, given in (
        (changed(num_groups=3), "no valid heads, active", tensors),
        (changed(base=config["base"]), "is of a joint head, too", tensors),
        (changed(sampler=None), "no valid sampler", tensors),
        (changed(strange=1), "unknown keys: strange", tensors),
        ({"kind": "NCPrior", "config": []}, "heads for 1 latent groups", tensors),
        (config["base"], "do not fit the heads", {**tensors, "base.heads.0.more": torch.ones(1)}),
        (config["base"], "do not fit the heads", dict(list(without.items())[1:])),
    ):
        with pytest.raises(ValueError, match=wrong):
            load(given, base)
    own = {"heads": [{"kind": "custom", "config": {"class": "Mine"}}] * 2}
    with pytest.raises(ValueError, match=r"cannot build. Pass JointSource\(first prior\)"):
        load(tensors, changed(**own))
    del config["base"]["config"]["sampler"]
    with pytest.raises(ValueError, match=r"no sampler. Pass JointSource\(first prior\)"):
        load(tensors, config["base"])


def test_what_a_joint_head_cannot_see_raises() -> None:
    with pytest.raises(ValueError, match="does not see conditions"):
        JointSource(untrained()).start(2, condition=torch.zeros(2))
    with pytest.raises(TypeError, match="real numbers; got torch.int64"):
        JointSource(with_sampler(NCPrior.for_source(Codes().source(), Codes().data(50))))
    with pytest.raises(ValueError, match="sampler"):
        JointSource(NCPrior(CorrelatedPair(), CorrelatedPair().heads()))
    state = JointSource(untrained()).start(2)
    with pytest.raises(ValueError, match="advance"):
        JointSource(untrained()).decode(state)


def test_a_base_on_a_joint_source_is_drawn() -> None:
    """The state has a tensor, of which a wrapped source reads the number of rows."""
    joint = JointSource(untrained())
    z = joint.group(joint.start(20)).prior.sample()
    prior = NCPrior(rebase(joint, Empirical(z)), MLPHead((2,), width=8)).eval()
    assert prior.sample(5, partial(sir, num_proposals=3)).x.shape == (5, 2)


def test_rows_of_encodings_and_latents_are_counted() -> None:
    joint = JointSource(untrained())
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="The walk has 5 rows; got 3 rows of encoding"):
        joint.start(5, joint.encode(x))
    width = joint.encode(x).shape[1]
    with pytest.raises(ValueError, match="The walk has 5 rows; got 2 rows of z"):
        joint.advance(joint.start(5), torch.zeros(2, width))
