"""Bases of few rows are compared by cross-validation: held-out rows alone are too few."""

from typing import Any

import pytest
import torch
from helpers.problems import Ring
from torch import Tensor
from torch.utils.data import DataLoader

from ncprior.recipe import base
from ncprior.recipe.base import choose_base
from ncprior.recipe.choices import Choice
from ncprior.recipe.cross_validation import FOLDS, cross_validated
from ncprior.recipe.parts import Parts, parts_of
from ncprior.recipe.record import Record


class Seen:
    """A base whose log p is 1 of what it was fitted to, and 0 elsewhere."""

    def __init__(self, z: Tensor) -> None:
        self.rows = z.floor().flatten()

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.isin(z.floor().flatten(), self.rows).double()


def test_no_row_is_compared_under_a_base_that_has_seen_any_of_its_draws() -> None:
    rows = torch.arange(23.0)[:, None]
    z = torch.cat([rows + draw / 10 for draw in range(3)])
    fitted: list[Tensor] = []

    def fit(some: Tensor) -> Seen:
        fitted.append(some)
        return Seen(some)

    assert torch.equal(cross_validated(fit, z, z[:23]), torch.zeros(23))
    assert [len(some) for some in fitted] == [3 * (23 - part) for part in (5, 5, 5, 4, 4)]
    assert torch.equal(torch.cat(fitted).flatten().sort()[0], z.flatten().repeat(4).sort()[0])


def choice_of(parts: Parts, **options: Any) -> Choice:
    torch.manual_seed(0)
    record = Record(progress=False, max_seconds=None)
    choose_base(Ring().source(), parts, record, **options)
    return record.choices[0]


def test_few_held_out_rows_do_not_hide_a_better_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modes: a mixture gains 0.3 ± 0.6 nats per row, which eight rows cannot show, and 400 can."""
    torch.manual_seed(0)
    x = torch.randn(408, 2)
    x[:, 0] += 4.0 * torch.randint(2, (408,)) - 2.0
    parts = Parts(parts_of(x[:400], x[400:].repeat(2, 1), 0).train, x[400:], x[400:], 400)
    found = choice_of(parts)
    assert found.criterion == "cross-validated log p"
    assert "10" in found.chosen
    monkeypatch.setattr(base, "_FEW", 0)
    alone = choice_of(parts)
    assert alone.criterion == "held-out log p"
    assert "10" not in alone.chosen


def test_a_choice_that_was_made_is_not_cross_validated_again() -> None:
    parts = parts_of(Ring().data(400), None, 0)
    assert choice_of(parts, only="Gaussian").criterion == "held-out log p"


def test_many_rows_and_batches_in_any_order_are_not_cross_validated() -> None:
    x = Ring().data(6016)
    assert choice_of(parts_of(x[:6000], x[6000:], 0)).criterion == "held-out log p"
    loader = DataLoader(x[:400], batch_size=50, shuffle=True)  # type: ignore[arg-type]
    assert choice_of(parts_of(loader, x[6000:], 0)).criterion == "held-out log p"
    few = parts_of(x[: 10 * FOLDS - 1], x[6000:], 0)
    assert choice_of(few).criterion == "held-out log p"
