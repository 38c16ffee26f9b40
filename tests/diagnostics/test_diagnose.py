"""The report on a trained prior: numbers against exact ones, verdicts from every side."""

import io
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import (
    Codes,
    CorrelatedPair,
    ExactRatio,
    GaussianPair,
    Ring,
    around,
    standard_normal,
)
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from ncprior import Group, NCETrainer, NCPrior, SingleGroup
from ncprior.diagnostics.calibration import Mean, pareto_k, recalibrate, reliability
from ncprior.diagnostics.diagnose import diagnose as diagnose_all
from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.report import Report
from ncprior.heads.networks import MLPHead
from ncprior.source import num_rows

Problem = GaussianPair | Ring | Codes
diagnose = partial(diagnose_all, fresh_steps=0)  # fresh heads have a file of their own


def reported(problem: Problem, head: nn.Module, n: int = 4000, **options: Any) -> GroupReport:
    """The report on one head of one problem, from n rows."""
    return diagnose(NCPrior(problem.source(), head), problem.data(n), **options).groups[0]


def draws(problem: GaussianPair, num_draws: int, rows: int) -> tuple[Tensor, Tensor]:
    """Exact log r at z ~ q and at z ~ p, each with shape (draws, rows)."""
    z = around(problem.width)(problem.data(rows)).sample((num_draws,))
    return problem.log_r(z), problem.log_r(problem.prior.sample((num_draws, rows)))


def waves(height: float) -> ExactRatio:
    """A head that finds structure where there is none."""
    return ExactRatio(lambda z: height * torch.sin(4 * z).sum(-1))


NO_GAP = GaussianPair(kl=0.0)


# Verdicts


@pytest.mark.parametrize(
    "problem", [GaussianPair(1.0), GaussianPair(2.0), Ring(), Codes()], ids=str
)
@pytest.mark.parametrize(
    ("scale", "verdict"),
    [(1.0, Verdict.GOOD), (2.0, Verdict.OVER_CONFIDENT), (0.5, Verdict.TOO_FLAT)],
)
def test_exact_sharp_and_flat_heads(problem: Problem, scale: float, verdict: Verdict) -> None:
    report = reported(problem, problem.head(scale))
    assert report.verdict is verdict
    assert abs(report.slope - 1 / scale) < 4 * report.slope_error
    assert abs(report.offset) < 4 * report.offset_error
    assert report.slope_error < 0.04 / scale  # else the line above shows nothing


def test_the_exact_ratio_of_a_ring_is_good_though_its_inverse_does_not_average_to_one() -> None:
    ring = Ring(width=0.05)
    report = reported(ring, ring.head())
    assert report.verdict is Verdict.GOOD
    assert report.mean_inverse_r < 0.5  # 0.13 ± 0.04: q never visits the hole, where the rest is
    assert report.mean_inverse_r_k > 0.6  # 0.91 ± 0.08
    assert abs(report.identity - 1) < 4 * report.identity_error


def test_the_bounded_identity_is_blind_to_sharpness_on_a_symmetric_pair_and_the_slope_not() -> (
    None
):
    report = reported(GaussianPair(1.0), GaussianPair(1.0).head(2.0))
    assert abs(report.identity - 1) < 4 * report.identity_error
    assert report.slope + 4 * report.slope_error < 1


