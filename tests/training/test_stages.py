"""Stages: nested and in product form, on targets that are known; calibration; kept draws."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import CorrelatedPair, ExactRatio, GaussianPair, SIRLaw
from helpers.toys import same, weights
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ncprior import Group, NCPrior, fit, langevin, sir
from ncprior.bases.empirical import Empirical
from ncprior.bases.rebase import rebase
from ncprior.heads.codes import CategoricalHead
from ncprior.heads.networks import ConvHead, MLPHead
from ncprior.heads.product import ProductHead, fresh_head
from ncprior.samplers.base import Draw
from ncprior.samplers.smc import tempered_smc
from ncprior.training import FitSettings, History, calibrate_heads, nested
from ncprior.training.stages import Drawn, reweighted, with_cached_proposals

QUIET: dict[str, Any] = {"progress": False}


class Shifted(nn.Module):
    """log r of KL `kl` on `GaussianPair`, with one parameter: the factor."""

    def __init__(self, problem: GaussianPair, factor: float = 1.0) -> None:
        super().__init__()
        self.problem, self.offset = problem, 0.0
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.factor * self.problem.log_r(z) + self.offset

    @torch.no_grad()
    def rescale(self, slope: float, offset: float) -> None:
        self.factor.mul_(slope)
        self.offset = slope * self.offset + offset


def mlp(problem: GaussianPair, x: Tensor, width: int = 64) -> NCPrior:
    return NCPrior.for_source(problem.source(), x[:500], width=width, depth=1)


def rmse(prior: NCPrior, problem: GaussianPair, z: Tensor) -> float:
    with torch.no_grad():
        error = prior.log_r(0, z[None], None)[0] - problem.log_r(z)
    return float(error.square().mean().sqrt())


# --- product form ---


def test_a_product_is_the_sum_of_log_ratios() -> None:
    heads = [MLPHead((2,), context_shape=(3,), width=8, depth=1) for _ in range(3)]
    for head in heads:
        nn.init.normal_(head.out.weight)
    z, c = torch.randn(5, 4, 2), torch.randn(4, 3)
    product = ProductHead(heads)
    assert torch.allclose(product(z, c), sum(head(z, c) for head in heads), atol=1e-6)
    before = product(z, c)
    product.rescale(0.5, 2.0)
    assert torch.allclose(product(z, c), 0.5 * before + 2.0, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "z"),
    [
        (ConvHead((2, 4, 4), width=8, depth=1), torch.randn(3, 2, 4, 4)),
        (CategoricalHead((), 5, width=8, depth=1), torch.randint(5, (3,))),
        (CategoricalHead((2, 2), 5, width=8, depth=1), torch.randint(5, (3, 2, 2))),
    ],
)
def test_every_head_can_be_rescaled(head: Any, z: Tensor) -> None:
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    before = head(z)
    head.rescale(0.5, 2.0)
    assert torch.allclose(head(z), 0.5 * before + 2.0, atol=1e-4)


def test_a_fresh_head_has_the_scales_of_the_other_and_has_learnt_nothing() -> None:
    x = GaussianPair().data(100) * 7 + 3
    head = mlp(GaussianPair(), x, width=8).heads[0]
    nn.init.ones_(head.out.weight)  # type: ignore[union-attr, arg-type]
    for other in (fresh_head(head), fresh_head(ProductHead([head, MLPHead((2,))]))):
        assert torch.equal(other(x), torch.zeros(100))
        pairs = zip(other.buffers(), head.buffers(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert other.config() == head.config()  # type: ignore[operator]


def test_a_fresh_head_does_not_see_latents_that_the_other_does_not_see() -> None:
    """The weights of its first layer are as large as those of a head for the rest alone.

    They are uniform, with an sd of 1/√(3D) in D latents: a sample of 1,200 is within 5 %.
    """
    head = MLPHead((16,), width=100)
    hidden = torch.arange(16) >= 4
    head.leave_out(hidden)
    other = fresh_head(head)
    assert torch.equal(other.left_out(), hidden)  # type: ignore[operator]
    z = torch.randn(5, 16)
    assert torch.equal(other(z), other(torch.where(hidden, 9.0, z)))
    weight: Any = other.stem.weight  # type: ignore[union-attr]
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 4), rel=0.05)


def test_tilted_draws_are_those_of_r_p() -> None:
    """At KL 4, where SIR with 50 proposals gets 0.677 of the mean (design, section 6)."""
    problem = GaussianPair(kl=4.0)
    source = reweighted(NCPrior(problem.source(), problem.head()))
    z = source.group(source.start(2000)).prior.sample((2,))
    assert z.shape == (2, 2000, 2)
    u = problem.project(z[0]).numpy()
    assert stats.kstest(u, stats.norm(loc=problem.shift).cdf).pvalue > 0.01


def test_rows_with_a_context_are_tilted_each_for_itself() -> None:
    pair = CorrelatedPair()
    source = reweighted(NCPrior(pair, pair.heads()))
    z_1 = torch.linspace(-2, 2, 5).repeat(300)[:, None]
    state = source.advance(source.start(1500), z_1)
    z_2 = source.group(state).prior.sample().reshape(300, 5)
    expected = pair.correlation * torch.linspace(-2, 2, 5)
    assert torch.allclose(z_2.mean(0), expected, atol=4 * 0.6 / math.sqrt(300))
    assert torch.allclose(z_2.std(0), torch.tensor(0.6), atol=0.12)


def test_three_stages_halve_the_error_of_one_at_kl_12() -> None:
    problem = GaussianPair(kl=12.0)
    data, z = problem.data(4000), problem.target.sample((20_000,))
    errors = {}
    for stages in (1, 3):
        torch.manual_seed(1)
        prior = mlp(problem, data, width=32)
        history = fit(prior, data, stages=stages, steps=300, learning_rate=3e-3, **QUIET)
        errors[stages] = rmse(prior, problem, z)
    assert len(history.stages) == 2
    assert errors[3] < 0.5 * errors[1]
    assert isinstance(prior.heads[0], ProductHead)
    assert str(history).count("stage") == 2


def test_a_stage_that_learns_nothing_is_left_out_and_auto_stops_there() -> None:
    problem = GaussianPair(kl=0.5)
    data = problem.data(4000)
    torch.manual_seed(0)
    prior = mlp(problem, data, width=16)
    history = fit(prior, data, steps=300, learning_rate=3e-3, stages="auto", **QUIET)
    assert len(history.stages) >= 1
    assert not any(history.stages[-1].kept)
    assert str(history).endswith("left out")
    kept = prior.heads[0]
    factors = len(kept.heads) if isinstance(kept, ProductHead) else 1
    assert factors == len(history.stages)


def test_auto_goes_on_for_what_is_worth_a_head_alone() -> None:
    jsd = 0.03
    history = History([], [0, 0], [2 * (math.log(2) - jsd)] * 2, [0.001, 0.03], "")
    assert history.has_learnt() == [True, False]
    assert history.has_learnt(0.02) == [True, False]
    assert history.has_learnt(0.04) == [False, False]


@pytest.mark.parametrize("stages", [2, "auto"])
def test_a_base_that_cannot_be_walked_in_is_refused_before_training(stages: Any) -> None:
    problem, steps = GaussianPair(), []
    source = rebase(problem.source(), Empirical(problem.data(200)))
    prior = NCPrior.for_source(source, problem.data(50), width=8)
    with pytest.raises(TypeError, match="group 0.*nested"):
        fit(prior, problem.data(200), stages=stages, callback=steps.append, steps=4, **QUIET)
    assert not steps


def test_stages_of_several_groups_are_kept_group_by_group() -> None:
    """The first group matches its base: only the second, given z_1, has anything to stage."""
    pair = CorrelatedPair()
    data = pair.data(1000)
    prior = NCPrior.for_source(pair, data[:500], width=16, depth=1)
    options = {"steps": 60, "batch_size": 64, "learning_rate": 3e-3, "eval_every": 30}
    history = fit(prior, data, stages=2, settings=FitSettings(ema_decay=0.9), **options, **QUIET)
    assert len(history.stages) == 1
    for learnt, head in zip(history.stages[0].kept, prior.heads, strict=True):
        assert isinstance(head, ProductHead) is learnt
    assert history.stages[0].best_loss is not None
    assert history.stages[0].best_loss[1] < 2 * math.log(2)


# --- nested form ---


def test_a_nested_base_is_what_the_sampler_draws() -> None:
    problem = GaussianPair(kl=4.0)
    source = nested(NCPrior(problem.source(), problem.head()), partial(sir, num_proposals=50))
    z = source.group(source.start(2000)).prior.sample((3,))
    law = problem.law
    probabilities = law.probabilities(50)
    mean = float(probabilities @ law.nodes)
    assert mean / problem.shift == pytest.approx(0.677, abs=0.001)
    assert problem.project(z).mean().item() == pytest.approx(mean, abs=4 / math.sqrt(6000))


def test_a_nested_stage_mends_what_few_proposals_leave() -> None:
    """Both stages exact: the second weighs the draws of SIR(20) by q / p_SIR(20), by quadrature."""
    problem = GaussianPair(kl=4.0)
    law, first = problem.law, partial(sir, num_proposals=20)
    nodes, target = law.nodes, law.weight * np.exp(law.log_r)
    log_r_2 = np.log(target / law.probabilities(20))

    def second(z: Tensor) -> Tensor:
        u = problem.project(z).numpy()
        return torch.from_numpy(np.interp(u, nodes, log_r_2)).float()

    source = nested(NCPrior(problem.source(), problem.head()), first)
    prior = NCPrior(source, ExactRatio(second))
    u = problem.project(prior.sample(4000, first).latents[0])
    alone = law.probabilities(20) @ nodes
    both = SIRLaw(nodes, law.probabilities(20), log_r_2).probabilities(20)
    assert both @ nodes > 1.4 * alone
    assert u.mean().item() == pytest.approx(float(both @ nodes), abs=4 / math.sqrt(4000))
    cdf = both.cumsum()
    assert stats.kstest(u.numpy(), lambda v: np.interp(v, nodes, cdf)).pvalue > 0.001


def test_langevin_refuses_a_nested_base() -> None:
    source = nested(
        NCPrior(GaussianPair().source(), GaussianPair().head()), partial(sir, num_proposals=2)
    )
    prior = NCPrior(source, GaussianPair().head())
    with pytest.raises(TypeError, match="can only be sampled"):
        prior.sample(3, partial(langevin, num_steps=1, step_size=0.1))


def test_a_ratio_against_finite_sir_must_not_be_multiplied_in() -> None:
    """At KL 12 and M = 500 with an exact first stage, by quadrature and by training.

    log r + log q/p_SIR is wrong by log q/p_SIR: under q, by KL(q || p_SIR) nats on average.
    """
    problem = GaussianPair(kl=12.0)
    law = problem.law
    target = law.weight * np.exp(law.log_r)
    target /= target.sum()
    wrong = float(target @ np.log(target / law.probabilities(500)))
    assert wrong > 2
    source = nested(NCPrior(problem.source(), problem.head()), partial(sir, num_proposals=500))
    data = problem.data(4000)
    second = NCPrior.for_source(source, data[:200], width=32, depth=1)
    settings = FitSettings(num_cached_proposals=2000)
    fit(second, data, steps=300, learning_rate=3e-3, settings=settings, **QUIET)
    product = NCPrior(problem.source(), ProductHead([problem.head(), second.heads[0]]))
    z = problem.target.sample((4000,))
    exact = NCPrior(problem.source(), problem.head())
    assert rmse(exact, problem, z) < 1e-4
    assert rmse(product, problem, z) > 1
    # What the product form does in its place: nothing, as there is nothing left to learn.
    staged = NCPrior(problem.source(), [MLPHead((2,), width=32, depth=1)])
    history = fit_on(reweighted(exact), staged, data)
    assert history.best_loss is not None
    assert history.best_loss[0] > 2 * math.log(2) - 0.02


def fit_on(source: Any, prior: NCPrior, data: Tensor) -> Any:
    settings = FitSettings(num_cached_proposals=4000)
    return fit(NCPrior(source, prior.heads), data, steps=100, settings=settings, **QUIET)


# --- draws that are kept ---


def test_kept_draws_are_of_the_base_and_leave_the_generator_alone() -> None:
    source = GaussianPair(dim=3).source()
    before = torch.random.get_rng_state()
    train, held_out = with_cached_proposals(source, 5000, seed=3)
    again, _ = with_cached_proposals(source, 5000, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(train.prior, Empirical) and isinstance(held_out.prior, Empirical)
    assert isinstance(again.prior, Empirical)
    assert torch.equal(train.prior.z, again.prior.z)
    assert train.prior.z.shape == (5000, 3) and held_out.prior.z.shape == (2048, 3)
    rows = torch.cat([train.prior.z, held_out.prior.z])
    assert len(rows.unique(dim=0)) == 7048
    assert stats.kstest(rows[:, 0].numpy(), "norm").pvalue > 0.01


def test_draws_of_a_sampler_that_does_not_settle_are_warned_of() -> None:
    problem = GaussianPair()
    log_z = itertools.cycle([0.0, 3.0])

    def base(k: int, group: Group) -> Drawn:
        return Drawn(lambda: (group.prior.sample(), torch.tensor([next(log_z)])))

    source = rebase(problem.source(), base)
    with pytest.warns(UserWarning, match="are unreliable: log Z has a standard deviation"):
        with_cached_proposals(source, 4000, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_cached_proposals(reweighted(NCPrior(problem.source(), problem.head())), 4000, seed=0)


def test_a_cache_needs_one_prior_for_all_rows() -> None:
    prior = NCPrior.for_source(CorrelatedPair(), CorrelatedPair().data(100), width=8)
    settings = FitSettings(num_cached_proposals=10)
    with pytest.raises(ValueError, match="one group"):
        fit(prior, CorrelatedPair().data(100), settings=settings, steps=2, **QUIET)


def test_a_base_that_is_slow_is_drawn_from_once() -> None:
    problem, calls = GaussianPair(), []

    def slow(prior: Any, log_ratio: Any) -> Draw:
        calls.append(1)
        return Draw(prior.sample())

    data = problem.data(1000)
    source = nested(NCPrior(problem.source(), problem.head()), slow)
    prior = NCPrior.for_source(source, data[:100], width=8)
    calls.clear()
    fit(prior, data, settings=FitSettings(num_cached_proposals=1000), steps=20, **QUIET)
    assert len(calls) < 5  # of which some only ask for the device


# --- calibration ---


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_an_overscaled_head_is_restored(scale: float) -> None:
    problem = GaussianPair(kl=1.0)
    head = Shifted(problem, scale)
    head.offset = 0.7
    prior = NCPrior(problem.source(), head)
    slopes = calibrate_heads(prior, problem.data(20_000))
    assert slopes[0] == pytest.approx(1 / scale, abs=0.05)
    assert head.factor.item() == pytest.approx(1, abs=0.05 * scale)
    assert head.offset == pytest.approx(0, abs=0.1)


def test_trained_heads_are_calibrated_on_held_out_data() -> None:
    problem = GaussianPair(kl=1.0, dim=8, width=0.1)
    data, held_out = problem.data(400), problem.data(5000)
    prior = NCPrior.for_source(problem.source(), data, width=64)
    options = {"steps": 300, "eval_every": 100, "learning_rate": 3e-3, "patience": None}
    fit(prior, data, held_out=held_out, **options, **QUIET)
    assert calibrate_heads(prior, held_out)[0] != 1
    again = calibrate_heads(prior, held_out)
    assert again[0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_heads_are_calibrated_whatever_their_strength(strength: float) -> None:
    """An exact log r with 1 nat too much: 8,000 draws leave ±0.03 of both, in four standard errors."""
    problem = GaussianPair()
    head = Shifted(problem)
    head.offset = 1.0
    prior = NCPrior(problem.source(), head).eval()
    prior.strength = strength
    assert calibrate_heads(prior, problem.data(8000)) == pytest.approx((1.0,), abs=0.12)
    assert head.offset == pytest.approx(0.0, abs=0.12)
    assert head.factor.item() == pytest.approx(1.0, abs=0.12)
    assert prior.strength == strength


def test_heads_that_cannot_be_staged_or_calibrated_are_refused_before_they_are_called() -> None:
    problem = GaussianPair()

    class Plain(nn.Linear):
        def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            raise AssertionError

    prior = NCPrior(problem.source(), Plain(2, 1))
    with pytest.raises(TypeError, match=r"rescale\(a, b\)"):
        calibrate_heads(prior, problem.data(50))
    with pytest.raises(TypeError, match=r"config\(\)"):
        fit(prior, problem.data(50), stages=2, **QUIET)


# --- arguments, resuming, saving ---


@pytest.mark.parametrize("stages", [0, -1, "many", 1.5])
def test_impossible_stages_are_refused(stages: Any) -> None:
    prior = NCPrior(GaussianPair().source(), MLPHead((2,), width=8))
    with pytest.raises((TypeError, ValueError), match="stages must be"):
        fit(prior, GaussianPair().data(50), stages=stages, **QUIET)


def test_what_does_not_go_together_is_refused() -> None:
    problem = GaussianPair()
    prior, data = NCPrior(problem.source(), MLPHead((2,), width=8)), problem.data(50)
    with pytest.raises(TypeError, match="one-shot"):
        fit(prior, iter([data]), stages=2, **QUIET)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="held-out"):
        warnings.simplefilter("ignore")
        fit(prior, [data], stages="auto", **QUIET)
    prior.strength = 0.5
    with pytest.raises(ValueError, match="strength 1"):
        fit(prior, data, stages=2, **QUIET)


class Stop(Exception):
    pass


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("at", [3, 6, 7])
def test_training_in_stages_resumes_exactly(tmp_path: Path, at: int, own_generator: bool) -> None:
    """Stopped in the first stage, and in the second, whose head is far above the noise.

    Row 6 is the first of the second stage, before its first checkpoint.
    """
    problem = GaussianPair(kl=12.0)
    x, held_out = problem.data(600), problem.data(60)
    options = {"steps": 40, "batch_size": 32, "eval_every": 8, "checkpoint_every": 8}
    options |= {"stages": 2, "learning_rate": 3e-3}
    options["settings"] = FitSettings(ema_decay=0.9, num_cached_proposals=300)

    def run(path: Path, seed: int, callback: Any = None) -> NCPrior:
        torch.manual_seed(0)
        prior = mlp(problem, x, width=8)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(9)
        data = DataLoader(x, 32, shuffle=True, generator=generator) if own_generator else x
        given = {"checkpoint": path, "callback": callback, "held_out": held_out}
        fit(prior, data, **given, **options, **QUIET)
        return prior

    expected = run(tmp_path / "whole", 5)
    seen = []

    def interrupt(row: Any) -> None:
        seen.append(row)
        if len(seen) == at:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "part", 5, interrupt)
    resumed = run(tmp_path / "part", 99)
    assert isinstance(resumed.heads[0], ProductHead)
    assert same(weights(resumed), weights(expected))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_in_stages_that_a_callback_stopped_goes_on(tmp_path: Path, stage: int) -> None:
    """With the same prior, which has the second factor already if it was stopped there."""
    problem = GaussianPair(kl=12.0)
    x, path = problem.data(600), tmp_path / "c"
    options = {"steps": 40, "batch_size": 32, "eval_every": 8, "checkpoint_every": 8}
    options |= {"stages": 2, "learning_rate": 3e-3}
    priors = []
    for stop in (False, True):
        torch.manual_seed(0)
        priors.append(mlp(problem, x, width=8))
        if stop:
            stops = {"callback": lambda row: row[-1] == stage and row.step == 24}
            history = fit(priors[1], x, checkpoint=path, **stops, **options, **QUIET)
            ends = [history, *history.stages]
            assert ends[-1].stopped == "stopped by the callback at step 24"
            assert isinstance(priors[1].heads[0], ProductHead) is (stage == 2)
        fit(priors[-1], x, checkpoint=path if stop else None, **options, **QUIET)
    assert same(weights(priors[0]), weights(priors[1]))
    again = fit(priors[1], x, checkpoint=path, **options, **QUIET)  # all of it is there
    assert [stage.kept for stage in again.stages] == [(True,)]
    assert same(weights(priors[0]), weights(priors[1]))
    with pytest.raises(ValueError, match="belongs to a training with steps=40"):
        fit(priors[1], x, checkpoint=path, **options | {"steps": 41}, **QUIET)
    assert same(weights(priors[0]), weights(priors[1]))


def test_a_later_stage_alone_is_found_before_training(tmp_path: Path) -> None:
    path, left = tmp_path / "heads.pt", tmp_path / "heads.pt.stage2"
    left.touch()
    problem = GaussianPair(kl=1.0)
    prior = NCPrior(problem.source(), MLPHead((problem.dim,), width=8))
    before = weights(prior)
    with pytest.raises(ValueError, match=r"heads.pt.stage2 is the checkpoint of a later stage"):
        fit(prior, problem.data(100), stages=2, steps=4, checkpoint=path, progress=False)
    assert same(weights(prior), before)
    assert not path.exists()


def test_an_error_in_a_later_stage_leaves_the_factors_of_before(tmp_path: Path) -> None:
    problem = GaussianPair(kl=12.0)
    x, path = problem.data(600), tmp_path / "c"
    options = {"steps": 40, "batch_size": 32, "eval_every": 8, "checkpoint_every": 8}
    options |= {"stages": 2, "learning_rate": 3e-3, "checkpoint": path, **QUIET}
    prior = mlp(problem, x, width=8)
    fit(prior, x, callback=lambda row: row.stage == 2 and row.step == 24, **options)

    def fail(row: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(prior, x, callback=fail, **options)
    assert isinstance(prior.heads[0], ProductHead)


def test_a_product_is_saved_and_loaded(tmp_path: Path) -> None:
    vae = nn.Identity().eval()
    problem = GaussianPair()
    source = problem.source()
    source.module = vae
    prior = NCPrior(source, ProductHead([MLPHead((2,), width=8), MLPHead((2,), width=16)]))
    for parameter in prior.parameters():
        nn.init.normal_(parameter)
    prior.eval().save_pretrained(tmp_path)
    loaded = NCPrior.from_pretrained(source, tmp_path)
    assert isinstance(loaded.heads[0], ProductHead)
    z = [torch.randn(5, 2)]
    assert torch.equal(loaded.log_ratio(z), prior.log_ratio(z))


def test_smc_draws_of_a_product_are_those_of_its_density() -> None:
    problem = GaussianPair(kl=4.0)
    half = ExactRatio(problem.log_r, 0.5)
    prior = NCPrior(problem.source(), ProductHead([half, half]))
    sampler = partial(tempered_smc, num_particles=1, share_particles=True)
    u = problem.project(prior.sample(2000, sampler).latents[0]).numpy()
    assert stats.kstest(u, stats.norm(loc=problem.shift).cdf).pvalue > 0.01


def test_drawn_tells_log_z_only_where_the_sampler_does() -> None:
    base = Drawn(lambda: (torch.zeros(2, 1), torch.tensor([1.0, 3.0])))
    assert base.sample((2, 3)).shape == (2, 3, 2, 1)
    assert base.log_mean_weights == [2.0] * 6
    silent = Drawn(lambda: (torch.zeros(2, 1), None))
    silent.sample()
    assert silent.log_mean_weights == []
