"""`improve` on a source that the user has rebased: the given base is a candidate, by that name."""

import math

import pytest
import torch
from helpers.problems import CorrelatedPair
from helpers.recipe import make_quick
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup, improve
from ncprior.bases import Rebased, rebase
from ncprior.recipe import Choice


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


class WithoutDensity:
    """N(0, I) that can be sampled alone."""

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return torch.randn(*sample_shape, 2)


def improved(base: object) -> tuple[NCPrior, Choice]:
    torch.manual_seed(0)
    own = Independent(Normal(torch.full((2,), 9.0), 1.0), 1)
    source = SingleGroup(own, lambda x: Independent(Normal(x, 0.1), 1), lambda z: z)
    given = rebase(source, base)
    prior = improve(given, torch.randn(2000, 2), budget=20, seed=0, progress=False)
    return prior, prior.report.choices[0]


def test_the_given_base_is_kept_where_nothing_is_more_likely() -> None:
    prior, choice = improved(Independent(Normal(torch.zeros(2), math.sqrt(1.01)), 1))
    assert choice.chosen == "the given base"
    assert next(it.name for it in choice.candidates) == "the given base"
    assert isinstance(prior.source, Rebased)


def test_a_given_base_without_a_density_is_named() -> None:
    _, choice = improved(WithoutDensity())
    assert choice.chosen == "Gaussian"
    assert "(cross-validated log p (unknown for the given base) -2" in str(choice)


def test_the_given_bases_of_several_groups_are_named() -> None:
    torch.manual_seed(0)
    pair = CorrelatedPair()
    source = rebase(pair, lambda k, group: Independent(Normal(group.prior.mean, 1.0), 1))
    prior = improve(source, pair.data(400), budget=20, seed=0, progress=False)
    assert prior.report.choices[0].chosen == "the given base"