VERDICTS = {
    "almost no gap": (GaussianPair(0.005), GaussianPair(0.005).head(), Verdict.MATCHES),
    "almost no gap, sharp": (GaussianPair(0.005), GaussianPair(0.005).head(2.5), Verdict.MATCHES),
    "no gap, faint noise": (NO_GAP, waves(0.05), Verdict.MATCHES),
    "no gap, strong noise": (NO_GAP, waves(2.0), Verdict.OVER_CONFIDENT),
    "no gap, exact": (NO_GAP, waves(0.0), Verdict.CONSTANT),
    "untrained": (GaussianPair(2.0), MLPHead((2,), width=8), Verdict.CONSTANT),
    "wrong sign": (GaussianPair(1.0), GaussianPair(1.0).head(-1.0), Verdict.OVER_CONFIDENT),
    "always wrong": (GaussianPair(60.0), GaussianPair(60.0).head(-1.0), Verdict.OVER_CONFIDENT),
    "5 nats": (GaussianPair(5.0), GaussianPair(5.0).head(), Verdict.TOO_FEW),
    "12 nats": (GaussianPair(12.0), GaussianPair(12.0).head(), Verdict.TOO_WIDE),
    "12 nats, sharp": (GaussianPair(12.0), GaussianPair(12.0).head(2.0), Verdict.TOO_WIDE),
    "never confused": (GaussianPair(60.0), GaussianPair(60.0).head(), Verdict.TOO_WIDE),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case: str) -> None:
    problem, head, verdict = VERDICTS[case]
    assert reported(problem, head).verdict is verdict


def test_few_rows_prove_nothing() -> None:
    verdicts = []
    for seed in range(20):
        torch.manual_seed(seed)
        verdicts.append(reported(NO_GAP, waves(0.2), n=10).verdict)
    # Three standard errors of 9 degrees of freedom are passed once in 130 times.
    assert verdicts.count(Verdict.MATCHES) >= 18


def test_enough_proposals_make_the_head_good() -> None:
    problem = GaussianPair(4.0)  # exp(4 + √8) = 930
    assert reported(problem, problem.head()).verdict is Verdict.TOO_FEW
    enough = reported(problem, problem.head(), num_proposals=(50, 1500))
    assert enough.verdict is Verdict.GOOD


def test_a_head_that_memorises() -> None:
    problem = GaussianPair(0.5, dim=6, width=0.1)
    prior, x = NCPrior(problem.source(), MLPHead((6,), width=48, depth=1)), problem.data(24)
    trainer = NCETrainer(prior, torch.optim.Adam(prior.parameters(), 5e-3))
    for _ in range(100):
        trainer.step(x)
    fresh = problem.data(1000)
    report = diagnose(prior, fresh, train=x).groups[0]
    assert report.verdict is Verdict.MEMORISES
    assert report.train_gap > 0.5
    assert report.train_gap == pytest.approx(report.nce_loss - report.train_loss)
    # What it does is seen without training data too, but not why.
    assert diagnose(prior, fresh).groups[0].verdict is Verdict.OVER_CONFIDENT


def test_an_exact_head_memorises_nothing() -> None:
    problem = GaussianPair(1.0)
    report = reported(problem, problem.head(), train=problem.data(300))
    assert report.verdict is Verdict.GOOD
    assert abs(report.train_gap) < 4 * report.train_gap_error
    se = math.hypot(report.nce_loss_error, 0.04)  # 300 rows: sd of the loss 0.7
    assert report.nce_loss_error < report.train_gap_error < 1.5 * se


def test_a_head_that_is_wrong_everywhere_memorises_nothing() -> None:
    problem = GaussianPair(1.0)
    report = reported(problem, problem.head(-9.0), train=problem.data(1000))
    assert report.train_loss > 2 * math.log(2)
    assert report.verdict is Verdict.OVER_CONFIDENT


def test_strength_shows_as_miscalibration() -> None:
    problem = GaussianPair(1.0)
    prior = NCPrior(problem.source(), problem.head())
    prior.strength = 2.0
    report = diagnose(prior, problem.data(4000)).groups[0]
    assert report.verdict is Verdict.OVER_CONFIDENT
    assert abs(report.slope - 0.5) < 4 * report.slope_error


@pytest.mark.parametrize("how", ["inactive", "strength", "disabled"])
def test_heads_that_are_off(how: str) -> None:
    pair = CorrelatedPair()
    prior, x = NCPrior(pair, pair.heads()), pair.data(500)
    if how == "inactive":
        prior.active[0] = False
        prior.heads[0] = ExactRatio(lambda z: pytest.fail("a head that is off was asked"))
        groups = diagnose(prior, x).groups
        assert groups[1].verdict is Verdict.GOOD
    elif how == "strength":
        prior.strength = 0.0
        groups = diagnose(prior, x).groups
    else:
        with prior.disabled():
            groups = diagnose(prior, x).groups
    assert groups[0].verdict is Verdict.OFF
    assert math.isnan(groups[0].nce_loss) and math.isnan(groups[0].ess[500])
    assert groups[0].proposals_needed == 1
    assert (groups[1].verdict is Verdict.OFF) == (how != "inactive")


