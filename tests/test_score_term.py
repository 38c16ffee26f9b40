"""The score term: closed forms of the score and its weights, and what it brings in wide gaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.problems import Codes, CorrelatedPair, GaussianPair, around
from torch import nn
from torch.distributions import (
    Beta,
    Categorical,
    Distribution,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from ncprior import NCETrainer, NCPrior, SingleGroup, fit
from ncprior.bases import rebase
from ncprior.bases.empirical import Empirical
from ncprior.distributions import PointMass
from ncprior.heads import MLPHead
from ncprior.nce import score_loss
from ncprior.recipe.score_term import has_scores
from ncprior.training import FitSettings
from ncprior.utils.scores import score

QUIET: dict[str, Any] = {"progress": False}


@pytest.mark.parametrize(
    "p",
    [
        Independent(Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.1), 1),
        MultivariateNormal(torch.randn(5, 3), 2.0 * torch.eye(3) + 0.5),
        Independent(Laplace(torch.randn(5, 3), 1.0), 1),
        MixtureSameFamily(
            Categorical(torch.ones(5, 2)), Independent(Normal(torch.randn(5, 2, 3), 1.0), 1)
        ),
    ],
)
def test_a_score_is_the_gradient_of_the_log_density(p: Distribution) -> None:
    z = torch.randn(4, 5, 3).requires_grad_()
    (expected,) = torch.autograd.grad(p.log_prob(z).sum(), z)
    torch.testing.assert_close(score(p, z.detach()), expected)


def test_the_loss_of_the_exact_slope_is_the_noise_of_the_scores() -> None:
    """m ~ N(0, 3) and q(z | m) = N(m, 1): given z, m has variance 3/4, and so has its score z - m."""
    m = 3**0.5 * torch.randn(4, 100_000, 1)
    z = m + torch.randn_like(m)
    prior_score = -z
    exact = -z / 4 - prior_score
    loss = [score_loss(slope, m - z, prior_score).item() for slope in (exact, 1.1 * exact)]
    assert loss[0] == pytest.approx(0.75, abs=0.01)  # 4 standard errors
    assert loss[1] == pytest.approx(0.75 + 0.01 * (0.75**2 * 4), abs=0.01)
    assert loss[1] > loss[0]


def test_latents_are_weighted_alike_whatever_their_scale() -> None:
    z, scale = torch.randn(2, 500, 3), torch.tensor([1e-3, 1.0, 1e3])
    slope, posterior, prior = torch.randn(3, 2, 500, 3)
    expected = score_loss(slope, posterior, prior)
    torch.testing.assert_close(
        score_loss(slope / scale, posterior / scale, prior / scale), expected
    )
    assert score_loss(z, z, torch.zeros_like(z)) == 0
    assert score_loss(z, 0 * z, z).isfinite()  # q(z | x) is flat


def test_the_exact_head_has_the_least_loss_in_every_group_given_its_context() -> None:
    pair = CorrelatedPair()
    x = pair.data(4000)

    def losses(scale: float) -> list[float]:
        heads = [head if scale == 1 else Scaled(head, scale) for head in pair.heads()]
        torch.manual_seed(0)
        groups = NCPrior(pair, heads).group_losses(x, num_draws=4, score_weight=1.0)
        return [(loss.total - loss.nce).item() for loss in groups]

    exact = losses(1.0)
    assert len(exact) == 2
    for scale in (0.7, 1.4):
        assert losses(scale)[1] > exact[1] + 1e-3


class Scaled(nn.Module):
    """slope · log r of another head."""

    def __init__(self, head: nn.Module, slope: float) -> None:
        super().__init__()
        self.head, self.slope = head, slope

    def forward(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        log_r: torch.Tensor = self.head(z, context)
        return self.slope * log_r


def test_without_a_weight_the_total_is_the_nce_loss() -> None:
    problem = GaussianPair()
    prior, x = NCPrior(problem.source(), problem.head()), problem.data(50)
    (plain,) = prior.group_losses(x)
    (weighted,) = prior.group_losses(x, score_weight=3.0)
    assert plain.total is plain.nce
    assert weighted.total > weighted.nce


def test_a_wide_gap_is_learnt() -> None:
    """At KL 12 the classifier alone is sure too early: log r is wrong by 4 nats under q."""
    problem = GaussianPair(kl=12.0)
    data, z = problem.data(2000), problem.target.sample((20_000,))
    errors: dict[float, float] = {}
    options = {"steps": 300, "batch_size": 128, "learning_rate": 1e-2, **QUIET}
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        prior = NCPrior.for_source(problem.source(), data[:200], width=32, depth=1)
        settings = FitSettings(score_weight=weight)
        history = fit(prior, data, settings=settings, **options)
        with torch.no_grad():
            error = prior.log_r(0, z, None) - problem.log_r(z)
        errors[weight] = error.square().mean().sqrt().item()
    assert history.best_loss is not None and history.best_loss[0] < 0.1  # the NCE loss alone
    assert errors[0.0] > 2
    assert errors[1.0] < 0.6


def test_mixed_precision_and_frozen_parts() -> None:
    problem = GaussianPair()
    x = problem.data(64)
    prior = NCPrior(problem.source(), MLPHead((2,), width=16, depth=1))
    trainer = NCETrainer(
        prior, torch.optim.Adam(prior.parameters()), score_weight=1.0, precision=torch.bfloat16
    )
    before = problem.source().fingerprint()
    with torch.inference_mode():
        loss = trainer.step(x).loss
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    assert problem.source().fingerprint() == before


@pytest.mark.parametrize("case", ["codes", "a base that can only be sampled"])
def test_without_scores_there_is_an_error_that_says_so(case: str) -> None:
    if case == "codes":
        problem = Codes()
        prior, x = NCPrior.for_source(problem.source(), problem.data(64)), problem.data(64)
    else:
        pair = GaussianPair()
        source = rebase(pair.source(), Empirical(pair.data(100)))
        prior, x = NCPrior(source, MLPHead((2,))), pair.data(64)
    weights = [p.clone() for p in prior.parameters()]
    with pytest.raises(TypeError, match="score_weight=0"):
        fit(prior, x, steps=2, settings=FitSettings(score_weight=1.0), **QUIET)
    assert all(map(torch.equal, prior.parameters(), weights))


class Once(torch.autograd.Function):
    """A square whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(z)
        return z.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        (z,) = ctx.saved_tensors
        return 2 * z * slope


