r"""Gap closed: the fraction of the prior hole that a new prior removes, with its interval.

.. math::
    \theta = \frac{D_\text{base} - D}{D_\text{base} - D_\text{post}}

where D_base, D and D_post are the Fréchet distances between held-out data and samples of the base
prior, of our prior and of the posterior. 0 is as good as the base prior, 1 as good as the
aggregate posterior; values above 1 are possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ncprior.evaluation.copies import NearCopies, copies_of
from ncprior.evaluation.metrics import (
    Moments,
    check_dimension,
    checked,
    frechet,
    items_of,
    moments,
)
from ncprior.utils.require import require_counts, require_instance, require_numbers

Generations: TypeAlias = "Sequence[Tensor] | Tensor"

_MOSTLY_DECODER = 0.5  # of D_base: what is left for priors is the smaller part


class GapClosed(NamedTuple):
    """Gap closed with its confidence interval and its Fréchet distances.

    Attributes:
        gap_closed: (D_base - D) / (D_base - D_post).
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
        d_base: Fréchet distance of samples of the base prior, mean over the generations.
        d_post: Fréchet distance of posterior samples, mean over the generations.
        d_ours: Fréchet distance of samples of our prior, mean over the generations.
        distances: Distances of every generation of base, ours and posterior, ``(3, R)``.
        resampled: Mean distances to every resampled reference, ``(3, num_resamples)``.
        copies: Near-copy shares of base, ours and posterior by name, if ``train`` was given.
    """

    gap_closed: float
    low: float
    high: float
    d_base: float
    d_post: float
    d_ours: float
    distances: Tensor
    resampled: Tensor
    copies: Mapping[str, NearCopies] = {}

    @property
    def floor(self) -> float:
        """Fraction of the base's distance that decoded encodings have, too: D_post / D_base.

        No prior can close it. It is the decoder's, and the bias of finite samples, about
        F² (1/N + 1/N_ref) / 4 for features of unit variance. If it is large, D mostly measures the details that the decoder
        leaves out of every image, and samples with other errors may look closer to the data than
        decoded encodings. Then take decoded encodings of held-out data as the reference.
        """
        return self.d_post / self.d_base

    def __str__(self) -> str:
        value, low, high = (f"{100 * x:.0f}" for x in (self.gap_closed, self.low, self.high))
        parts = [f"gap in samples closed: {value} % ({low}–{high})"]
        if self.copies:
            parts.append(str(self.copies["ours"]))
        if self.floor > _MOSTLY_DECODER:
            parts.append(
                f"decoded encodings have {self.floor:.0%} of the base's distance: take decoded "
                "encodings of held-out data as the reference, or more samples"
            )
        return "; ".join(parts)


class GapDifference(NamedTuple):
    """Difference between the gaps closed by two methods, with its confidence interval.

    Attributes:
        difference: Gap closed by the first method minus that by the second.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
    """

    difference: float
    low: float
    high: float


@torch.no_grad()
def gap_closed(
    reference: Tensor,
    *,
    base: Generations,
    ours: Generations,
    posterior: Generations,
    train: Tensor | None = None,
    num_resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> GapClosed:
    """Gap closed between base prior and posterior, with a confidence interval.

    The estimate is (D_base - D) / (D_base - D_post), where each D is the mean over R generations
    of the Fréchet distance to the full reference.

    The interval is Fieller's interval for a ratio of means. The covariance of numerator and
    denominator is the covariance over the R generations, divided by R, plus the covariance over
    references resampled with replacement, which are the same for all arms. Duplicates in a
    resampled reference add a constant to all distances: it cancels in the covariance, but would
    bias percentiles of the resampled ratio. As R is small, the quantile is that of Student's t
    with Satterthwaite's degrees of freedom.

    The interval covers the randomness of sampling and of the choice of held-out data, but not that
    of training. The finite-sample bias of Fréchet distances cancels as far as the covariances of
    the arms agree.

    Arguments:
        reference: Features of held-out data, with shape ``(N_ref, F)``: a tensor, an array or a
            list. All other features are moved to its device. Where the decoder is most of the
            distance (see ``floor`` of the result), take decoded encodings of held-out data.
        base: Features of R ≥ 5 independent generations from the base prior, ``(N, F)`` each.
        ours: The same for our prior. Use one seed for the i-th generations of all arms: the noise
            that they have in common cancels.
        posterior: The same for decoded posterior samples of *training* data, if possible with
            different data for every generation. With samples of the reference data, D_post would
            be too low.
        train: Features of training data, ``(N_train, F)``, for the near-copy share of every arm:
            see :func:`near_copies`. The base cannot copy, and the posterior always does: they show
            what the shares of smooth samples and of copies are.
        num_resamples: Number of resampled references.
        level: Coverage of the interval.
        seed: Seed of the resampled references, which depend on the seed and N_ref alone, so that
            results of several methods are paired (:func:`gap_difference`).

    Returns:
        The gap closed, its interval, and the distances.

    Raises:
        TypeError: If features are not real numbers, or an arm is not a list of features.
        ValueError: If there are fewer than 5 generations, two generations are equal, their sizes
            differ, F > min(N, N_ref) / 10, or there is no measurable hole: D_base exceeds D_post
            by less than its sampling error. Draw more samples or take other features.

    References:
        Some Problems in Interval Estimation (Fieller, 1954)

    Example:
        >>> reference, scale = torch.randn(1000, 2), torch.tensor([2.0, 1.2, 1.0])
        >>> base, ours, posterior = scale.view(3, 1, 1, 1) * torch.randn(3, 5, 1000, 2)
        >>> result = gap_closed(reference, base=base, ours=ours, posterior=posterior)
        >>> result.low < 0.96 < result.high  # D = F (scale - 1)²
        True
    """
    require_counts("[2, inf)", num_resamples=num_resamples)
    require_counts("[0, 1e18]", seed=seed)
    require_numbers("(0, 1)", level=level)
    reference = checked(reference, "reference")
    arms = _checked_arms(reference, {"base": base, "ours": ours, "posterior": posterior})
    copies = {}
    if train is not None:
        drawn = {"base": base, "ours": ours, "posterior": posterior}
        rows = {k: torch.cat([checked(x, k, like=reference) for x in v]) for k, v in drawn.items()}
        copies = copies_of(checked(train, "train", like=reference), reference, rows)
    distances = frechet(moments(reference), arms)
    # A posterior without noise can give the same samples twice; a prior cannot.
    if any(len(arm.unique()) < len(arm) for arm in distances[:2]):
        raise ValueError("Two generations of an arm are the same; draw each with its own seed.")
    references = _resampled_moments(reference, num_resamples, seed)
    resampled = torch.stack([frechet(some, arms).mean(1) for some in references], dim=1)
    gaps, resampled_gaps = (
        torch.stack((d[0] - d[1], d[0] - d[2])) for d in (distances, resampled)
    )
    ratio = _ratio(gaps, resampled_gaps, level)
    d_base, d_ours, d_post = distances.mean(1).tolist()
    return GapClosed(*ratio, d_base, d_post, d_ours, distances, resampled, copies)


def gap_difference(a: GapClosed, b: GapClosed, *, level: float = 0.95) -> GapDifference:
    """Paired difference between the gaps closed by methods a and b.

    The noise that both results have in common, of the reference and of generations with equal
    seeds, cancels: the interval is often much narrower than those of a and b.

    Arguments:
        a: Result of :func:`gap_closed`.
        b: Result for another method, from the same reference, base and posterior.
        level: Coverage of the interval.

    Returns:
        The difference (D_b - D_a) / (D_base - D_post) and its interval; above 0, a is better.

    Raises:
        ValueError: If the results differ in more than the method.
        TypeError: If a or b is not a result of :func:`gap_closed`.

    Example:
        >>> reference = torch.randn(1000, 2)
        >>> base, a, b, posterior = torch.randn(4, 5, 1000, 2)
        >>> arms = {"base": 2 * base, "posterior": posterior}
        >>> first = gap_closed(reference, ours=1.1 * a, **arms)
        >>> second = gap_closed(reference, ours=1.5 * b, **arms)
        >>> gap_difference(first, second).low > 0
        True
    """
    for name, result in (("a", a), ("b", b)):
        require_instance(name, result, GapClosed, "Pass a result of gap_closed.")
    require_numbers("(0, 1)", level=level)
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


def _checked_arms(reference: Tensor, arms: dict[str, Generations]) -> Moments:
    """Moments of all generations, with batch shape (3, R), after a check of the arms."""
    found, counts = list[Moments](), dict[str, list[int]]()
    for name, generations in arms.items():
        counts[name] = []
        for i, x in enumerate(items_of(name, generations, "features, one (N, F) per generation")):
            features = checked(x, f"{name}[{i}]", like=reference)
            counts[name].append(len(features))
            found.append(moments(features))
    fewest = min(len(count) for count in counts.values())
    if fewest < 5:
        raise ValueError(f"An interval needs at least 5 generations of every arm; got {fewest}.")
    if any(count != counts["base"][:1] * fewest for count in counts.values()):
        raise ValueError(
            "The arms need equally many generations, all of one sample count; got the sample "
            f"counts {counts}."
        )
    check_dimension(reference.shape[1], min(len(reference), *counts["base"]))
    mean, cov = (torch.stack(m).unflatten(0, (3, fewest)) for m in zip(*found, strict=True))
    return Moments(mean, cov)


def _resampled_moments(x: Tensor, num_resamples: int, seed: int) -> Iterator[Moments]:
    generator = torch.Generator().manual_seed(int(seed))
    for _ in range(num_resamples):
        rows = torch.randint(len(x), (len(x),), generator=generator, device="cpu")
        yield moments(x, rows.bincount(minlength=len(x)).to(x))


def _ratio(generations: Tensor, resamples: Tensor, level: float) -> tuple[float, float, float]:
    """Ratio of numerator and hole, (2, R) and (2, num_resamples), with Fieller's interval."""
    means = generations.mean(1)
    ratio = means[0] / means[1]
    of_generations, of_reference = generations.cov() / generations.shape[1], resamples.cov()
    direction = torch.stack((torch.ones_like(ratio), -ratio))
    variances = [(direction @ cov @ direction).item() for cov in (of_generations, of_reference)]
    degrees = generations.shape[1] - 1, resamples.shape[1] - 1
    spread = sum(v**2 / n for v, n in zip(variances, degrees, strict=True))
    freedom = sum(variances) ** 2 / spread if spread > 0 else degrees[0]
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
    """Quantile of Student's t above the median, by bisection of its distribution function."""
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        is_below = _student_cdf(middle, freedom) < probability
        low, high = (middle, high) if is_below else (low, middle)
    return 0.5 * (low + high)


def _student_cdf(t: float, freedom: float) -> float:
    """∫ of the density, which is that of cos(θ)^(freedom - 1) for t = √freedom tan(θ)."""
    end = math.atan(t / math.sqrt(freedom))
    theta = torch.linspace(0, end, 2001, dtype=torch.float64, device="cpu")
    area = torch.trapezoid(theta.cos().pow(freedom - 1), theta).item()
    log_whole = 0.5 * math.log(math.pi) + math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)
    return 0.5 + area / math.exp(log_whole)