# Numbers


@pytest.mark.parametrize(
    "problem", [GaussianPair(0.5), GaussianPair(2.0), Ring(), Codes()], ids=str
)
def test_loss_jsd_and_kl_are_the_exact_ones(problem: Problem) -> None:
    report = reported(problem, problem.head())
    assert abs(report.jsd - problem.law.jsd) < 4 * report.jsd_error
    assert (
        abs(report.nce_loss - (2 * math.log(2) - 2 * problem.law.jsd)) < 4 * report.nce_loss_error
    )
    assert abs(report.kl - problem.law.kl) < 4 * report.kl_error
    assert report.jsd_error == report.nce_loss_error / 2 < 0.01
    assert report.kl_error < 0.05


def test_loss_of_an_inexact_head_is_the_plain_one() -> None:
    problem = GaussianPair(1.0)
    report = reported(problem, problem.head(2.0))
    law = problem.law
    r, log_r = np.exp(law.log_r), torch.from_numpy(2 * law.log_r)
    loss = law.weight @ (r * softplus(-log_r).numpy() + softplus(log_r).numpy())
    assert abs(report.nce_loss - loss) < 4 * report.nce_loss_error
    assert abs(report.kl - 2.0) < 4 * report.kl_error


def test_draws_of_one_row_do_not_pass_for_independent_ones() -> None:
    problem = GaussianPair(1.0)
    report = diagnose(NCPrior(problem.source(), problem.head()), problem.data(200))
    assert report.num_rows == 200 and report.num_draws == 200 * 41  # the first multiple ≥ 8192
    # log r = |μ| u - KL with u = x + width·noise along μ.
    row_variance = 2 * problem.kl * (1 - problem.width**2 + problem.width**2 / 41)
    exact = math.sqrt(row_variance / 200)
    assert abs(report.groups[0].kl_error / exact - 1) < 4 / math.sqrt(2 * 200)


def test_effective_sample_size_and_log_z() -> None:
    problem = GaussianPair(4.0)
    report = reported(problem, problem.head(), num_proposals=(50, 500))
    for m in (50, 500):
        r = problem.law
        weights = np.random.default_rng(0).choice(np.exp(r.log_r), (4000, m), p=r.weight)
        ess = weights.sum(1) ** 2 / (weights**2).sum(1)
        assert abs(report.ess[m] - ess.mean()) < 4 * ess.std() / math.sqrt(64)
    assert abs(report.log_z - problem.law.mean_log_z(500)) < 4 * report.log_z_error
    assert 0.02 < report.log_z_error < 0.2


def test_no_proposal_is_lost_where_all_weigh_the_same() -> None:
    report = reported(NO_GAP, waves(0.0), num_proposals=(7, 23))
    assert report.ess == {7: 7.0, 23: 23.0}
    assert report.log_z == 0.0 and report.proposals_needed == 1
    assert report.nce_loss == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5])
def test_proposals_needed_are_those_of_the_recalibrated_ratio(scale: float) -> None:
    problem = GaussianPair(2.0)
    report = reported(problem, problem.head(scale))
    exponent = problem.kl + math.sqrt(2 * problem.kl)
    error = report.kl_error * report.slope + report.offset_error
    error += scale * report.slope_error * exponent
    assert abs(math.log(report.proposals_needed) - exponent) < 4 * error < 0.8


