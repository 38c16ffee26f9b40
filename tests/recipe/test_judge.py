"""Gap of a hierarchy: the divergence of every group, from one draw per row and group."""

import math
import time
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ncprior import Group, LatentSource, NCPrior, sir
from ncprior.bases import rebase
from ncprior.diagnostics.calibration import Mean
from ncprior.heads import MLPHead
from ncprior.recipe import judge
from ncprior.recipe.judge import Divergences, is_worse, remaining_gap
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.recipe.sources import OWN_DRAW
from ncprior.samplers import Draw

SHIFT = 1.5


class Walk(NamedTuple):
    """Rows of x, if there are any, and latents so far."""

    x: Tensor | None
    z: tuple[Tensor, ...]
    rows: int


class Pair(LatentSource[Tensor, Walk]):
    """Two groups with the prior N(0, 1), and posteriors around the two columns of x."""

    num_groups = 2

    def __init__(self, unknown: bool = False) -> None:
        self.unknown = unknown

    def encode(self, x: Tensor) -> Tensor:
        return x

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> Walk:
        return Walk(encoding, (), batch_size)

    def group(self, state: Walk) -> Group:
        k, q = len(state.z), None
        p = Independent(Normal(torch.zeros(state.rows, 1), 1.0), 1)
        if state.x is not None:
            kind = Unknown if self.unknown else Normal
            q = Independent(kind(state.x[:, k : k + 1], 1e-3), 1)
        return Group(p, q, state.z[0] if k else None)

    def advance(self, state: Walk, z: Tensor) -> Walk:
        return state._replace(z=(*state.z, z))

    def decode(self, state: Walk) -> Tensor:
        return torch.cat(state.z, 1)


class Unknown(Normal):
    """A normal distribution whose parameters the package does not know."""


def parts(rows: int = 2000) -> Parts:
    """The first column of x is N(1.5, 1), the second one the prior."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 * rows, 2, generator=generator) + torch.tensor([SHIFT, 0.0])
    return Parts(*x.split(rows), rows)


def divergence() -> float:
    """JSD of N(0, 1) and N(1.5, 1) in nats, on a grid."""
    z = torch.linspace(-9, 11, 20_001, dtype=torch.float64)
    p, q = (Normal(mean, 1.0).log_prob(z).exp() for mean in (0.0, SHIFT))
    m = (p + q) / 2
    return (torch.trapezoid(p * (p / m).log() + q * (q / m).log(), z) / 2).item()


def prior_of(source: LatentSource[Any, Any]) -> NCPrior:
    heads = [MLPHead((1,), context_shape=shape, width=32, depth=1) for shape in (None, (1,))]
    return NCPrior(source, heads).eval()


@pytest.mark.parametrize("unknown", [False, True])
def test_the_divergence_of_every_group(monkeypatch: pytest.MonkeyPatch, unknown: bool) -> None:
    """A lower bound, so that it may be below the truth by what few steps leave."""
    monkeypatch.setattr(judge, "_STEPS", 300)
    monkeypatch.setattr(judge, "_CACHED", (500, 4000))
    torch.manual_seed(0)
    record = Record(progress=False, max_seconds=None)
    gap = remaining_gap(prior_of(Pair(unknown)), OWN_DRAW, parts(), record, name="prior")
    for first, second in (gap.judge.groups, gap.choose.groups):
        assert abs(first.value - divergence()) < 4 * first.error + 0.005
        assert 0.003 < first.error < 0.012
        assert abs(second.value) < 4 * second.error + 0.002


class NoConfig(nn.Module):
    """A head that nothing can make anew."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return 0.0 * z[..., 0]


