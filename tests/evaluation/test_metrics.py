"""Distances between samples, against closed forms and on toys."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toys import exactly, within
from scipy import linalg
from torch import Tensor, nn

from ncprior.evaluation.metrics import (
    PrecisionRecall,
    frechet_distance,
    inception_features,
    mmd,
    precision_recall,
)


def random_cov(size: int) -> Tensor:
    root = torch.randn(size, 2 * size, dtype=torch.float64)
    return root @ root.T / size


# Fréchet distance


def test_frechet_distance_is_the_closed_form_of_covariances_that_do_not_commute() -> None:
    mean_a, mean_b = torch.randn(2, 6, dtype=torch.float64)
    cov_a, cov_b = random_cov(6), random_cov(6)
    assert (cov_a @ cov_b - cov_b @ cov_a).abs().max() > 0.1
    root = linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = (mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * np.trace(root)
    a, b = exactly(mean_a, cov_a, 100), exactly(mean_b, cov_b, 70)
    torch.testing.assert_close(frechet_distance(a, b), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(frechet_distance(b, a), expected, rtol=1e-9, atol=0)


def test_frechet_distance_is_the_closed_form_of_covariances_that_commute() -> None:
    scale_a, scale_b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    x = exactly(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), 50)
    distance = frechet_distance(scale_a * x, scale_b * x)
    assert distance.dtype == torch.float64 and distance.shape == ()
    assert distance.item() == pytest.approx((scale_a - scale_b).square().sum().item(), rel=1e-9)


def test_frechet_distance_of_the_same_and_of_the_moved() -> None:
    x = 100 + torch.randn(200, 5)
    shift = torch.arange(5.0)
    assert all(0 <= frechet_distance(x[:n], x[:n]) < 1e-10 for n in range(50, 70))
    # Features in float32 around 100 have a resolution of 8e-6.
    assert frechet_distance(x, x + shift).item() == pytest.approx(30, rel=1e-5)


def test_frechet_distance_takes_covariances_of_low_rank() -> None:
    x, y = torch.randn(2, 300, 3, dtype=torch.float64)
    embedding = torch.linalg.qr(torch.randn(30, 3, dtype=torch.float64)).Q.T
    # Rounding makes some of the 27 zero eigenvalues negative. Their root is of order √(1e-16).
    expected, flat = frechet_distance(x, 2 * y), frechet_distance(x @ embedding, 2 * y @ embedding)
    assert flat.item() == pytest.approx(expected.item(), abs=27 * 1e-7)


def test_frechet_distance_wants_ten_samples_per_feature() -> None:
    enough, few = torch.randn(40, 4), torch.randn(39, 4)
    frechet_distance(enough, enough)
    for a, b in ((enough, few), (few, enough)):
        with pytest.raises(ValueError, match="4 features needs at least 40 samples.*got 39"):
            frechet_distance(a, b)
    assert frechet_distance(few, enough, strict=False) > 0


@pytest.mark.parametrize("distance", [frechet_distance, mmd, precision_recall])
def test_features_are_checked(distance: Callable[[Tensor, Tensor], object]) -> None:
    x = torch.randn(100, 2)
    with pytest.raises(ValueError, match="expected 2 per sample, got 3 for (b|generated)"):
        distance(x, torch.randn(100, 3))
    for shape in ((100,), (100, 2, 1), (1, 2), (100, 0)):
        with pytest.raises(ValueError, match=r"(b|generated) must (have 2 dim|be features)"):
            distance(x, torch.zeros(shape))
    for value in (math.nan, math.inf):
        y = x.clone()
        y[3, 1] = value
        with pytest.raises(
            ValueError, match="(a|real) must be finite; got NaN or infinity in 1 of 100 rows"
        ):
            distance(y, x)


# Precision and recall


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([0.0, 1.0, 3.0, 7.0])[:, None]
    # Radii 1, 1, 2, 4 with one neighbour: the manifold is [-1, 5] and [3, 11].
    generated = torch.tensor([-1.1, -1.0, 2.9, 10.9, 11.1, 40.0])[:, None]
    # Radii 0.1, 0.1, 3.9, 0.2, 0.2, 28.9: 0, 1 and 3 are in [-1, 6.8], 7 is nowhere.
    assert precision_recall(real, generated, neighbours=1) == (3 / 6, 3 / 4)
    # Radii 3, 2, 3, 6 with two neighbours: [-3, 6], [1, 13]; the other way all of [-5.1, 18.9].
    assert precision_recall(real, generated, neighbours=2) == (5 / 6, 1)


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision() -> None:
    near, far = torch.randn(300, 2), torch.randn(100, 2) + 50
    both = torch.cat((near, far))
    assert precision_recall(both, near) == PrecisionRecall(precision=1.0, recall=0.75)
    assert precision_recall(near, both) == PrecisionRecall(precision=0.75, recall=1.0)
    assert precision_recall(near, near + 100) == (0, 0)


@pytest.mark.parametrize("neighbours", [0, 10])
def test_neighbours_are_checked(neighbours: int) -> None:
    with pytest.raises(ValueError, match=f"neighbours must be .*; got {neighbours}"):
        precision_recall(torch.randn(20, 2), torch.randn(10, 2), neighbours=neighbours)


METRICS = [frechet_distance, mmd, precision_recall]


@pytest.mark.parametrize("distance", METRICS)
def test_F25_arrays_and_lists_are_converted(distance: Callable[..., Any]) -> None:
    a, b = torch.randn(100, 2), torch.randn(100, 2) + 1
    expected = distance(a, b)
    for convert in (Tensor.numpy, Tensor.tolist):
        assert distance(convert(a), convert(b)) == expected
    assert distance((10 * a).round().int(), b) == distance((10 * a).round(), b)


@pytest.mark.parametrize("distance", METRICS)
def test_F35_complex_features_raise(distance: Callable[..., Any]) -> None:
    a = torch.randn(100, 2)
    for wrong in (a + 1j, a > 0, None, "abc"):
        with pytest.raises(TypeError, match=r"a|real must be"):
            distance(wrong, a)
    with pytest.raises(ValueError, match=r"must be features .* of less than 1e\+50"):
        distance(1e30 * a.double() * 1e30, a)


@pytest.mark.parametrize("distance", METRICS)
def test_GC5_features_are_moved_to_the_device_of_the_first(distance: Callable[..., Any]) -> None:
    moved: list[torch.device] = []

    class Elsewhere(Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            moved.append(args[0])
            return torch.Tensor(self)

    distance(torch.randn(100, 2), torch.randn(100, 2).as_subclass(Elsewhere))
    assert moved == [torch.device("cpu")]


def test_F26_counts_of_metrics_are_whole_numbers() -> None:
    a = torch.randn(20, 2)
    for name in ("neighbours", "chunk_size"):
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            precision_recall(a, a, **{name: 2.5})
    with pytest.raises(ValueError, match="chunk_size must be"):
        mmd(a, a, chunk_size=0)
    with pytest.raises(ValueError, match="dimension must be one of 64"):
        inception_features(dimension=63)
    with pytest.raises(FileNotFoundError, match="There is no file nowhere.pth"):
        inception_features(weights="nowhere.pth")


def test_chunks_bound_the_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(50, 3), torch.randn(30, 3) + 0.5
    sizes: list[int] = []
    cdist = torch.cdist

    def spy(x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x) * len(y))
        return cdist(x, y)

    whole = precision_recall(a, b), mmd(a, b)
    monkeypatch.setattr(torch, "cdist", spy)
    assert precision_recall(a, b, chunk_size=7) == whole[0]
    torch.testing.assert_close(mmd(a, b, chunk_size=7), whole[1], rtol=1e-12, atol=0)
    assert max(sizes) == 7 * 50


# MMD


def test_mmd_is_the_sum_over_distinct_pairs() -> None:
    a, b, h = torch.randn(5, 2).double(), torch.randn(4, 2).double(), 1.3

    def kernel(x: Tensor, y: Tensor) -> float:
        return math.exp(-(x - y).square().sum().item() / (2 * h**2))

    def mean(x: Tensor, y: Tensor, *, distinct: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not distinct or i != j]
        return sum(kernel(x[i], y[j]) for i, j in pairs) / len(pairs)

    expected = mean(a, a, distinct=True) + mean(b, b, distinct=True)
    expected -= 2 * mean(a, b, distinct=False)
    assert mmd(a, b, bandwidth=h).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.8, 1.0), (0.3, 2.0)])
def test_mmd_is_unbiased(shift: float, scale: float) -> None:
    size, h = 3, 1.5

    def mean_kernel(variance: float, gap: float) -> float:
        """E exp(-|d|²/2h²) of d ~ N(gap, variance I)."""
        share = h**2 / (h**2 + variance)
        return share ** (size / 2) * math.exp(-size * gap**2 / (2 * (h**2 + variance)))

    truth = mean_kernel(2, 0) + mean_kernel(2 * scale**2, 0) - 2 * mean_kernel(1 + scale**2, shift)
    a, b = torch.randn(400, 40, size), shift + scale * torch.randn(400, 30, size)
    values = torch.stack([mmd(x, y, bandwidth=h) for x, y in zip(a, b, strict=True)])
    assert within(values, truth)
    # Leaving the diagonal in adds (1 - E k)/n of each kind: the test sees it.
    bias = (1 - mean_kernel(2, 0)) / 40 + (1 - mean_kernel(2 * scale**2, 0)) / 30
    assert not within(values + bias, truth)


def test_the_default_bandwidth_is_the_median_distance_of_the_pooled_sample() -> None:
    a, b = torch.randn(21, 2), torch.randn(22, 2) + 1
    median = torch.pdist(torch.cat((a, b)).double()).sort().values[(43 * 42 // 2 - 1) // 2]
    torch.testing.assert_close(mmd(a, b), mmd(a, b, bandwidth=median.item()))
    a, b = torch.randn(1500, 2), torch.randn(1501, 2) + 1
    median = torch.pdist(torch.cat((a, b))[::2].double()).median()
    torch.testing.assert_close(mmd(a, b), mmd(a, b, bandwidth=median.item()))


def test_a_bandwidth_must_be_positive() -> None:
    with pytest.raises(
        ValueError, match=r"bandwidth must be a number in \(0, inf\) or None; got -1"
    ):
        mmd(torch.randn(10, 2), torch.randn(10, 2), bandwidth=-1)
    with pytest.raises(ValueError, match="median distance is 0, as half of the rows or more are"):
        mmd(torch.zeros(10, 2), torch.zeros(10, 2))


# InceptionV3


class Extractor(nn.Module):
    """Stands for torch-fidelity's, and checks its input as that does."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        self.rows.append(len(x))
        return (x.float().amax((2, 3)),)


