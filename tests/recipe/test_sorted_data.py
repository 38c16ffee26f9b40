"""`improve` on data sorted by class: what its first rows show is not what all rows show."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Gamma, Independent, Normal
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCPrior, SingleGroup
from ncprior.data.batches import one_pass, spread_rows, until
from ncprior.recipe import heads as recipe_heads
from ncprior.recipe import joint, judge
from ncprior.recipe.judge import Divergences
from ncprior.recipe.parts import Parts, parts_of
from ncprior.recipe.record import Record
from ncprior.recipe.sources import OWN_DRAW

KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "data set": TensorDataset,
    "list": lambda x: list(x.split(100)),
    "list of pairs": lambda x: [(part, -part) for part in x.split(100)],
}


def first(batch: Any) -> Tensor:
    return batch[0] if isinstance(batch, tuple | list) else batch


@pytest.mark.parametrize("kind", KINDS)
def test_spread_rows_are_from_everywhere(kind: str) -> None:
    data = KINDS[kind](torch.arange(5000.0)[:, None])
    before = torch.get_rng_state()
    found, again = (first(spread_rows(data, 500)).flatten() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, again) and 500 <= len(found.unique()) < 600
    assert (torch.histc(found, 10, 0, 5000) > 20).all()


def test_of_a_loader_and_of_few_rows_all_are_taken() -> None:
    x = torch.arange(50.0)[:, None]
    loader = DataLoader(TensorDataset(x, -x), 20)
    for data in (x, list(x.split(7)), TensorDataset(x), loader):
        assert first(spread_rows(data, 500)).sum() == x.sum()


def sorted_source() -> tuple[SingleGroup, Tensor, Tensor]:
    """A VAE whose second latent only the later half of the rows use; data and held-out data."""
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    source = SingleGroup(base, lambda x: Independent(Normal(x[:, :2], x[:, 2:]), 1), lambda z: z)

    def rows(count: int, used: float) -> Tensor:
        mean = torch.stack([0.9 * torch.randn(count), 4 * used * torch.ones(count)], 1)
        sd = torch.tensor([0.4, 1 - 0.8 * used]).expand(count, 2)
        return torch.cat([mean, sd], 1)

    train, held_out = (torch.cat([rows(n, 0.0), rows(n, 1.0)]) for n in (1000, 300))
    return source, train, held_out


def made_heads(source: SingleGroup, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The heads that all parts of the recipe make."""
    record = Record(progress=False, max_seconds=None)
    monkeypatch.setattr(recipe_heads, "_MOST_STEPS", 2)
    monkeypatch.setattr(recipe_heads, "_MOST_WITH_SCORES", 2)
    prior = recipe_heads.train_heads(source, parts, record, None)
    prior.sampler = OWN_DRAW
    unlike = [torch.nn.Linear(1, 1)]
    fresh = list(judge._fresh_heads(NCPrior(source, unlike), parts))
    return [*prior.heads, *fresh, *joint._untrained(joint.JointSource(prior), parts).heads]


def test_latents_of_later_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source, train, held_out = sorted_source()
    for head in made_heads(source, parts_of(train, held_out, 0), monkeypatch):
        assert (head.scale.sd < 10).all()
        assert (head.scale.sd.flatten()[:2] > 0.5).all()


def test_both_halves_of_sorted_batches_begin_with_all_classes() -> None:
    x = torch.arange(10_000.0)[:, None]
    for held_out in (DataLoader(TensorDataset(x), 256), list(x.split(256))):
        parts = parts_of(torch.zeros(100, 1), held_out, 0)
        for part in (parts.choose, parts.judge):
            rows = torch.cat([first(batch) for batch in until(one_pass(part, 256), 2000)])
            assert (torch.histc(rows, 5, 0, 10_000) > 100).all()
            everything = torch.cat([first(batch) for batch in part])
            assert len(everything.unique()) == len(everything) == 5000


def test_a_loss_that_is_not_finite_is_no_closed_gap() -> None:
    losses = torch.full((2, 50), 0.4)
    assert Divergences.of(losses).total.value > 0
    for value in (torch.inf, torch.nan):
        losses[1, 3] = value
        with pytest.raises(FloatingPointError, match="group 1 is unknown: .* of 1 of 50 held-out"):
            Divergences.of(losses)


class Drawn(torch.distributions.Distribution):
    """N(0, I) as a distribution that can be sampled alone."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size((2,)), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, *self.batch_shape, 2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Drawn:
        return Drawn(batch_shape)


def test_the_support_is_named_before_the_density() -> None:
    from ncprior.recipe.base import _why_not

    source = SingleGroup(
        lambda c: Independent(Gamma(torch.ones(len(c), 3), 1.0), 1),
        lambda x, c: Independent(Normal(torch.zeros(len(x), 3), 1.0), 1),
        lambda z, c: z,
        condition=lambda batch: batch[1],
    )
    data = TensorDataset(torch.randn(200, 3), torch.ones(200, 1))
    assert "a mixture of Gaussians is not" in _why_not(source, parts_of(data, None, 0))


@pytest.mark.parametrize("conditional", [False, True])
def test_a_distribution_without_a_density_is_a_prior(conditional: bool) -> None:
    from ncprior.recipe.base import choose_base

    torch.manual_seed(0)
    posterior = partial(Normal, scale=0.3)
    if conditional:
        source = SingleGroup(
            lambda c: Drawn((len(c),)),
            lambda x, c: Independent(posterior(x), 1),
            lambda z, c: z,
            condition=lambda batch: batch[1],
        )
        data: Any = TensorDataset(torch.randn(300, 2) + 1, torch.ones(300, 1))
    else:
        source = SingleGroup(Drawn(), lambda x: Independent(posterior(x), 1), lambda z: z)
        data = torch.randn(300, 2) + 1
    record = Record(progress=False, max_seconds=None)
    choose_base(source, parts_of(data, None, 0), record)
    words = "has no density" if conditional else "unknown for the VAE's own prior"
    assert words in str(record.choices[-1])
