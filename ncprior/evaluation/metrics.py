"""How good samples are: Fréchet distance, precision and recall, MMD; see also ``ncprior.evaluation``.

Everything here compares features, float matrices of shape ``(N, F)``. A feature function is any
callable that maps images, or whatever the decoder gives, to such a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Features: TypeAlias = Callable[[Tensor], Tensor]


class PrecisionRecall(NamedTuple):
    """Share of the generated that looks real, and share of the real that is generated."""

    precision: float
    recall: float


class Moments(NamedTuple):
    """Mean and covariance of features, of one set or of many."""

    mean: Tensor  # (*, F)
    cov: Tensor  # (*, F, F), unbiased


@torch.no_grad()
def frechet_distance(a: Tensor, b: Tensor, *, strict: bool = True) -> Tensor:
    """Returns the squared Fréchet distance between Gaussians fitted to two sets of features.

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a^½ Σ_b Σ_a^½)^½), the FID when the features are those of
    InceptionV3. With N samples it is too large by an amount that grows as F²/N.

    Arguments:
        a: Features, with shape ``(N, F)``.
        b: Features, with shape ``(N', F)``.
        strict: Whether to refuse F > min(N, N') / 10, where that bias may be most of the distance.

    Returns:
        The distance in squared units of the features, a float64 scalar.

    Raises:
        ValueError: If the features do not match, are not finite or, when strict, too few.

    References:
        GANs Trained by a Two Time-Scale Update Rule (Heusel et al., NeurIPS 2017), equation 6

    Example:
        >>> x = torch.randn(1000, 8)
        >>> round(frechet_distance(x, x + 2).item(), 6)  # 8 features moved by 2
        32.0
    """
    a = checked(a, "a")
    b = checked(b, "b", like=a)
    if strict:
        check_dimension(a.shape[1], min(len(a), len(b)))
    return frechet(moments(a), moments(b))


@torch.no_grad()
def precision_recall(
    real: Tensor, generated: Tensor, *, neighbours: int = 3, chunk_size: int = 1024
) -> PrecisionRecall:
    """Returns the precision and recall of generated features against real ones.

    A set's manifold is the union of balls around its members, with the distance to the k-th
    nearest other member as radius. Precision is the share of the generated inside the manifold
    of the real, recall the share of the real inside that of the generated.

    Arguments:
        real: Features, with shape ``(N, F)``.
        generated: Features, with shape ``(N', F)``; take N' = N, as both depend on the counts.
        neighbours: k.
        chunk_size: Rows compared at once: memory is that of ``chunk_size`` × max(N, N') numbers.

    Returns:
        Precision and recall, each between 0 and 1.

    Raises:
        ValueError: If the features do not match, are not finite, or are no more than k.

    References:
        Improved Precision and Recall Metric for Assessing Generative Models
        (Kynkäänniemi et al., NeurIPS 2019), equations 1 and 2

    Example:
        >>> real = torch.cat((torch.randn(500, 4), torch.randn(500, 4) + 100))
        >>> precision_recall(real, real[:500])  # one of two modes
        PrecisionRecall(precision=1.0, recall=0.5)
    """
    real = checked(real, "real")
    generated = checked(generated, "generated", like=real)
    if not 1 <= neighbours < min(len(real), len(generated)):
        raise ValueError(
            f"neighbours must be at least 1 and less than both sample counts, {len(real)} and "
            f"{len(generated)}; got {neighbours}."
        )
    return PrecisionRecall(
        _share_inside(generated, real, neighbours, chunk_size),
        _share_inside(real, generated, neighbours, chunk_size),
    )


@torch.no_grad()
def mmd(a: Tensor, b: Tensor, *, bandwidth: float | None = None, chunk_size: int = 1024) -> Tensor:
    """Returns an unbiased estimate of the squared maximum mean discrepancy, MMD².

    E k(x, x') + E k(y, y') - 2 E k(x, y) with k(x, y) = exp(-|x - y|² / (2 h²)), over distinct
    pairs only. Its mean is 0 when both laws are the same, so that it may be negative.

    Arguments:
        a: Features, with shape ``(N, F)``.
        b: Features, with shape ``(N', F)``.
        bandwidth: h; by default the median distance within the pooled sample (within 2,000 of
            it, evenly spaced, where there are more). Values compare at one h only.
        chunk_size: Rows compared at once: memory is that of ``chunk_size`` × max(N, N') numbers.

    Returns:
        The estimate, a float64 scalar without unit, at most 2.

    Raises:
        ValueError: If the features do not match or are not finite, or h is not positive.

    References:
        A Kernel Two-Sample Test (Gretton et al., JMLR 2012), equation 3 and section 8

    Example:
        >>> x, y = torch.randn(2, 1000, 4)
        >>> bool(mmd(x, y).abs() < 0.01), bool(mmd(x, y + 1) > 0.1)
        (True, True)
    """
    a = checked(a, "a")
    b = checked(b, "b", like=a)
    if bandwidth is None:
        pooled = torch.cat((a, b))
        bandwidth = torch.pdist(pooled[:: math.ceil(len(pooled) / 2000)]).median().item()
    if not 0 < bandwidth < math.inf:
        raise ValueError(
            f"The bandwidth must be positive and finite; got {bandwidth}. "
            "Half the features or more being equal makes the default 0: give one."
        )

    def sum_of(x: Tensor, y: Tensor) -> Tensor:
        kernels = ((d / bandwidth).square().mul(-0.5).exp() for d in _distances(x, y, chunk_size))
        return torch.stack([kernel.sum() for kernel in kernels]).sum()

    n, m = len(a), len(b)
    # Every k(x, x) is 1: n of them are taken off the full sum.
    within = (sum_of(a, a) - n) / (n * (n - 1)) + (sum_of(b, b) - m) / (m * (m - 1))
    return within - 2 * sum_of(a, b) / (n * m)


def inception_features(
    *, dimension: int = 2048, weights: str | None = None, batch_size: int = 64
) -> Features:
    """Returns the feature function of the FID: InceptionV3, as torch-fidelity ships it.

    Arguments:
        dimension: F: 64, 192, 768 or 2048 (the FID's).
        weights: File of torch-fidelity's weights, which it unpickles: give one that you trust.
            By default torch-fidelity downloads its own, once.
        batch_size: Images given to the network at once.

    Returns:
        A function that maps images in [0, 1], with shape ``(N, 1 or 3, H, W)``, to features, with
        shape ``(N, F)``, on the images' device.

    Raises:
        ImportError: If torch-fidelity is missing.
        ValueError: By the function, if images have another shape or range.

    References:
        GANs Trained by a Two Time-Scale Update Rule (Heusel et al., NeurIPS 2017)

    Example:
        >>> features = inception_features()  # doctest: +SKIP
        >>> features(torch.rand(10, 1, 28, 28)).shape  # doctest: +SKIP
        torch.Size([10, 2048])
    """
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            f"InceptionV3 features need torch-fidelity ({error}): pip install 'ncprior[fid]'."
        ) from error
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", [str(dimension)], feature_extractor_weights_path=weights
    )

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"Images must be (N, 1 or 3, H, W); got {tuple(images.shape)}.")
        low, high = (x.item() for x in images.aminmax())
        if not (0 <= low and high <= 1):
            raise ValueError(f"Images must be in [0, 1]; got {low:.3g} to {high:.3g}.")
        pixels = (255 * images).round().to(torch.uint8).expand(-1, 3, -1, -1)
        network.to(images.device)
        return torch.cat([network(batch)[0] for batch in torch.split(pixels, batch_size)])

    return features


def checked(x: Tensor, name: str, like: Tensor | None = None) -> Tensor:
    """Features in float64, on the CPU where their device has none."""
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        raise ValueError(f"Features are (N, F) with N ≥ 2; got {tuple(x.shape)} for {name}.")
    if like is not None and x.shape[1] != like.shape[1]:
        raise ValueError(
            f"All features must come from one feature function: expected {like.shape[1]} per "
            f"sample, got {x.shape[1]} for {name}."
        )
    if not x.isfinite().all():
        raise ValueError(f"Some features of {name} are not finite; look at the samples.")
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def check_dimension(dimension: int, samples: int) -> None:
    """Refuses so many features that the bias of a Fréchet distance may be most of it."""
    if 10 * dimension > samples:
        raise ValueError(
            f"A Fréchet distance of {dimension} features needs at least {10 * dimension} samples "
            f"of each kind; got {samples}. Draw more, or take fewer features."
        )


def moments(x: Tensor, counts: Tensor | None = None) -> Moments:
    """Mean and covariance of x, its rows repeated as counted."""
    if counts is None:
        counts = x.new_ones(len(x))
    total = counts.sum()
    mean = counts @ x / total
    deviations = (x - mean) * counts.sqrt()[:, None]
    return Moments(mean, deviations.T @ deviations / (total - 1))


def frechet(a: Moments, b: Moments) -> Tensor:
    """Distances between one Gaussian a and Gaussians b, with the batch shape of b."""
    # With Σ_a = L Lᵀ, the eigenvalues of Σ_a Σ_b are those of the symmetric Lᵀ Σ_b L.
    eigenvalues, vectors = torch.linalg.eigh(a.cov)
    root = vectors * eigenvalues.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.mT @ b.cov @ root).clamp(min=0).sqrt().sum(-1)
    traces = a.cov.trace() + b.cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    distances: Tensor = (a.mean - b.mean).square().sum(-1) + traces - 2 * cross
    return distances.clamp(min=0)


def _distances(x: Tensor, y: Tensor, chunk_size: int) -> Iterator[Tensor]:
    for rows in torch.split(x, chunk_size):
        yield torch.cdist(rows, y)


def _share_inside(points: Tensor, manifold: Tensor, neighbours: int, chunk_size: int) -> float:
    """Share of the points within a ball around a member of the manifold."""
    # The nearest member is the member itself, hence neighbours + 1.
    chunks = _distances(manifold, manifold, chunk_size)
    radii = torch.cat([d.kthvalue(neighbours + 1).values for d in chunks])
    inside = [(d <= radii).any(1) for d in _distances(points, manifold, chunk_size)]
    return int(torch.cat(inside).sum()) / len(points)