def test_means_of_the_ratio() -> None:
    codes = Codes()
    report = reported(codes, codes.head(), n=10_000)
    p, r = codes.prior.probs, codes.target.probs / codes.prior.probs
    squared, fourth = (p * r**2).sum(), (p * r**4).sum()
    inverse = (p / r).sum()  # E_q[1/r²]
    assert abs(report.mean_r - 1) < 4 * (squared - 1).sqrt() / 100  # of 10,000 draws
    assert abs(report.mean_inverse_r - 1) < 4 * (inverse - 1).sqrt() / 100
    sharp = reported(codes, codes.head(2.0), n=10_000)
    assert abs(sharp.mean_r - squared) < 4 * (fourth - squared**2).sqrt() / 100


def test_groups_are_contrasted_under_the_posterior_of_those_before() -> None:
    pair = CorrelatedPair()
    report = diagnose(NCPrior(pair, pair.heads()), pair.data(4000))
    first, second = report.groups
    assert (first.group, first.verdict) == (0, Verdict.CONSTANT)
    assert (second.group, second.verdict) == (1, Verdict.GOOD)
    assert abs(second.kl - pair.kl) < 4 * second.kl_error
    assert abs(second.jsd - pair.jsd) < 4 * second.jsd_error
    expected = pair.expect(lambda z: pair.law(z).mean_log_z(500))
    assert abs(second.log_z - expected) < 4 * second.log_z_error


# Calibration


def test_recalibration_follows_any_affine_map_exactly() -> None:
    q, p = draws(GaussianPair(1.0), 2, 500)
    fit = recalibrate(q, p)
    for a, b in ((1000.0, 0.0), (-0.01, 3.0), (0.5, -700.0)):
        mapped = recalibrate(a * q.double() + b, a * p.double() + b)
        assert mapped.slope == pytest.approx(fit.slope / a, rel=1e-6)
        assert mapped.slope_error == pytest.approx(fit.slope_error / abs(a), rel=1e-6)
        assert mapped.offset == pytest.approx(fit.offset - fit.slope * b / a, rel=1e-6)


def test_recalibration_is_the_least_loss() -> None:
    q, p = (t.double() for t in draws(GaussianPair(8.0), 1, 3000))
    fit = recalibrate(q, p)

    def loss(a: float, b: float) -> float:
        return float(softplus(-(a * q + b)).mean() + softplus(a * p + b).mean())

    least = loss(fit.slope, fit.offset)
    for da, db in ((1e-3, 0.0), (-1e-3, 0.0), (0.0, 1e-2), (0.0, -1e-2)):
        assert loss(fit.slope + da, fit.offset + db) > least


def test_errors_of_the_recalibration_are_the_inverse_fisher_information() -> None:
    problem, n = GaussianPair(1.0, width=0.3), 20_000
    fit = recalibrate(*draws(problem, 1, n))
    law = problem.law
    d = 1 / (1 + np.exp(-law.log_r))
    mass = law.weight * (1 + np.exp(law.log_r)) * d * (1 - d)  # of q and p together
    features = np.stack([law.log_r, np.ones_like(d)])
    fisher = (features * mass) @ features.T
    # The slope's error; classes of fixed size leave the offset's smaller.
    exact = math.sqrt(np.linalg.inv(fisher)[0, 0] / n)
    assert abs(fit.slope_error / exact - 1) < 0.05


def test_errors_of_the_recalibration_hold_for_rows_drawn_many_times() -> None:
    fits = [recalibrate(*draws(GaussianPair(1.0), 20, 200)) for _ in range(60)]
    for z in (
        torch.tensor([(f.slope - 1) / f.slope_error for f in fits]),
        torch.tensor([f.offset / f.offset_error for f in fits]),
    ):
        assert abs(z.square().sum() - 60) < 4 * math.sqrt(2 * 60)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_recalibration_does_not_exist_without_overlap(sign: float) -> None:
    q, p = sign * torch.arange(1.0, 5.0)[None], -sign * torch.arange(1.0, 5.0)[None]
    assert all(map(math.isnan, recalibrate(q, p)))
    assert all(map(math.isnan, recalibrate(0 * q, 0 * p)))


