"""Which sampler is recommended, and that it is a good one."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers.problems import Codes, CorrelatedPair, GaussianPair, SampleOnly, TwoBumps, around
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup, sir
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.rebase import rebase
from ncprior.diagnostics.diagnose import diagnose as diagnose_all
from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.recommend import Recommendation, recommend_sampler
from ncprior.diagnostics.report import Report
from ncprior.heads.product import ProductHead
from ncprior.samplers.smc import tempered_smc

diagnose = partial(diagnose_all, fresh_steps=0)  # fresh heads have a file of their own


def report_of(*groups: dict[str, Any]) -> Report:
    common = {"verdict": Verdict.GOOD, "has_gradient": True}
    made = (GroupReport(k, **{**common, **group}) for k, group in enumerate(groups))
    return Report(tuple(made), 100, 1000, (50, 500))


def test_sir_where_there_are_plenty_of_proposals() -> None:
    choice = recommend_sampler(report_of({"proposals_needed": 10, "kl": 1.0}), budget=300)
    assert choice.sampler.func is sir  # type: ignore[attr-defined]
    assert choice.sampler.keywords == {"num_proposals": 300}  # type: ignore[attr-defined]
    assert choice.evaluations == 300


def test_smc_where_there_are_not() -> None:
    choice = recommend_sampler(report_of({"proposals_needed": 11, "kl": 1.0}), budget=300)
    assert choice.sampler.func is tempered_smc  # type: ignore[attr-defined]
    assert choice.evaluations <= 300
    assert str(choice).startswith(
        "tempered_smc(num_moves=16, num_particles=1, share_particles=True, step_size=0.5), about 66"
    )


@pytest.mark.parametrize("kind", [{"has_context": True}, {"has_gradient": False}])
def test_sir_where_no_population_can_walk(kind: dict[str, bool]) -> None:
    found = report_of({"proposals_needed": 1000, "kl": 6.0, **kind})
    choice = recommend_sampler(found, budget=100)
    assert choice.sampler.func is sir  # type: ignore[attr-defined]
    assert "closer base" in choice.reason


def test_sir_within_the_components_of_a_mixture_base() -> None:
    mixture = {"proposals_needed": 40, "kl": 1.0, "num_components": 10}
    choice = recommend_sampler(report_of(mixture), budget=50)
    assert str(choice).startswith("within_components(sir(num_proposals=50)), about 50 eval")
    assert choice.evaluations == 50
    few = recommend_sampler(report_of(mixture), budget=30)
    chain = "tempered_smc(num_leapfrogs=3, num_moves=4, num_particles=1, step_size=0.1)"
    assert str(few).startswith(f"within_components({chain}), about 26 eval")
    least = recommend_sampler(report_of(mixture), budget=20)
    assert "num_leapfrogs=3, num_moves=3" in str(least) and least.evaluations == 20
    too_few = recommend_sampler(report_of(mixture), budget=19)
    assert str(too_few).startswith("within_components(sir(num_proposals=19)), about 19 eval")
    blind = recommend_sampler(report_of({**mixture, "has_gradient": False}), budget=30)
    assert str(blind).startswith("within_components(sir(num_proposals=30)), about 30 eval")
    plenty = recommend_sampler(report_of(mixture), budget=1200)  # sir is right at any base's rest
    assert plenty.sampler.func is sir  # type: ignore[attr-defined]


def test_diagnose_tells_the_components_of_a_mixture_base() -> None:
    problem = GaussianPair()
    base = GaussianMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2))
    source = rebase(problem.source(), base)
    prior = NCPrior.for_source(source, problem.data(99))
    report = diagnose(prior, problem.data(99))
    assert report.groups[0].num_components == 3
    assert (
        diagnose(NCPrior(problem.source(), problem.head()), problem.data(99))
        .groups[0]
        .num_components
        == 1
    )


def test_the_budget_is_shared_by_the_heads_in_use() -> None:
    groups = [{"proposals_needed": 5, "kl": 0.5}] * 3 + [{"verdict": Verdict.OFF}]
    choice = recommend_sampler(report_of(*groups), budget=100)
    assert choice.sampler.keywords == {"num_proposals": 33}  # type: ignore[attr-defined]
    assert choice.evaluations == 99
    with pytest.raises(ValueError, match="every head"):
        recommend_sampler(report_of(*groups), budget=2)


def test_a_budget_too_short_for_a_walk_is_spent_on_proposals() -> None:
    choice = recommend_sampler(report_of({"proposals_needed": 99, "kl": 9.0}), budget=7)
    assert choice.sampler.keywords == {"num_proposals": 7}  # type: ignore[attr-defined]


def test_nothing_in_use_needs_nothing() -> None:
    choice = recommend_sampler(report_of({"verdict": Verdict.OFF}), budget=1)
    assert isinstance(choice, Recommendation)
    assert choice.sampler.func is sir  # type: ignore[attr-defined]
    assert choice.evaluations == 0


def test_heads_that_are_multiplied_share_the_budget() -> None:
    """What is spent is counted in heads, whichever sampler it is."""
    for found, evaluations in (
        ({"proposals_needed": 1, "kl": 0.1}, 99),
        ({"proposals_needed": 20, "kl": 1.0, "num_components": 10}, 99),
        ({"proposals_needed": 500, "kl": 1.0, "num_components": 10}, 96),
        ({"proposals_needed": 500, "kl": 1.0}, 90),
        ({"proposals_needed": 500, "kl": 1.0, "has_context": True}, 99),
    ):
        choice = recommend_sampler(report_of({**found, "num_factors": 3}), budget=100)
        assert choice.evaluations == evaluations
    with pytest.raises(ValueError, match="got 2 for 3 heads"):
        recommend_sampler(report_of({"num_factors": 3}), budget=2)


def test_diagnose_counts_the_heads_of_a_product() -> None:
    problem = GaussianPair()
    prior = NCPrior(problem.source(), ProductHead([problem.head(), problem.head()]))
    assert diagnose(prior, problem.data(50)).groups[0].num_factors == 2


def test_diagnose_tells_what_can_be_walked_in() -> None:
    pair = diagnose(NCPrior(CorrelatedPair(), CorrelatedPair().heads()), CorrelatedPair().data(99))
    assert [(g.has_context, g.has_gradient) for g in pair.groups] == [(False, True), (True, True)]
    codes = diagnose(NCPrior(Codes().source(), Codes().head()), Codes().data(99))
    assert not codes.groups[0].has_gradient
    hidden = SingleGroup(SampleOnly(GaussianPair().prior), around(0.3), lambda z: z)
    blind = diagnose(NCPrior(hidden, GaussianPair().head()), GaussianPair().data(99))
    assert not blind.groups[0].has_gradient


@pytest.mark.parametrize("budget", [30, 100])
def test_it_finds_the_mean_that_sir_misses_within_the_budget(budget: int) -> None:
    problem = GaussianPair(kl=4.0)
    prior = NCPrior(problem.source(), problem.head())
    choice = recommend_sampler(diagnose(prior, problem.data(2000)), budget=budget)
    rows = 0

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal rows
        rows += output.numel() * (2 if torch.is_grad_enabled() else 1)

    prior.heads[0].register_forward_hook(count)
    u = problem.project(prior.sample(4000, choice.sampler).latents[0])
    assert rows / 4000 <= 1.1 * budget
    assert u.mean() / problem.shift == pytest.approx(1, abs=0.05)
    few = problem.project(prior.sample(4000, partial(sir, num_proposals=budget)).latents[0])
    assert few.mean() / problem.shift < 0.8


def test_two_modes_are_kept() -> None:
    problem = TwoBumps(center=1.5, width=0.3)
    source = SingleGroup(problem.prior, around(0.1), lambda z: z)
    prior = NCPrior(source, GaussianPair().head())
    prior.heads[0].log_r = problem.log_r
    x = problem.target.sample((2000, 1))
    choice = recommend_sampler(diagnose(prior, x), budget=40)
    z = prior.sample(4000, choice.sampler).latents[0]
    assert abs((z > 0).float().mean() - 0.5) < 8 * 0.5 / math.sqrt(4000)


def test_N4_groups_that_match_the_base_need_no_proposals() -> None:
    matching = {"verdict": Verdict.MATCHES, "proposals_needed": 2, "kl": 0.0}
    choice = recommend_sampler(report_of(matching), budget=500)
    assert choice.sampler.keywords == {"num_proposals": 1}  # type: ignore[attr-defined]
    assert "draw from the base" in choice.reason
    wide = {"proposals_needed": 700, "kl": 6.0}
    both = recommend_sampler(report_of({**matching, "proposals_needed": 9000}, wide), budget=2000)
    assert both.reason == "700 proposals are needed in the widest group: enough."


def test_N4_the_reason_does_not_contradict_the_report() -> None:
    choice = recommend_sampler(report_of({"proposals_needed": 22, "kl": 1.5}), budget=500)
    assert choice.reason.startswith("22 proposals are needed for draws close to q, and 30 times")


def test_W1_a_gap_that_is_too_wide_is_said_to_be_so() -> None:
    group = {
        "verdict": Verdict.TOO_WIDE,
        "proposals_needed": 43_000,
        "needs_more": True,
        "kl": 4.0,
        "kl_bound": 10.7,
    }
    choice = recommend_sampler(report_of(group), budget=500)
    assert choice.reason.startswith("More than 43,000 proposals are needed")
    assert "in about 6 temperatures" in choice.reason  # of the bound, not of the saturated log r
    assert choice.reason.endswith("fit a closer base first.")


@pytest.mark.parametrize("budget", [math.nan, math.inf, 2.5, "many", None])
def test_F35_a_budget_is_a_whole_number(budget: Any) -> None:
    with pytest.raises(TypeError, match="budget must be a whole number"):
        recommend_sampler(report_of({"kl": 1.0}), budget=budget)


def test_F36_a_prior_is_no_report() -> None:
    problem = GaussianPair()
    with pytest.raises(TypeError, match="report must be of type Report; got .*NCPrior"):
        recommend_sampler(NCPrior(problem.source(), problem.head()), budget=9)  # type: ignore[arg-type]


class Tilt(nn.Module):
    """The exact log r of N(3s, s² I) and N(0, s² I)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return (3 * z / self.scale - 4.5).sum(-1)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 1000.0])
def test_the_recommended_sampler_has_the_scale_of_the_base(scale: float) -> None:
    """Its first step was 0.5 in squared units of z: of small latents nearly all moves were rejected."""
    torch.manual_seed(0)
    base = Independent(Normal(torch.zeros(2), scale), 1)
    source = SingleGroup(
        base,
        lambda x: Independent(Normal(x, 1e-3 * scale, validate_args=False), 1),
        lambda z: z,
    )
    prior = NCPrior(source, Tilt(scale)).eval()
    x = 3 * scale + scale * torch.randn(1000, 2)
    report = diagnose_all(prior, x, fresh_steps=0, num_proposals=(5, 20))
    chosen = recommend_sampler(report, budget=20)
    sample = prior.sample(1000, chosen.sampler)
    z = sample.latents[0] / scale
    assert len(z.unique(dim=0)) > 900
    assert z.mean(0).tolist() == pytest.approx([3.0, 3.0], abs=0.2)
    assert z.std(0).tolist() == pytest.approx([1.0, 1.0], abs=0.2)
