"""The classifier two-sample test, against closed forms of AUC and divergence."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tables import Frame
from torch import Tensor

from ncprior.evaluation import two_sample
from ncprior.evaluation.tables import features_of
from ncprior.evaluation.two_sample import TwoSampleTest, two_sample_test

BOTH = pytest.mark.parametrize("classifier", ["network", "trees"])


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_sample, "_STEPS", 30)


def error(found: TwoSampleTest) -> float:
    """DeLong's standard error of the AUC, over independent folds."""
    return (found.high - found.low) / (2 * NormalDist().inv_cdf(0.975)) / math.sqrt(2)


def divergence(shift: float) -> float:
    """JSD of N(0, I) and N(d, I), as log r is N(±|d|²/2, |d|²) there."""
    t = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    weight = torch.softmax(-0.5 * t.square(), 0)
    log_r = shift * t + shift**2 / 2
    return math.log(2) - (weight * torch.nn.functional.softplus(-log_r)).sum().item()


@pytest.mark.parametrize(("shift", "num_features", "count"), [(0.5, 8, 1200), (2.0, 2, 600)])
def test_shifted_gaussians_have_the_AUC_and_the_divergence_of_the_best_classifier(
    shift: float, num_features: int, count: int
) -> None:
    direction = torch.full((num_features,), shift / math.sqrt(num_features))
    real, drawn = torch.randn(count, num_features), torch.randn(2 * count, num_features)
    found = two_sample_test(real, 5 + 3 * (drawn + direction), folds=2)
    assert found.differs and found.auc > 0.99  # in other units
    found = two_sample_test(real, drawn + direction, folds=2)
    assert abs(found.auc - NormalDist().cdf(shift / math.sqrt(2))) < 4 * error(found)
    # A linear rule from n rows costs about F / 2n nats of each of its terms.
    cost = num_features / count
    assert abs(found.jsd - divergence(shift)) < 4 * found.jsd_error + cost


@BOTH
def test_rows_of_one_distribution_cannot_be_told_apart(classifier: str) -> None:
    found = two_sample_test(
        torch.randn(300, 3), torch.randn(200, 3), classifier=classifier, folds=2
    )
    assert not found.differs
    assert abs(found.auc - 0.5) < 4 * error(found)
    assert error(found) == pytest.approx(math.sqrt((1 / 300 + 1 / 200) / 12), rel=0.1)
    assert found.jsd < 4 * found.jsd_error


def test_trees_find_categories_that_no_longer_belong_together() -> None:
    names = np.array(["low", "middle", "high"])
    one, two, three = np.random.default_rng(0).integers(3, size=(3, 600))
    real = Frame(size=names[one], price=names[one], count=one * 0)
    drawn = Frame(size=names[two], price=names[three], count=two * 0)
    found = two_sample_test(real, drawn, classifier="trees", folds=2)
    assert abs(found.auc - (1 / 3 * 0.5 + 2 / 3)) < 4 * error(found)  # r is 3 if equal, or 0


def test_the_network_finds_what_is_not_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_sample, "_STEPS", 300)
    found = two_sample_test(torch.randn(600, 2), 2 * torch.randn(600, 2), folds=2)
    assert abs(found.auc - 4 / (1 + 4)) < 4 * error(found)  # |x|² is exponential, of mean 2 or 8


def test_trees_find_what_is_local() -> None:
    real = torch.rand(500, 2)
    drawn = (8 * torch.rand(500, 2)).floor() / 8 + torch.rand(500, 2) / 16  # of every second strip
    found = two_sample_test(real, drawn, classifier="trees", folds=2)
    assert abs(found.auc - 0.7) < 0.05  # the best is 0.75