def test_reliability_by_hand() -> None:
    log3 = math.log(3)
    q = torch.tensor([[-log3, 0.0, 0.0, log3, log3, log3]])
    p = torch.tensor([[-log3, -log3, -log3, 0.0, 0.0, log3]])
    curve = reliability(q, p, num_bins=3)
    assert curve.predicted == pytest.approx((0.25, 0.5, 0.75))
    assert curve.observed == pytest.approx((0.25, 0.5, 0.75))
    assert curve.size == (4, 4, 4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_reliability_of_exact_and_sharp_heads(scale: float) -> None:
    q, p = draws(GaussianPair(1.0), 1, 10_000)
    curve = reliability(scale * q, scale * p)
    assert curve.size == (2000,) * 10
    exact = torch.tensor(curve.predicted).logit().div(scale).sigmoid()
    error = (exact * (1 - exact) / 2000).sqrt()
    # In the outer bins D is curved: its mean is not D of the mean log r.
    assert ((torch.tensor(curve.observed) - exact).abs() < 4 * error + 0.05 * (scale > 1)).all()
    assert (curve.predicted[0] < 0.5 * curve.observed[0]) == (scale > 1)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.2])
def test_pareto_k_of_exact_pareto_weights(k: float) -> None:
    repetitions, size = 25, 20_000
    n = math.ceil(3 * math.sqrt(size))
    weights = torch.empty(repetitions, size).exponential_() * k  # log of Pareto weights
    mean = np.mean([pareto_k(w) for w in weights])
    expected = (n * k + 10 * 0.5) / (n + 10)  # drawn to 1/2 as by ten more draws
    assert abs(mean - expected) < 4 * (1 + k) / math.sqrt(n * repetitions)


def test_pareto_k_of_bounded_weights_is_negative() -> None:
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(stats.genpareto.rvs(-0.5, size=100_000, random_state=rng))
    n = math.ceil(3 * math.sqrt(100_000))
    assert abs(pareto_k(weights.log()) - (-0.5 * n + 5) / (n + 10)) < 4 * 0.5 / math.sqrt(n) + 0.02


def test_where_the_tail_of_pareto_k_begins() -> None:
    n, size = 300, 10_000  # 3 √S of S weights
    tail = -0.5 * ((torch.arange(n) + 0.5) / n).log()  # quantiles of Pareto weights, k = 1/2
    body = torch.linspace(0.01, 1, size - n).log()
    assert abs(pareto_k(torch.cat([tail, body])) - 0.5) < 0.01
    # Where many weights equal the largest of the rest, the tail begins above them.
    assert abs(pareto_k(torch.cat([tail, body]).clamp(min=0.5)) - 0.5) < 0.01
    crowded = torch.cat([tail[:100], torch.linspace(0.01, 0.02, 200), body])
    assert pareto_k(crowded) > 1  # the 200 are of the tail
    # S/5 of few weights.
    few = torch.cat([tail[7::15], torch.linspace(0.9, 1, 80).log()])
    assert abs(pareto_k(few) - 0.5) < 0.05


def test_pareto_k_knows_no_scale_and_overflows_nowhere() -> None:
    log_weights = torch.randn(5000, dtype=torch.float64)
    k = pareto_k(log_weights)
    assert pareto_k(log_weights + 2000) == pytest.approx(k, abs=1e-6)
    assert 10 < pareto_k(100 * log_weights) < math.inf
    assert 1 < pareto_k(1000 * log_weights) < math.inf  # few values left in float64
    assert math.isnan(pareto_k(torch.zeros(1000)))


def test_mean_and_its_error_by_hand() -> None:
    mean = Mean.of(torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 7.0]]))  # rows 1, 2, 6
    assert mean.value == 3.0
    assert mean.error == pytest.approx(math.sqrt(7 / 3))


# What it takes and leaves


def kinds_of_data() -> Iterator[Any]:
    x = GaussianPair(1.0).data(3000)
    yield x
    yield x.numpy()
    yield TensorDataset(x)
    yield DataLoader(TensorDataset(x), 128, shuffle=True)
    yield list(x.split(1000))


