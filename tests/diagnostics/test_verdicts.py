"""Verdicts at every gap: the remedy is right whatever the scale and the saturation of log r."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import NCETrainer, NCPrior, SingleGroup
from ncprior.diagnostics import GroupReport, Verdict, diagnose, recalibrate
from ncprior.diagnostics.needed import kl_bound, needed, reach
from ncprior.diagnostics.report import plain


@dataclass(frozen=True)
class Pair:
    """q(z) = N(m, s²) and p(z) = N(0, 1) in D dimensions, with a given KL(q ‖ p) in nats."""

    kl: float
    dim: int
    std: float = 1.0

    @property
    def mean(self) -> float:
        rest = self.kl / self.dim - (-math.log(self.std) + (self.std**2 - 1) / 2)
        return math.sqrt(2 * rest)

    @property
    def log_needed(self) -> float:
        """KL + sd_q[log r], in closed form."""
        square, linear = (self.std**2 - 1) / 2, self.std * self.mean
        return self.kl + math.sqrt(self.dim * (2 * square**2 + linear**2))

    def data(self, rows: int) -> Tensor:
        width = 0.3 * self.std  # of q(z | x); the rest is the spread of x
        return self.mean + math.sqrt(self.std**2 - width**2) * torch.randn(rows, self.dim)

    def source(self) -> SingleGroup:
        base = Independent(Normal(torch.zeros(self.dim), torch.ones(self.dim)), 1)
        width = 0.3 * self.std
        return SingleGroup(base, lambda x: Independent(Normal(x, width + 0 * x), 1), lambda z: z)

    def log_r(self, z: Tensor) -> Tensor:
        u = (z - self.mean) / self.std
        return (z.square() / 2 - u.square() / 2 - math.log(self.std)).sum(-1)


Map = Callable[[Tensor], Tensor]


class Ratio(nn.Module):
    """A head that returns a function of a fixed log r(z)."""

    def __init__(self, log_r: Map, of: Map = lambda log_r: log_r) -> None:
        super().__init__()
        self.log_r, self.of, self.factor = log_r, of, nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.factor * self.of(self.log_r(z))


HEADS: dict[str, Map] = {
    "exact": lambda log_r: log_r,
    "flat": lambda log_r: 0.3 * log_r,
    "sharp": lambda log_r: 3 * log_r,
    "saturated at 5": lambda log_r: 5 * torch.tanh(log_r / 5),
    "saturated at 9": lambda log_r: 9 * torch.tanh(log_r / 9),
}


def right_verdicts(pair: Pair, head: str) -> set[Verdict]:
    """The verdicts whose remedy is right; two or more near a threshold, within a factor of 3."""
    if pair.kl < 0.01:
        harm = {Verdict.OVER_CONFIDENT} if head == "sharp" else set()
        return {Verdict.MATCHES, Verdict.CONSTANT} | harm
    log_m = pair.log_needed
    right = {Verdict.MATCHES} if pair.kl <= 0.05 else set()
    if log_m > math.log(1e4):
        right.add(Verdict.TOO_WIDE)
    if math.log(170) < log_m < math.log(1e6):
        right.add(Verdict.TOO_FEW)
    if log_m < math.log(1e6):
        right |= {
            "flat": {Verdict.TOO_FLAT},
            "sharp": {Verdict.OVER_CONFIDENT},
            "exact": {Verdict.GOOD} if log_m < math.log(1500) else set(),
        }.get(head, {Verdict.TOO_FLAT, Verdict.INCOMPLETE})
    if head.startswith("saturated") and log_m < math.log(1500):
        right.add(Verdict.GOOD)
    return right


def wrong_cells(kls: list[float], dims: list[int], draws: int) -> tuple[list[str], int]:
    """The cells of a grid whose verdict is wrong, and the number of all cells."""
    wrong, cells = [], 0
    for kl, dim, std in itertools.product(kls, dims, (1.0, 0.5)):
        if std < 1 and kl / dim < 0.32:  # a narrow q is this far away at least
            continue
        pair = Pair(kl, dim, std)
        torch.manual_seed(0)
        x = pair.data(draws // 2)
        for name, of in HEADS.items():
            prior = NCPrior(pair.source(), Ratio(pair.log_r, of)).eval()
            found = diagnose(prior, x, num_draws=draws, fresh_steps=0).groups[0].verdict
            cells += 1
            if found not in right_verdicts(pair, name):
                wrong.append(f"{pair}, {name}: {found}")
    return wrong, cells


def test_W1_verdicts_over_gaps_and_scales() -> None:
    wrong, cells = wrong_cells([0, 3, 33, 1807], [2, 64], 4096)
    assert cells == 65
    assert not wrong


@pytest.mark.slow
def test_W1_verdicts_over_gaps_and_scales_whole() -> None:
    kls = [0, 0.02, 0.1, 0.5, 1, 2, 3, 4, 5, 7, 8, 12, 16, 33, 64, 150, 400, 1000, 2000]
    wrong, cells = wrong_cells(kls, [2, 8, 32, 64, 256], 8192)
    assert cells > 700
    assert len(wrong) <= 0.01 * cells, "\n".join(wrong)


@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("level", [3.0, 5.0, 20.0])
def test_W1_a_head_that_saturates_on_a_hopeless_gap(dim: int, level: float) -> None:
    """Separated without error: the recalibration is NaN, and log r is what training left."""
    pair = Pair(300.0, dim)
    prior = NCPrior(pair.source(), Ratio(lambda z: level * torch.tanh(pair.log_r(z)))).eval()
    group = diagnose(prior, pair.data(500), num_draws=2000, fresh_steps=0).groups[0]
    assert group.verdict is Verdict.TOO_WIDE
    assert group.needs_more
    assert group.proposals_needed >= 35_000  # the draws of p that were looked at
    assert group.kl_bound > 10 > level or level > 10
    assert ">" in str(diagnose(prior, pair.data(500), num_draws=2000, fresh_steps=0))


@pytest.mark.parametrize("steps", [30, 150])
def test_N1_D2_trained_heads_on_a_hopeless_gap(steps: int) -> None:
    pair = Pair(300.0, 16, std=0.3)
    x = pair.data(1000)
    prior = NCPrior.for_source(pair.source(), x[:256], width=16)
    trainer = NCETrainer(prior.train(), torch.optim.AdamW(prior.parameters(), 3e-3))
    for _ in range(steps):
        trainer.step(x[torch.randint(len(x), (128,))])
    group = diagnose(prior.eval(), pair.data(500), num_draws=2000, fresh_steps=0).groups[0]
    assert group.kl < 100  # far from 300
    assert group.verdict is Verdict.TOO_WIDE


def half_blind(pair: Pair) -> NCPrior:
    """A calibrated head that sees half of the dimensions."""
    half = Pair(pair.kl / 2, pair.dim // 2)
    return NCPrior(pair.source(), Ratio(lambda z: half.log_r(z[..., : half.dim]))).eval()


def report_of(prior: NCPrior, x: Tensor, steps: int = 60) -> GroupReport:
    return diagnose(prior, x, fresh_steps=steps).groups[0]


def test_D6_a_calibrated_head_that_misses_half_of_the_gap_is_incomplete() -> None:
    pair = Pair(2.0, 2)
    x = pair.data(2000)
    group = report_of(half_blind(pair), x)
    assert abs(group.slope - 1) < 4 * group.slope_error  # calibrated
    assert group.verdict is Verdict.INCOMPLETE
    exact = report_of(NCPrior(pair.source(), Ratio(pair.log_r)).eval(), x)
    assert exact.verdict is Verdict.GOOD
    assert exact.missing < 3 * exact.missing_error + 0.002
    # A fresh head finds at most what the exact one knows more, up to sampling error.
    assert group.missing < exact.jsd - group.jsd + 4 * (group.missing_error + exact.jsd_error)
    assert group.missing > 0.6 * (exact.jsd - group.jsd)


def test_fresh_heads_see_all_classes_of_data_in_an_order_of_its_own() -> None:
    """Rows of two classes by turns: half of a batch must not be one class, and the rest the other."""
    x = torch.tensor([-3.0, 3.0]).repeat(600)[:, None] + 0.1 * torch.randn(1200, 1)
    base = Independent(Normal(torch.zeros(1), 1.0), 1)
    source = SingleGroup(base, lambda x: Independent(Normal(x, 0.1), 1), lambda z: z)
    prior = NCPrior(source, Ratio(lambda z: 0 * z.sum(-1))).eval()
    assert report_of(prior, x).missing > 0.5  # of at most log 2; a classifier is almost sure


def test_W2_fresh_heads_learn_inside_inference_mode_too() -> None:
    pair = Pair(2.0, 2)
    prior, x = half_blind(pair), pair.data(600)
    torch.manual_seed(0)
    outside = diagnose(prior, x, fresh_steps=20).groups[0]
    torch.manual_seed(0)
    with torch.inference_mode():
        inside = diagnose(prior, x, fresh_steps=20).groups[0]
    assert inside.missing == outside.missing > 0.01


def test_D6_fresh_heads_change_nothing_and_can_be_left_out() -> None:
    pair = Pair(1.0, 2)
    prior, x = half_blind(pair), pair.data(400)
    torch.manual_seed(3)
    without = diagnose(prior, x, fresh_steps=0).groups[0]
    torch.manual_seed(3)
    group = diagnose(prior, x, fresh_steps=2).groups[0]
    assert math.isnan(without.missing)
    assert (
        group._replace(missing=math.nan, missing_error=math.nan, reliability=None)[2:8]
        == (without[2:8])
    )
    assert all(p.grad is None for p in prior.parameters())
    off = NCPrior(pair.source(), Ratio(pair.log_r)).eval()
    off.active[0] = False
    assert diagnose(off, x).groups[0].verdict is Verdict.OFF


def test_C1_recalibration_of_samples_that_hardly_overlap() -> None:
    q = torch.full((1, 4500), 6.35)
    q[0, :8] = torch.linspace(-6.35, -5.8, 8)
    p = torch.full((1, 4500), -6.46)
    p[0, :2] = torch.tensor([-6.1, -5.73])
    fit = recalibrate(q, p)
    assert fit.slope == pytest.approx(20.42, abs=0.01)  # of scikit-learn
    assert fit.offset == pytest.approx(124.4, abs=0.1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_bound_of_kl_knows_no_scale(scale: float) -> None:
    z = torch.randn(2, 1, 40_000, dtype=torch.float64)
    log_q, log_p = 2 * (z[0] + 2) - 2, 2 * z[1] - 2  # q = N(2, 1): KL is 2 nats
    assert kl_bound(scale * log_q, scale * log_p) == pytest.approx(2.0, abs=0.1)


def test_the_bound_of_kl_is_at_most_the_logarithm_of_the_draws() -> None:
    assert kl_bound(torch.ones(1, 50).double(), -torch.ones(1, 50).double()) == pytest.approx(
        math.log(50)
    )
    assert kl_bound(torch.zeros(1, 50).double(), torch.zeros(1, 50).double()) == 0


def test_proposals_needed_are_at_least_those_that_hold_one_typical_draw() -> None:
    log_q, log_p = torch.full((1, 100), 0.1), torch.zeros(1, 1000)
    log_p[0, :5] = 0.2
    found = needed(log_q.double(), reach(log_q, log_p))
    assert found.proposals == 200
    assert 0 < found.surely < 200
    assert not found.is_bound
    none = needed(log_q.double(), reach(log_q, log_p[:, 5:]))
    assert none.proposals == 995
    assert none.is_bound


def test_log_r_of_unequal_counts_or_with_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="the same shape"):
        recalibrate(torch.zeros(1, 3), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="log_p must be finite"):
        recalibrate(torch.zeros(1, 3), torch.full((1, 3), math.nan))


def test_numbers_of_numpy_are_json() -> None:
    assert plain({"a": np.int64(5), "b": (np.float32(math.nan), np.float64(0.5))}) == {
        "a": 5,
        "b": [None, 0.5],
    }
