"""Metrics of samples: Fréchet distance, precision and recall, maximum mean discrepancy (MMD).

All metrics compare features: matrices of real numbers of shape ``(N, F)``, as tensors, arrays or
lists. They are computed in float64, on the device of the first argument. A feature function is any
callable that maps images, or other outputs of the decoder, to such a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ncprior.utils.require import (
    described,
    real_tensor,
    require_choice,
    require_counts,
    require_flags,
    require_instance,
    require_numbers,
)

Features: TypeAlias = Callable[[Tensor], Tensor]

_LARGEST = 1e50  # of larger features, fourth powers overflow in float64


class PrecisionRecall(NamedTuple):
    """Precision and recall of generated samples.

    Attributes:
        precision: Fraction of generated samples inside the manifold of real ones.
        recall: Fraction of real samples inside the manifold of generated ones.
    """

    precision: float
    recall: float


class Moments(NamedTuple):
    """Mean and covariance of one or more sets of features."""

    mean: Tensor  # (*, F)
    cov: Tensor  # (*, F, F), unbiased


@torch.no_grad()
def frechet_distance(a: Tensor, b: Tensor, *, strict: bool = True) -> Tensor:
    """Squared Fréchet distance between Gaussians fitted to two sets of features.

    The distance is |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a^½ Σ_b Σ_a^½)^½); with features of
    InceptionV3 it is the FID. From N samples it is biased upwards by an amount of order F²/N.

    Arguments:
        a: Features, with shape ``(N, F)``.
        b: Features, with shape ``(N', F)``.
        strict: Whether to raise an error if F > min(N, N') / 10, where the bias may dominate.

    Returns:
        The distance in squared units of the features, a float64 scalar.

    Raises:
        ValueError: If the numbers of features differ, a feature is not finite or, if strict, there
            are too few samples.

    References:
        GANs Trained by a Two Time-Scale Update Rule (Heusel et al., NeurIPS 2017), equation 6

    Example:
        >>> x = torch.randn(1000, 8)
        >>> round(frechet_distance(x, x + 2).item(), 6)  # 8 features moved by 2
        32.0
    """
    require_flags(strict=strict)
    a = checked(a, "a")
    b = checked(b, "b", like=a)
    if strict:
        check_dimension(a.shape[1], min(len(a), len(b)))
    return frechet(moments(a), moments(b))


@torch.no_grad()
def precision_recall(
    real: Tensor, generated: Tensor, *, neighbours: int = 3, chunk_size: int = 1024
) -> PrecisionRecall:
    """Precision and recall of generated features with respect to real ones.

    The manifold of a set is the union of balls around its members, with the distance to the k-th
    nearest other member as radius. Precision is the fraction of generated samples inside the
    manifold of the real ones; recall is the fraction of real samples inside the manifold of the
    generated ones.

    Arguments:
        real: Features, with shape ``(N, F)``.
        generated: Features, with shape ``(N', F)``; take N' = N, as both metrics depend on the
            counts.
        neighbours: k, the neighbour whose distance is the radius.
        chunk_size: Rows compared at once; memory holds ``chunk_size`` × max(N, N') numbers.

    Returns:
        Precision and recall, each between 0 and 1.

    Raises:
        ValueError: If the numbers of features differ, a feature is not finite, or a set has at
            most k samples.

    References:
        Improved Precision and Recall Metric for Assessing Generative Models
        (Kynkäänniemi et al., NeurIPS 2019), equations 1 and 2

    Example:
        >>> real = torch.cat((torch.randn(500, 4), torch.randn(500, 4) + 100))
        >>> precision_recall(real, real[:500])  # one of two modes
        PrecisionRecall(precision=1.0, recall=0.5)
    """
    require_counts(neighbours=neighbours, chunk_size=chunk_size)
    neighbours, chunk_size = int(neighbours), int(chunk_size)
    real = checked(real, "real")
    generated = checked(generated, "generated", like=real)
    if neighbours >= min(len(real), len(generated)):
        raise ValueError(
            f"neighbours must be less than both sample counts, {len(real)} and {len(generated)}; "
            f"got {neighbours}."
        )
    return PrecisionRecall(
        _fraction_inside(generated, real, neighbours, chunk_size),
        _fraction_inside(real, generated, neighbours, chunk_size),
    )


@torch.no_grad()
def mmd(a: Tensor, b: Tensor, *, bandwidth: float | None = None, chunk_size: int = 1024) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy, MMD².

    MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y) with k(x, y) = exp(-|x - y|² / (2 h²)), estimated
    over distinct pairs only. Its mean is 0 if both distributions are the same, so that it can be
    negative.

    Arguments:
        a: Features, with shape ``(N, F)``.
        b: Features, with shape ``(N', F)``.
        bandwidth: h. The default is the median distance within the pooled sample, or within 2,000
            evenly spaced rows of it if there are more. Compare values at the same h only.
        chunk_size: Rows compared at once; memory holds ``chunk_size`` × max(N, N') numbers.

    Returns:
        The estimate, a dimensionless float64 scalar, at most 2.

    Raises:
        ValueError: If the numbers of features differ, a feature is not finite, or h is not
            positive.

    References:
        A Kernel Two-Sample Test (Gretton et al., JMLR 2012), equation 3 and section 8

    Example:
        >>> x, y = torch.randn(2, 1000, 4)
        >>> bool(mmd(x, y).abs() < 0.01), bool(mmd(x, y + 1) > 0.1)
        (True, True)
    """
    require_numbers("(0, inf) or None", bandwidth=bandwidth)
    require_counts(chunk_size=chunk_size)
    chunk_size = int(chunk_size)
    a = checked(a, "a")
    b = checked(b, "b", like=a)
    if bandwidth is None:
        pooled = torch.cat((a, b))
        bandwidth = torch.pdist(pooled[:: math.ceil(len(pooled) / 2000)]).median().item()
        if bandwidth == 0:
            raise ValueError(
                "The median distance is 0, as half of the rows or more are equal. Pass bandwidth=."
            )

    def sum_of(x: Tensor, y: Tensor) -> Tensor:
        kernels = ((d / bandwidth).square().mul(-0.5).exp() for d in _distances(x, y, chunk_size))
        return torch.stack([kernel.sum() for kernel in kernels]).sum()

    n, m = len(a), len(b)
    # k(x, x) = 1: the n diagonal terms are subtracted from the full sum.
    within = (sum_of(a, a) - n) / (n * (n - 1)) + (sum_of(b, b) - m) / (m * (m - 1))
    return within - 2 * sum_of(a, b) / (n * m)


def inception_features(
    *, dimension: int = 2048, weights: str | None = None, batch_size: int = 64
) -> Features:
    """Feature function of the FID: InceptionV3 of torch-fidelity.

    Arguments:
        dimension: F: 64, 192, 768 or 2048 (the FID's).
        weights: File of torch-fidelity's weights, which is unpickled: pass a file that you trust.
            By default torch-fidelity downloads its weights once.
        batch_size: Images given to the network at once.

    Returns:
        A function that maps images in [0, 1], with shape ``(N, 1 or 3, H, W)``, to features, with
        shape ``(N, F)``, on the images' device.

    Raises:
        ImportError: If torch-fidelity is not installed.
        ValueError: If an argument is out of range and, when the function is called, if images
            have another shape or range.
        FileNotFoundError: If there is no such file of weights.

    References:
        GANs Trained by a Two Time-Scale Update Rule (Heusel et al., NeurIPS 2017)

    Example:
        >>> features = inception_features()  # doctest: +SKIP
        >>> features(torch.rand(10, 1, 28, 28)).shape  # doctest: +SKIP
        torch.Size([10, 2048])
    """
    require_choice("dimension", dimension, (64, 192, 768, 2048))
    require_counts(batch_size=batch_size)
    if weights is not None:
        require_instance("weights", weights, str, "Pass the path of a file, or None.")
        if not Path(weights).is_file():
            raise FileNotFoundError(f"There is no file {weights}. Pass torch-fidelity's weights.")
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            f"InceptionV3 features need torch-fidelity ({error}): install ncprior's extra 'fid' "
            f"(pip install '.[fid]' in the clone)."
        ) from error
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", [str(dimension)], feature_extractor_weights_path=weights
    )

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        images = real_tensor("images", images, ndim=4)
        if images.shape[1] not in (1, 3) or 0 in images.shape:
            raise ValueError(f"Images must be (N, 1 or 3, H, W); got {tuple(images.shape)}.")
        low, high = (x.item() for x in images.aminmax())
        if not (0 <= low and high <= 1):
            raise ValueError(f"Images must be in [0, 1]; got {low:.3g} to {high:.3g}.")
        pixels = (255 * images).round().to(torch.uint8).expand(-1, 3, -1, -1)
        network.to(images.device)
        return torch.cat([network(batch)[0] for batch in torch.split(pixels, batch_size)])

    return features


def items_of(name: str, values: Any, item: str) -> list[Any]:  # noqa: ANN401
    """Returns the items of a list, a tuple, a tensor or an array.

    Arguments:
        name: The argument.
        values: The list.
        item: Description of an item, for the message.

    Raises:
        TypeError: If it is none of these.
    """
    is_array = isinstance(values, Tensor | np.ndarray) and values.ndim > 0
    if not is_array and not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a list of {item}; got {described(values)}.")
    return list(values)


def checked(values: Any, name: str, like: Tensor | None = None) -> Tensor:  # noqa: ANN401
    """Returns features in float64, on the device of others or, if it has no float64, on the CPU.

    Raises:
        TypeError: If they are not real numbers.
        ValueError: If the shape does not fit, or a feature is not finite; look at the samples.
    """
    x = real_tensor(name, values, ndim=2, rows=2, exact=True)
    if x.shape[1] < 1 or not x.abs().amax() < _LARGEST:
        raise ValueError(
            f"{name} must be features (N, F) with F ≥ 1, of less than {_LARGEST:g} each; got "
            f"{described(x)}. Look at the samples, or rescale the features."
        )
    if like is not None and x.shape[1] != like.shape[1]:
        raise ValueError(
            f"All features must come from one feature function: expected {like.shape[1]} per "
            f"sample, got {x.shape[1]} for {name}."
        )
    x = x if like is None else x.to(like.device)
    x = x.cpu() if x.device.type == "mps" else x
    return x.double()


def check_dimension(dimension: int, samples: int) -> None:
    """Validates that there are at least 10 samples per feature, to limit the bias of the distance.

    Raises:
        ValueError: If there are fewer; draw more samples, or take fewer features.
    """
    if 10 * dimension > samples:
        raise ValueError(
            f"A Fréchet distance of {dimension} features needs at least {10 * dimension} samples "
            f"of each kind; got {samples}. Draw more, or take fewer features."
        )


def moments(x: Tensor, counts: Tensor | None = None) -> Moments:
    """Mean and covariance of x; ``counts`` gives the multiplicity of each row."""
    if counts is None:
        counts = x.new_ones(len(x))
    total = counts.sum()
    mean = counts @ x / total
    deviations = (x - mean) * counts.sqrt()[:, None]
    return Moments(mean, deviations.T @ deviations / (total - 1))


def frechet(a: Moments, b: Moments) -> Tensor:
    """Squared Fréchet distances from a Gaussian a to Gaussians b, with the batch shape of b."""
    # With Σ_a = L Lᵀ, the eigenvalues of Σ_a Σ_b are those of the symmetric Lᵀ Σ_b L.
    eigenvalues, vectors = torch.linalg.eigh(a.cov)
    root = vectors * eigenvalues.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.mT @ b.cov @ root).clamp(min=0).sqrt().sum(-1)
    traces = a.cov.trace() + b.cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    distances: Tensor = (a.mean - b.mean).square().sum(-1) + traces - 2 * cross
    return distances.clamp(min=0)


def _distances(x: Tensor, y: Tensor, chunk_size: int) -> Iterator[Tensor]:
    centre = y.mean(0)  # cdist takes differences of squares, which are large far from 0
    for rows in torch.split(x, chunk_size):
        yield torch.cdist(rows - centre, y - centre)


def _fraction_inside(points: Tensor, manifold: Tensor, neighbours: int, chunk_size: int) -> float:
    """Fraction of the points inside a ball around a member of the manifold."""
    # The nearest member is the member itself, hence neighbours + 1.
    chunks = _distances(manifold, manifold, chunk_size)
    radii = torch.cat([d.kthvalue(neighbours + 1).values for d in chunks])
    inside = [(d <= radii).any(1) for d in _distances(points, manifold, chunk_size)]
    return int(torch.cat(inside).sum()) / len(points)
