"""Distributions as trees of tensors: point masses on codes, and the number of categories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.problems import SampleOnly
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical

from ncprior.distributions import PointMass, build, expand, num_categories_of, parameters


def test_a_point_mass_has_all_its_probability_on_one_code() -> None:
    codes = torch.tensor([[3, 5], [0, 2]])
    q = PointMass(codes)
    z = q.sample(torch.Size((4,)))
    assert z.shape == (4, 2, 2)
    assert (z == codes).all()
    assert (q.log_prob(z) == 0).all()
    assert q.log_prob(torch.tensor([[3, 5], [0, 1]])).tolist() == [0.0, -torch.inf]
    assert q.support.is_discrete
    z[0, 0, 0] = 9  # a copy
    assert codes[0, 0] == 3


def test_a_point_mass_is_kept_by_its_codes() -> None:
    q = PointMass(torch.randint(9, (5, 2, 3)))
    tree = parameters(q)
    assert tree is not None
    again = build(tree)
    assert torch.equal(again.sample(), q.sample())


@pytest.mark.parametrize("wrong", ([1], None))
def test_a_point_mass_is_on_a_tensor(wrong: Any) -> None:
    with pytest.raises(TypeError, match="z must be .*Pass codes, or a draw with its log-density"):
        PointMass(wrong)


def test_the_number_of_categories_is_found() -> None:
    class Mine(SampleOnly):
        num_categories = 7

    grid = Categorical(logits=torch.zeros(2, 3, 5))
    known: dict[Any, int | None] = {
        Independent(grid, 2): 5,
        expand(Independent(grid, 2), 4): 5,
        OneHotCategorical(logits=torch.zeros(6)): 6,
        Mine(grid): 7,
        expand(Mine(Categorical(logits=torch.zeros(5))), 4): 7,
        Bernoulli(logits=torch.zeros(3)): None,
        Independent(Normal(torch.zeros(3), 1.0), 1): None,
        SampleOnly(grid): None,
    }
    for prior, count in known.items():
        assert num_categories_of(prior) == count