FEATURES: dict[str, tuple[Any, bool]] = {
    "z itself": (None, True),
    "smooth": (torch.square, True),
    "without a gradient": (lambda z: z.detach().square(), False),
    "without a second derivative": (Once.apply, False),
}


def with_features(features: Any) -> NCPrior:
    """A new head on features of z."""
    pair = GaussianPair()
    source = SingleGroup(pair.prior, around(0.3), lambda z: z, features=features)
    head = MLPHead((2,), width=8, depth=1)
    nn.init.normal_(head.out.weight)
    return NCPrior(source, head)


@pytest.mark.parametrize("name", FEATURES)
def test_features_decide_whether_improve_uses_the_term(name: str) -> None:
    features, expected = FEATURES[name]
    assert has_scores(with_features(features), GaussianPair().data(50)) is expected


def test_groups_and_latents_decide_whether_improve_uses_the_term() -> None:
    pair, codes = CorrelatedPair(), Codes()
    assert has_scores(NCPrior.for_source(pair, pair.data(50)), pair.data(50))
    assert not has_scores(NCPrior.for_source(codes.source(), codes.data(64)), codes.data(64))
    replayed = SingleGroup(GaussianPair().prior, lambda x: PointMass(x), lambda z: z)
    assert not has_scores(NCPrior(replayed, MLPHead((2,))), torch.randn(9, 2))
    one = torch.ones(2)
    bounded = SingleGroup(
        Independent(Beta(one, one), 1), lambda x: Independent(Beta(x + 2, x + 1), 1), lambda z: z
    )
    assert not has_scores(NCPrior(bounded, MLPHead((2,))), torch.rand(9, 2))


def test_an_error_that_is_no_missing_derivative_is_raised() -> None:
    def broken(z: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        has_scores(with_features(broken), GaussianPair().data(50))


def test_further_stages_are_trained_without_it() -> None:
    """Their base is drawn by a sampler, which has no density."""
    problem = GaussianPair(kl=4.0)
    prior = NCPrior.for_source(problem.source(), problem.data(200), width=16, depth=1)
    settings = FitSettings(score_weight=1.0)
    options = {"steps": 40, "batch_size": 64, "learning_rate": 1e-2, "eval_every": 20, **QUIET}
    assert fit(prior, problem.data(500), stages=2, settings=settings, **options).stages
