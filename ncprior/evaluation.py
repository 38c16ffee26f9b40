r"""How good samples are: Fréchet distance, precision and recall, MMD, and the gap closed.

Everything here compares features, float matrices of shape ``(N, F)``. A feature function is any
callable that maps images, or whatever the decoder gives, to such a matrix.

*Gap closed*, the yardstick across backbones, is

.. math::
    \theta = \frac{D_\text{base} - D}{D_\text{base} - D_\text{post}}

with D the Fréchet distance to held-out data of samples from the base prior, from ours, and from
the posterior: 0 is the base prior, 1 is as good as the aggregate posterior, above 1 is possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Features",
    "GapClosed",
    "GapDifference",
    "Generations",
    "PrecisionRecall",
    "frechet_distance",
    "gap_closed",
    "gap_difference",
    "inception_features",
    "mmd",
    "precision_recall",
]

Features: TypeAlias = Callable[[Tensor], Tensor]
Generations: TypeAlias = "Sequence[Tensor] | Tensor"


class PrecisionRecall(NamedTuple):
    """Share of the generated that looks real, and share of the real that is generated."""

    precision: float
    recall: float


class GapClosed(NamedTuple):
    """The gap closed with its interval, and the Fréchet distances it is made of.

    Attributes:
        gap_closed: (D_base - D) / (D_base - D_post), between ``low`` and ``high``.
        d_base: Distance of the base prior's samples, mean over the generations; likewise
            ``d_post`` of the posterior's and ``d_ours`` of ours.
        distances: Distance of every generation of base, ours and posterior, ``(3, R)``.
        resampled: Means over the generations, to every resampled reference, ``(3, num_resamples)``.
    """

    gap_closed: float
    low: float
    high: float
    d_base: float
    d_post: float
    d_ours: float
    distances: Tensor
    resampled: Tensor

    def __str__(self) -> str:
        value, low, high = (f"{100 * x:.0f}" for x in (self.gap_closed, self.low, self.high))
        return f"prior hole closed: {value} % ({low}–{high})"


class GapDifference(NamedTuple):
    """The gap closed by one method less that closed by another, with its interval."""

    difference: float
    low: float
    high: float


class _Moments(NamedTuple):
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
    a = _checked(a, "a")
    b = _checked(b, "b", like=a)
    if strict:
        _check_dimension(a.shape[1], min(len(a), len(b)))
    return _frechet(_moments(a), _moments(b))


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
    real = _checked(real, "real")
    generated = _checked(generated, "generated", like=real)
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
    a = _checked(a, "a")
    b = _checked(b, "b", like=a)
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


@torch.no_grad()
def gap_closed(
    reference: Tensor,
    *,
    base: Generations,
    ours: Generations,
    posterior: Generations,
    num_resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> GapClosed:
    """Returns how much of the gap between base prior and posterior is closed, with its interval.

    The estimate is (D_base - D) / (D_base - D_post), each D a mean over R generations of the
    Fréchet distance to the full reference.

    The interval is Fieller's for a ratio of means. The covariance of numerator and denominator is
    that of the R generations, divided by R, plus that over references resampled with
    replacement, the same for all arms. Duplicates in a resampled reference add to every distance
    to it; only the covariance is used, from which such a constant drops out, whereas it would
    move percentiles of the resampled ratio. R is small, hence Student's t, with Satterthwaite's
    degrees of freedom.

    It covers the randomness of sampling and of the choice of held-out data, not that of training.
    The bias of Fréchet distances of finite samples cancels as far as the arms' covariances agree.

    Arguments:
        reference: Features of held-out data, with shape ``(N_ref, F)``.
        base: Features of R ≥ 5 independent generations from the base prior, ``(N, F)`` each.
        ours: The same of our prior. Share seeds between the i-th generations of all arms: what
            they have in common drops out.
        posterior: The same of decoded posterior samples of *training* data, other data for every
            generation if possible; of the reference, the floor would be too low.
        num_resamples: Number of resampled references.
        level: Coverage of the interval.
        seed: Seed of the resampled references, which depend on nothing else but N_ref: results
            for several methods are paired (:func:`gap_difference`).

    Returns:
        The gap closed, its interval, and the distances.

    Raises:
        ValueError: If generations are missing, equal or unequal in size, F > min(N, N_ref) / 10,
            or there is no hole: D_base does not exceed D_post by more than its sampling error.

    References:
        Some Problems in Interval Estimation (Fieller, 1954)

    Example:
        >>> reference, scale = torch.randn(1000, 2), torch.tensor([2.0, 1.2, 1.0])
        >>> base, ours, posterior = scale.view(3, 1, 1, 1) * torch.randn(3, 5, 1000, 2)
        >>> result = gap_closed(reference, base=base, ours=ours, posterior=posterior)
        >>> result.low < 0.96 < result.high  # D = F (scale - 1)²
        True
    """
    if num_resamples < 2 or not 0 < level < 1:
        raise ValueError(
            "num_resamples must be at least 2 and level between 0 and 1; "
            f"got {num_resamples} and {level}."
        )
    reference = _checked(reference, "reference")
    arms = _checked_arms(reference, {"base": base, "ours": ours, "posterior": posterior})
    distances = _frechet(_moments(reference), arms)
    # A posterior without noise may well give the same samples again; a prior never does.
    if any(len(row.unique()) < len(row) for row in distances[:2]):
        raise ValueError("Two generations of an arm are the same; draw each with its own seed.")
    references = _resampled_moments(reference, num_resamples, seed)
    resampled = torch.stack([_frechet(moments, arms).mean(1) for moments in references], dim=1)
    gaps, resampled_gaps = (
        torch.stack((d[0] - d[1], d[0] - d[2])) for d in (distances, resampled)
    )
    ratio = _ratio(gaps, resampled_gaps, level)
    d_base, d_ours, d_post = distances.mean(1).tolist()
    return GapClosed(*ratio, d_base, d_post, d_ours, distances, resampled)


def gap_difference(a: GapClosed, b: GapClosed, *, level: float = 0.95) -> GapDifference:
    """Returns how much more of the gap method a closes than method b, paired.

    What the reference and, under equal seeds, the generations do to both alike drops out: the
    interval is often far narrower than those of a and b.

    Arguments:
        a: Result of :func:`gap_closed`.
        b: Result for another method, from the same reference, base and posterior.
        level: Coverage of the interval.

    Returns:
        The difference (D_b - D_a) / (D_base - D_post) and its interval; above 0, a is better.

    Raises:
        ValueError: If the results differ in more than the method.

    Example:
        >>> reference = torch.randn(1000, 2)
        >>> base, a, b, posterior = torch.randn(4, 5, 1000, 2)
        >>> arms = {"base": 2 * base, "posterior": posterior}
        >>> first = gap_closed(reference, ours=1.1 * a, **arms)
        >>> second = gap_closed(reference, ours=1.5 * b, **arms)
        >>> gap_difference(first, second).low > 0
        True
    """
    pairs = (a.distances, b.distances), (a.resampled, b.resampled)
    if not all(
        x.shape == y.shape and torch.allclose(x[::2], y[::2], rtol=1e-9, atol=0) for x, y in pairs
    ):
        raise ValueError(
            "A paired difference needs two results of one reference, base, posterior, "
            "num_resamples and seed; got others."
        )
    gaps, resampled_gaps = (torch.stack((y[1] - x[1], x[0] - x[2])) for x, y in pairs)
    return GapDifference(*_ratio(gaps, resampled_gaps, level))


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


def _checked(x: Tensor, name: str, like: Tensor | None = None) -> Tensor:
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


def _check_dimension(dimension: int, samples: int) -> None:
    if 10 * dimension > samples:
        raise ValueError(
            f"A Fréchet distance of {dimension} features needs at least {10 * dimension} samples "
            f"of each kind; got {samples}. Draw more, or take fewer features."
        )


def _checked_arms(reference: Tensor, arms: dict[str, Generations]) -> _Moments:
    """Moments of all generations, with batch shape (3, R)."""
    counts = {name: [len(x) for x in generations] for name, generations in arms.items()}
    fewest = min(len(count) for count in counts.values())
    if fewest < 5:
        raise ValueError(f"An interval needs at least 5 generations of every arm; got {fewest}.")
    if any(count != counts["base"][:1] * fewest for count in counts.values()):
        raise ValueError(
            "The arms need equally many generations, all of one sample count; got the sample "
            f"counts {counts}."
        )
    _check_dimension(reference.shape[1], min(len(reference), *counts["base"]))
    moments = [
        _moments(_checked(x, name, like=reference))
        for name, generations in arms.items()
        for x in generations
    ]
    mean, cov = (torch.stack(m).unflatten(0, (3, fewest)) for m in zip(*moments, strict=True))
    return _Moments(mean, cov)


def _moments(x: Tensor, counts: Tensor | None = None) -> _Moments:
    """Mean and covariance of x, its rows repeated as counted."""
    if counts is None:
        counts = x.new_ones(len(x))
    total = counts.sum()
    mean = counts @ x / total
    deviations = (x - mean) * counts.sqrt()[:, None]
    return _Moments(mean, deviations.T @ deviations / (total - 1))


def _resampled_moments(x: Tensor, num_resamples: int, seed: int) -> Iterator[_Moments]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_resamples):
        rows = torch.randint(len(x), (len(x),), generator=generator)
        yield _moments(x, rows.bincount(minlength=len(x)).to(x))


def _frechet(a: _Moments, b: _Moments) -> Tensor:
    """Distances between one Gaussian a and Gaussians b, with the batch shape of b."""
    # With Σ_a = L Lᵀ, the eigenvalues of Σ_a Σ_b are those of the symmetric Lᵀ Σ_b L.
    eigenvalues, vectors = torch.linalg.eigh(a.cov)
    root = vectors * eigenvalues.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.mT @ b.cov @ root).clamp(min=0).sqrt().sum(-1)
    traces = a.cov.trace() + b.cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    distances: Tensor = (a.mean - b.mean).square().sum(-1) + traces - 2 * cross
    return distances.clamp(min=0)


def _ratio(generations: Tensor, resamples: Tensor, level: float) -> tuple[float, float, float]:
    """Numerator over hole, with shapes (2, R) and (2, num_resamples), and Fieller's interval."""
    means = generations.mean(1)
    ratio = means[0] / means[1]
    of_generations, of_reference = generations.cov() / generations.shape[1], resamples.cov()
    direction = torch.stack((torch.ones_like(ratio), -ratio))
    variances = [(direction @ cov @ direction).item() for cov in (of_generations, of_reference)]
    degrees = generations.shape[1] - 1, resamples.shape[1] - 1
    spread = sum(v**2 / n for v, n in zip(variances, degrees, strict=True))
    freedom = max(sum(variances) ** 2 / spread, degrees[0]) if spread > 0 else degrees[0]
    t = _student_quantile(0.5 + level / 2, freedom)
    # θ is inside where (numerator - θ hole)² ≤ t² Var(numerator - θ hole).
    quadratic = torch.outer(means, means) - t**2 * (of_generations + of_reference)
    (c, b), (_, a) = quadratic.tolist()  # a θ² - 2 b θ + c ≤ 0
    if means[1] <= 0 or a <= 0:
        error = t * (of_generations + of_reference)[1, 1].sqrt()
        raise ValueError(
            f"There is no measurable hole to close: D_base - D_post = {means[1]:.4g} ± {error:.2g}. "
            "The base prior may already match; if not, draw more samples or take other features."
        )
    half = math.sqrt(max(b * b - a * c, 0.0))
    return ratio.item(), (b - half) / a, (b + half) / a


def _student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t, from that of the normal (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


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