def test_heads_that_cannot_be_made_anew_are_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier need not be like them."""
    monkeypatch.setattr(judge, "_STEPS", 300)
    monkeypatch.setattr(judge, "_CACHED", (500, 4000))
    torch.manual_seed(0)
    prior = NCPrior(Pair(), [NoConfig(), NoConfig()]).eval()
    record = Record(progress=False, max_seconds=None)
    first, second = remaining_gap(prior, OWN_DRAW, parts(), record, name="prior").judge.groups
    assert abs(first.value - divergence()) < 4 * first.error + 0.005
    assert abs(second.value) < 4 * second.error + 0.002


def test_every_row_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_STEPS", 40)
    monkeypatch.setattr(judge, "_CACHED", (500, 700))
    drawn = []

    def counted(base: Distribution, *arguments: Any, **options: Any) -> Draw:
        drawn.append(len(base.sample()))
        return sir(base, *arguments, **{**options, "num_proposals": 2})

    record = Record(progress=False, max_seconds=None)
    remaining_gap(prior_of(Pair()), counted, parts(400), record, name="prior")
    train = math.ceil(700 / 256) * 256
    assert sum(rows for rows in drawn if rows > 1) == 2 * (train + 2 * 400)  # one finds the device


def test_too_little_time_leaves_fewer_draws() -> None:
    drawn = []

    def slow(base: Distribution, *arguments: Any, **options: Any) -> Draw:
        time.sleep(0.02)  # of 0.1 s, an eighth at most is for the draws of one part
        drawn.append(len(base.sample()))
        return sir(base, *arguments, **{**options, "num_proposals": 2})

    record = Record(progress=False, max_seconds=1e-3)
    gap = remaining_gap(prior_of(Pair()), slow, parts(600), record, name="prior")
    assert [rows for rows in drawn if rows > 1] == [256] * 6  # one batch of each part and group
    assert not gap.is_measured or all(math.isfinite(mean.value) for mean in gap.judge.groups)


def test_the_gap_of_a_better_prior_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_STEPS", 200)
    bases = [Independent(Normal(torch.tensor([mean]), 1.0), 1) for mean in (SHIFT, 0.0)]
    torch.manual_seed(1)
    record = Record(progress=False, max_seconds=None)
    prior = prior_of(rebase(Pair(), bases))
    gap = remaining_gap(prior, OWN_DRAW, parts(), record, name="fitted base")
    for mean in gap.judge.groups:
        assert abs(mean.value) < 4 * mean.error + 0.002


@pytest.mark.parametrize("progress", [False, True])
def test_the_classifiers_show_how_far_they_are(
    progress: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge, "_STEPS", 20)
    record = Record(progress=progress, max_seconds=None)
    remaining_gap(prior_of(Pair()), OWN_DRAW, parts(400), record, name="prior")
    assert ("20/20" in capfd.readouterr().err) == progress


def test_the_sum_over_groups_knows_that_they_have_the_same_rows() -> None:
    """Ten groups whose losses have a correlation of 0.3 over rows; the spread of 400 sums."""
    torch.manual_seed(0)
    common, own = torch.randn(400, 1, 200), torch.randn(400, 10, 200)
    losses = 1.2 + 0.3 * (0.3**0.5 * common + 0.7**0.5 * own)
    found = [Divergences.of(one) for one in losses.double()]
    assert {one.num_rows for one in found} == {losses.shape[-1]}
    spread = torch.tensor([one.total.value for one in found]).std().item()
    told = sum(one.total.error for one in found) / 400
    assert told == pytest.approx(spread, rel=0.15)  # 4 standard errors of a spread of 400
    assert sum(mean.error**2 for mean in found[0].groups) ** 0.5 < 0.6 * spread
    assert found[0].total.value == pytest.approx(sum(mean.value for mean in found[0].groups))


def test_an_estimate_of_0_has_an_interval() -> None:
    """log r is ±a at even odds on both sides of x: the best classifier finds JSD D with variance D/N."""
    nothing = Divergences.of(torch.full((1, 400), 2 * math.log(2), dtype=torch.float64)).interval()
    assert (nothing.value, nothing.low) == (0.0, 0.0)
    assert nothing.high == pytest.approx(1.96**2 / 400)
    rows, a = 1000, 0.1
    torch.manual_seed(0)
    shares = torch.tensor([1 / (1 + math.exp(-a)), 1 / (1 + math.exp(a))])  # of a half of x
    is_high = torch.rand(2, 500, rows) < shares[:, None, None]
    log_r = torch.where(is_high, a, -a).double()
    losses = nn.functional.softplus(-log_r[0]) + nn.functional.softplus(log_r[1])
    found = (math.log(2) - losses.mean(1) / 2).std().item()
    jsd = a**2 / 8
    assert found == pytest.approx((jsd / rows) ** 0.5, rel=0.13)  # 4 standard errors of 500


def test_the_worst_of_many_pairs_is_surely_worse_as_seldom_as_one() -> None:
    torch.manual_seed(0)
    noise = (2 * torch.randn(20_000, 2)).tolist()
    worse = [is_worse(Mean(a, 2.0), Mean(b, 2.0), among=10) for a, b in noise]
    alone = [is_worse(Mean(a, 2.0), Mean(b, 2.0)) for a, b in noise]
    assert sum(alone) / 20_000 == pytest.approx(0.0228, abs=0.0042)  # 4 standard errors
    assert 10 * sum(worse) / 20_000 == pytest.approx(0.0228, abs=0.0135)