def test_every_kind_of_data() -> None:
    problem = GaussianPair(1.0)
    prior = NCPrior(problem.source(), problem.head())
    for data in kinds_of_data():
        report = diagnose(prior, data, train=data)
        assert (report.num_rows, report.num_draws) == (3000, 9000)
        assert abs(report.groups[0].kl - 1) < 4 * report.groups[0].kl_error < 0.2
        assert abs(report.groups[0].train_gap) < 4 * report.groups[0].train_gap_error


def test_pools_come_from_all_of_the_data() -> None:
    """Rows in some order: the pools of the first half alone would see one context."""
    source = SingleGroup(
        standard_normal(1), lambda x, c: around(1.0)(0 * x), lambda z, c: z, condition=lambda x: x
    )
    contexts = []

    def log_r(z: Tensor, context: Tensor) -> Tensor:
        if z.shape[0] > 2:
            contexts.append(context)
        return 0 * z[..., 0] + 0.001 * z[..., 0]

    x = torch.arange(500.0)[:, None]
    diagnose(NCPrior(source, ExactRatio(log_r)), x, batch_size=50)
    seen = torch.cat(contexts).unique()
    assert len(seen) == 64
    assert seen.min() < 50 and seen.max() >= 450


def test_few_rows_walk_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 draws of 8 rows are 125 walks, 12 of them in each batch of 100 rows."""
    problem, sizes = Ring(), []
    module = sys.modules["ncprior.diagnostics.diagnose"]
    walk = module.walk_posterior

    def noted(prior: NCPrior, encoding: Any, *rest: Any) -> Tensor:
        sizes.append(num_rows(encoding))
        return walk(prior, encoding, *rest)

    monkeypatch.setattr(module, "walk_posterior", noted)
    prior = NCPrior.for_source(problem.source(), problem.data(99))
    diagnose_all(prior, problem.data(8), num_draws=1000, batch_size=100, fresh_steps=0)
    assert sizes[:-1] == [96] * 11 and sizes[-1] == 8  # 11 x 12 walks, and the pools


def test_same_seed_same_report() -> None:
    problem = GaussianPair(1.0)
    prior, x = NCPrior(problem.source(), problem.head()), problem.data(100)
    reports = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        reports.append(diagnose_all(prior, x, fresh_steps=3).to_json())
    assert reports[0] == reports[1] != reports[2]


def test_heads_are_measured_in_evaluation_mode_and_nothing_changes() -> None:
    problem = GaussianPair(1.0)
    head = MLPHead((2,), width=16, dropout=0.5)
    nn.init.normal_(head.out.weight)
    prior, x = NCPrior(problem.source(), head), problem.data(200)
    before = {name: t.clone() for name, t in prior.state_dict().items()}
    reports = []
    for mode in (True, False):
        prior.train(mode)
        head.blocks[0].train()  # modes of its own
        modes = [m.training for m in prior.modules()]
        torch.manual_seed(3)
        reports.append(diagnose(prior, x).to_json())
        assert [m.training for m in prior.modules()] == modes
    assert reports[0] == reports[1]  # no dropout
    assert all(torch.equal(t, before[name]) for name, t in prior.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in prior.parameters())


def test_a_bad_head_is_named_and_modes_come_back() -> None:
    pair = CorrelatedPair()
    heads = pair.heads()
    heads[1] = ExactRatio(lambda z, c: z[..., 0] / 0)
    prior = NCPrior(pair, heads).train()
    with pytest.raises(FloatingPointError, match="Group 1: log r is not finite"):
        diagnose(prior, pair.data(50))
    assert all(m.training for m in prior.modules())


def test_a_vae_in_training_mode_is_refused() -> None:
    class Training(CorrelatedPair):
        module = nn.Linear(1, 1).train()

    pair = Training()
    with pytest.raises(ValueError, match="vae.eval"):
        diagnose(NCPrior(pair, pair.heads()), pair.data(50))


def test_no_gradients_are_kept() -> None:
    problem, enabled = GaussianPair(1.0), []

    def log_r(z: Tensor) -> Tensor:
        enabled.append(torch.is_grad_enabled())
        return problem.log_r(z)

    diagnose(NCPrior(problem.source(), ExactRatio(log_r)), problem.data(50))
    assert enabled and not any(enabled)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"held_out": torch.zeros(1, 2)}, ValueError, "at least 2 rows of data; got 1"),
        ({"held_out": []}, ValueError, "at least 2 rows of data; got 0"),
        ({"held_out": iter([torch.zeros(4, 2)])}, TypeError, "one-shot"),
        ({"num_proposals": (500, 50)}, ValueError, r"ascending.*\(500, 50\)"),
        ({"num_proposals": (0, 50)}, ValueError, r"num_proposals\[0\] must be"),
        ({"num_draws": 0}, ValueError, "num_draws"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    problem = GaussianPair(1.0)
    with pytest.raises(error, match=words):
        diagnose(
            NCPrior(problem.source(), problem.head()), **{"held_out": problem.data(10), **options}
        )


# The report


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Of one group, and of thirty with every verdict but one, off and extreme ones among them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        groups = []
        for k in range(30):
            problem = GaussianPair((0.0, 0.3, 1.0, 2.0, 5.0, 12.0, 60.0)[k % 7])
            head = problem.head((1.0, 2.0, 1.0, 0.5, -9.0)[k % 5])
            x = problem.data(300)
            group = reported(problem, head, 300, num_draws=600, train=x if k % 3 else None)
            groups.append(group._replace(group=k))
    groups[7] = GroupReport(7, Verdict.OFF)
    return [Report((groups[2],), 300, 600, (50, 500)), Report(tuple(groups), 300, 600, (50, 500))]


@pytest.mark.parametrize("which", [0, 1])
def test_table(reports: list[Report], which: int) -> None:
    report = reports[which]
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[:3] == ["group", "NCE", "loss"]
    rows = lines[2 : 2 + len(report.groups)]
    assert lines[2 + len(report.groups)] == ""
    assert {len(row) for row in rows} == {len(lines[0])}  # aligned
    assert [row.split()[0] for row in rows] == [str(g.group) for g in report.groups]
    text = " ".join(" ".join(lines).split())
    for verdict in {g.verdict for g in report.groups}:
        assert f": {verdict}. {verdict.advice}" in text
    assert "nan" not in text and "inf" not in text.replace("information", "")


def test_table_shows_the_numbers() -> None:
    group = GroupReport(0, Verdict.GOOD, nce_loss=0.9936, nce_loss_error=0.0091, jsd=0.1963)
    group = group._replace(kl=123.456, slope=0.98, slope_error=0.02, identity=1.001, log_z=-0.041)
    group = group._replace(mean_r=1.02, mean_r_k=0.31, mean_inverse_r=2e13, mean_inverse_r_k=1.1)
    group = group._replace(ess={50: 13.2, 500: 91.7}, proposals_needed=1_000_000)
    line = str(Report((group,), 10, 20, (50, 500))).splitlines()[2]
    cells = "0 0.994±.009 0.196 123.5 0.98±.02 1.00 1.02 0.3 (2e13) 1.1 13/92 -0.04 1e6"
    assert line.split() == cells.split()
    group = group._replace(nce_loss=86.95, nce_loss_error=1.831, mean_r=4e103, mean_r_k=14.9)
    line = str(Report((group,), 10, 20, (50, 500))).splitlines()[2]
    assert "86.95±1.8 " in line and "(4e103) 15 " in line


def test_N2_the_report_shows_the_active_latents() -> None:
    counts = [(128, 9), (20, 20), (20, 20), (20, 0)]
    groups = tuple(
        GroupReport(k, Verdict.OFF, num_latents=n, num_active=a) for k, (n, a) in enumerate(counts)
    )
    report = Report(groups, 10, 20, (50, 500))
    text = " ".join(str(report).split())
    assert "group 0: 9 of 128 latents are active; groups 1-2: all 20 latents are active; " in text
    assert "group 3: none of 20 latents is active, which means that the latents are not" in text
    assert [g["num_active"] for g in report.to_dict()["groups"]] == [9, 20, 20, 0]
    assert "JSD is a lower bound" in text


def test_N2_active_latents_are_counted_on_held_out_data() -> None:
    """Of two latents one is never used."""

    def posterior(x: Tensor) -> Distribution:
        return Independent(Normal(x * torch.tensor([2.0, 0.0]), torch.tensor([0.5, 1.0])), 1)

    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    prior = NCPrior.for_source(
        SingleGroup(base, posterior, lambda z: z[:, :1]), torch.randn(64, 1)
    )
    report = diagnose(prior, torch.randn(64, 1), num_draws=64, fresh_steps=0)
    assert (report.groups[0].num_active, report.groups[0].num_latents) == (1, 2)


def test_groups_of_one_verdict_share_a_line() -> None:
    verdicts = [Verdict.GOOD] * 3 + [Verdict.OFF] + [Verdict.GOOD, Verdict.TOO_FEW]
    groups = tuple(GroupReport(k, verdict) for k, verdict in enumerate(verdicts))
    text = str(Report(groups, 10, 20, (50, 500)))
    assert "groups 0-2, 4: head is good." in text
    assert "group 3: off." in text
    assert "group 5: too few proposals." in text


def test_json(reports: list[Report]) -> None:
    report = reports[1]
    plain = json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(word))
    assert plain == report.to_dict()
    assert plain["num_proposals"] == [50, 500]
    third = plain["groups"][2]
    assert third["kl"] == report.groups[2].kl
    assert type(report.to_dict()["groups"][2]["verdict"]) is str
    assert third["verdict"] == "head is good" and third["advice"] == Verdict.GOOD.advice
    assert third["ess"] == {"50": report.groups[2].ess[50], "500": report.groups[2].ess[500]}
    assert len(third["reliability"]["predicted"]) == 10
    assert plain["groups"][7]["nce_loss"] is None and plain["groups"][7]["reliability"] is None


@pytest.mark.parametrize("which", [0, 1])
def test_plot(reports: list[Report], which: int) -> None:
    report = reports[which]
    figure = report.plot()
    jsd, kl, ess, curve = figure.axes
    for axes, name in ((jsd, "jsd"), (kl, "kl")):
        heights = {b.get_x() + b.get_width() / 2: b.get_height() for b in axes.patches}
        for g in report.groups:
            expected = getattr(g, name)
            assert heights[g.group] == pytest.approx(expected, nan_ok=True)
    assert len(ess.patches) == 2 * len(report.groups)
    assert len(curve.lines) == 1 + sum(g.reliability is not None for g in report.groups)
    figure.savefig(picture := io.BytesIO(), dpi=50)
    assert picture.getvalue().startswith(b"\x89PNG")


def test_plot_without_matplotlib(reports: list[Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"extra 'plot' \(pip install '\.\[plot\]'"):
        reports[0].plot()


def test_every_verdict_has_words_and_advice() -> None:
    for verdict in Verdict:
        assert str(verdict) == f"{verdict}" == verdict.value == json.loads(json.dumps(verdict))
        assert verdict.advice.endswith(".")


def test_a_source_that_shows_no_posterior_is_refused() -> None:
    class Blind(CorrelatedPair):
        def group(self, state: Any) -> Group:
            return super().group(state)._replace(posterior=None)

    pair = Blind()
    with pytest.raises(ValueError, match="no posterior"):
        diagnose(NCPrior(pair, pair.heads()), pair.data(10))


def test_a_single_draw_is_enough_for_a_fresh_head() -> None:
    prior = NCPrior(NO_GAP.source(), MLPHead((2,), width=4, depth=1)).eval()
    report = diagnose_all(prior, torch.randn(40, 2), num_draws=1, fresh_steps=2)
    assert math.isfinite(report.groups[0].missing)


def test_log_r_without_draws_is_refused() -> None:
    with pytest.raises(ValueError, match="log_q must have 2 dimensions"):
        recalibrate(torch.randn(9), torch.randn(9))