def test_images_reach_inception_as_bytes_of_three_channels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    made: list[Extractor] = []

    def make(
        name: str, features_list: list[str], feature_extractor_weights_path: str | None
    ) -> Extractor:
        assert features_list == ["64"] and feature_extractor_weights_path == str(weights)
        made.append(Extractor())
        return made[-1]

    fake = SimpleNamespace(FeatureExtractorInceptionV3=make)
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    features = inception_features(dimension=64, weights=str(weights), batch_size=3)
    grey = torch.tensor([0, 0.002, 0.1, 0.5, 1])[:, None, None, None].expand(-1, 1, 4, 4)
    pixels = torch.tensor([0.0, 1, 26, 128, 255])
    assert torch.equal(features(grey), pixels[:, None].expand(-1, 3))
    assert made[0].rows == [3, 2]
    colours = torch.tensor([0.0, 0.2, 1.0])[None, :, None, None].expand(2, -1, 4, 4)
    assert torch.equal(features(colours), torch.tensor([[0.0, 51, 255]]).expand(2, -1))
    for images in (-grey, 2 * grey):
        with pytest.raises(ValueError, match=r"Images must be in \[0, 1\]; got"):
            features(images)
    with pytest.raises(ValueError, match=r"must be \(N, 1 or 3, H, W\); got"):
        features(torch.zeros(5, 2, 4, 4))
    with pytest.raises(ValueError, match="images must have 4 dimensions"):
        features(torch.zeros(4, 3, 4))
    with pytest.raises(ValueError, match="images must be finite"):
        features(grey / 0)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"torch-fidelity .*'fid' \(pip install '\.\[fid\]'"):
        inception_features()


def test_torch_fidelity_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, its network at random: nothing is downloaded."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
    for dimension in (64, 2048):
        features = inception_features(dimension=dimension)(torch.rand(2, 1, 28, 28))
        assert features.shape == (2, dimension) and features.dtype == torch.float32


def test_precision_and_recall_do_not_depend_on_the_origin() -> None:
    torch.manual_seed(0)
    real, generated = torch.randn(2, 500, 4, dtype=torch.float64)
    near = precision_recall(real, generated)
    assert precision_recall(real + 1e8, generated + 1e8) == pytest.approx(near, abs=0.01)
