from collections.abc import Callable

import pytest
import torch
from helpers.problems import SampleOnly, standard_normal
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    TransformedDistribution,
)
from torch.distributions.transforms import AffineTransform

from ncprior.utils.fingerprints import base_fingerprint


def mixture(mean: float) -> Distribution:
    parts = Independent(Normal(torch.full((3, 2), mean), torch.ones(3, 2)), 1)
    return MixtureSameFamily(Categorical(probs=torch.ones(3) / 3), parts)


def shifted(shift: Tensor | float) -> Distribution:
    return TransformedDistribution(standard_normal(2), [AffineTransform(shift, 2.0, cache_size=1)])


class Flow(AffineTransform):
    """A transform with a network inside."""

    def __init__(self, bias: float) -> None:
        super().__init__(0.0, 1.0)
        self.net = nn.Linear(1, 1)
        nn.init.constant_(self.net.weight, 1.0)
        nn.init.constant_(self.net.bias, bias)


BASES: dict[str, Callable[[float], Distribution]] = {
    "normal": lambda a: Normal(torch.tensor(a), torch.tensor(1.0)),
    "independent": lambda a: Independent(Normal(torch.full((2,), a), torch.ones(2)), 1),
    "full": lambda a: MultivariateNormal(torch.zeros(2), torch.eye(2) * a),
    "codes": lambda a: Independent(Categorical(probs=torch.tensor([[a, 1.0]])), 1),
    "mixture": mixture,
    "shifted": shifted,
    "shifted by a tensor": lambda a: shifted(torch.full((2,), a)),
    "shifted by an integer": lambda a: shifted(round(10 * a)),
    "one-hot": lambda a: OneHotCategorical(probs=torch.tensor([a, 1.0])),
    "flow": lambda a: TransformedDistribution(standard_normal(2), [Flow(a)]),
}


@pytest.mark.parametrize("kind", BASES)
def test_a_base_is_known_by_what_it_was_made_with(kind: str) -> None:
    base = BASES[kind](0.5)
    before = base_fingerprint(base)
    z = base.sample((3,))
    base.log_prob(z)
    for name in ("probs", "logits", "precision_matrix", "covariance_matrix"):
        getattr(base, name, None)  # what is derived, and then kept in the distribution
    assert base_fingerprint(base) == before == base_fingerprint(BASES[kind](0.5))
    assert base_fingerprint(BASES[kind](0.6)) != before


def test_all_kinds_of_bases_differ() -> None:
    assert len({base_fingerprint(base(0.5)) for base in BASES.values()}) == len(BASES)


def test_a_base_without_a_density_has_none() -> None:
    assert base_fingerprint(SampleOnly(standard_normal(2))) is None


def test_half_precision_is_told_apart_by_its_values_only() -> None:
    exact, rounded = torch.tensor(0.5), torch.tensor(0.1)
    same = {base_fingerprint(Normal(exact.to(t), exact.to(t))) for t in (torch.half, torch.double)}
    assert len(same) == 1
    assert base_fingerprint(Normal(rounded, exact)) != base_fingerprint(
        Normal(rounded.half(), exact)
    )