@pytest.mark.parametrize("folds", [2, 5])
def test_the_interval_covers_one_half_under_the_null(
    folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearest_mean(real: Tensor, drawn: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x @ (real.mean(0) - drawn.mean(0))

    monkeypatch.setitem(two_sample._FITS, "network", nearest_mean)
    repetitions, level = 400, 0.9
    results = [
        two_sample_test(*torch.randn(2, 80, 2), folds=folds, level=level, seed=seed)
        for seed in range(repetitions)
    ]
    covered = sum(found.low <= 0.5 <= found.high for found in results) / repetitions
    assert abs(covered - level) < 4 * math.sqrt(level * (1 - level) / repetitions)
    spread = torch.tensor([found.jsd for found in results]).std().item()
    told = math.sqrt(sum(found.jsd_error**2 for found in results) / repetitions)
    # Right for two folds, on the safe side for five; 4 standard errors of the spread are 0.14.
    assert told / spread == pytest.approx(1.0 if folds == 2 else 2**0.5, rel=0.15)


@BOTH
def test_it_depends_on_its_seed_alone_and_changes_nothing(classifier: str) -> None:
    real, drawn = torch.randn(2, 60, 2)
    real.requires_grad_()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = two_sample_test(real, drawn, classifier=classifier, folds=2, seed=3)
    torch.rand(1)
    with torch.inference_mode():
        again = two_sample_test(real, drawn.clone(), classifier=classifier, folds=2, seed=3)
    assert first == again
    assert first != two_sample_test(real, drawn, classifier=classifier, folds=2, seed=4)
    torch.set_rng_state(before)
    two_sample_test(real, drawn, classifier=classifier, folds=2)
    assert torch.equal(torch.get_rng_state(), before) and real.grad is None
    assert (np.random.get_state()[1] == numpy_before).all()


def test_the_result_in_words() -> None:
    found = TwoSampleTest(0.634, 0.61, 0.652, 0.03, 0.01)
    assert str(found) == "AUC 0.634 (0.610–0.652): drawn rows can be told from real ones"
    assert "cannot" in str(found._replace(low=0.5))


X = torch.randn(50, 2)


@pytest.mark.parametrize(
    ("real", "drawn", "message"),
    [
        (X[:49], X, "5 folds needs at least 50 real rows and as many drawn ones; got 49 and 50"),
        (X, X[:, :1], "expected 2 per sample, got 1 for drawn"),
        (X, X.masked_fill(X > 2, math.nan) * math.nan, "drawn must be finite"),
        (Frame(a=X[:, 0]), Frame(b=X[:, 0]), r"same columns in the same order; got \['a'\]"),
        (Frame(a=["x", None] * 25), Frame(a=["x"] * 50), "has 25 missing values, such as None"),
        (Frame(a=["x", "y"]), Frame(a=np.array(["x", math.nan], object)), "1 missing values"),
        (Frame(a=[1, 2.5], b=["x", "y"]), Frame(a=[1, math.inf], b=["x", "y"]), "column 0 has"),
        (Frame(a=[f"{i}x" for i in range(999)]), Frame(a=["a", "b"]), "1001 different texts"),
        (np.array(["a", "b"], object), X, r"must be \(N, C\)|must be a"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(real: Any, drawn: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        two_sample_test(real, drawn)


def test_without_scikit_learn_trees_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.ensemble", None)
    with pytest.raises(ImportError, match=r"extra 'trees' \(pip install '\.\[trees\]'"):
        two_sample_test(X, X, classifier="trees")


def test_truth_values_lists_and_events_are_rows() -> None:
    bits = torch.rand(60, 2) > 0.5
    assert two_sample_test(bits[:, :, None], bits, folds=2).auc <= 1
    found = two_sample_test(bits, bits.numpy(), folds=2)
    assert found == two_sample_test(bits.float(), bits.int().tolist(), folds=2)


def test_texts_of_digits_are_categories() -> None:
    """Such as zip codes, whose distances mean nothing."""
    table = np.array([["1", 0.5], ["2", 0.1], ["30", 0.3]], dtype=object)
    found = features_of(real=table, drawn=table)[0]
    assert found.shape == (3, 4)  # three categories and a number
    assert torch.cdist(found[:, :3], found[:, :3]).unique().numel() == 2
    numbers = np.array([[1, 0.5], [2, 0.1], [30, 0.3]], dtype=object)
    assert features_of(real=numbers, drawn=numbers)[0].shape == (3, 2)
