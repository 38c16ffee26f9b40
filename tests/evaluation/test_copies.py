"""The near-copy share, where its expected value is known."""

import math

import numpy as np
import pytest
import torch
from helpers.tables import Frame
from torch import Tensor

from ncprior.evaluation.copies import NearCopies, near_copies

TRAIN = torch.arange(50.0)[:, None]


def new(count: int) -> Tensor:
    """Rows whose distances to the integers of TRAIN are uniform in [0, 0.5]."""
    return 49 * torch.rand(count, 1)


@pytest.mark.parametrize("copied", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("quantile", [0.05, 0.2])
def test_the_share_is_that_of_copies_and_of_chance(copied: float, quantile: float) -> None:
    drawn = torch.where(torch.rand(3000, 1) < copied, TRAIN[torch.randint(50, (3000,))], new(3000))
    found = near_copies(TRAIN, new(2000), drawn, quantile=quantile)
    assert found.expected == quantile
    assert found.distance == pytest.approx(
        quantile / 2, rel=4 * math.sqrt((1 / quantile - 1) / 2000)
    )
    share = copied + (1 - copied) * quantile
    variance = share * (1 - share) / 3000 + quantile * (1 - quantile) / 2000
    assert abs(found.share - share) <= 4 * math.sqrt(variance)
    assert found.low <= found.share <= found.high
    assert found.copies == (copied > 0)


@pytest.mark.parametrize(("held_out", "drawn"), [(100, 400), (400, 100), (300, 300)])
def test_the_interval_covers_the_expected_share_of_honest_draws(held_out: int, drawn: int) -> None:
    repetitions, level = 200, 0.9
    results = [
        near_copies(TRAIN, new(held_out), new(drawn), quantile=0.1, level=level)
        for _ in range(repetitions)
    ]
    covered = sum(found.low <= found.expected <= found.high for found in results) / repetitions
    assert abs(covered - level) < 4 * math.sqrt(level * (1 - level) / repetitions)


def test_duplicates_among_held_out_codes_are_expected() -> None:
    codes = torch.randint(4, (2000, 4))  # of 256 kinds
    train, held_out = codes[:100], codes[100:1000]
    found = near_copies(train, held_out, codes[1000:])
    known = {tuple(row) for row in train.tolist()}
    assert found.distance == 0
    assert found.expected == pytest.approx(sum(tuple(r) in known for r in held_out.tolist()) / 900)
    assert found.expected > 0.2 and not found.copies
    assert near_copies(train, held_out, train).share == 1


def test_a_duplicate_has_distance_0_far_from_the_origin() -> None:
    train = 1e6 + torch.randn(200, 30, dtype=torch.float64)
    found = near_copies(train, train[:100], train[50:80], chunk_size=7)
    assert found.distance == 0 and found.share == 1


def test_tables_count_categories_and_scaled_numbers() -> None:
    train = Frame(income=[0.0, 2000.0], kind=["a", "b"])  # a standard deviation of 1,000
    held_out = Frame(income=[0.0, 500.0], kind=["b", "a"])
    far = near_copies(train, held_out, held_out, quantile=1 - 1e-9)
    near = near_copies(train, held_out, held_out, quantile=0.5)
    assert (far.distance, near.distance) == pytest.approx((1, 0.5))
    assert far.share == 1 and near.share == 0.5


def test_the_share_in_words() -> None:
    found = NearCopies(0.0532, 0.041, 0.068, 0.05, 1.0)
    text = "near copies of training rows: 5.3 % (4.1–6.8), expected 5.0 %"
    assert str(found) == text and not found.copies


def test_rows_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 20 rows held_out; got 19"):
        near_copies(TRAIN, new(19), new(50))
    with pytest.raises(ValueError, match="expected 1 per sample, got 2 for drawn"):
        near_copies(TRAIN, new(20), torch.randn(50, 2))
    with pytest.raises(ValueError, match="held_out must be finite"):
        near_copies(TRAIN, new(20) * math.nan, new(20))
    with pytest.raises(ValueError, match=r"quantile must be a number in \(0, 1\)"):
        near_copies(TRAIN, new(20), new(20), quantile=1)
    with pytest.raises(ValueError, match="same columns in the same order"):
        near_copies(Frame(a=[1, 2]), Frame(b=[1, 2]), np.ones((2, 1)))
