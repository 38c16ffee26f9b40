"""Area under the ROC curve (AUROC) with a confidence interval, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncprior.evaluation.metrics import items_of
from ncprior.utils.require import described, real_tensor, require_numbers


class AUROC(NamedTuple):
    """Area under the receiver operating characteristic (AUROC), or a difference of two AUROCs.

    Attributes:
        value: The area, from 0 to 1, or the difference, from -1 to 1.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
        error: Standard error of the value.
    """

    value: float
    low: float
    high: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def auroc(inside: Tensor, outside: Tensor, *, level: float = 0.95) -> AUROC:
    """AUROC: the probability that a score from inside is larger than a score from outside.

    Ties count one half. The variance is DeLong's. The interval is that of a normal distribution,
    cut to [0, 1]; its width is 0 if every pair is in order.

    Arguments:
        inside: Scores of in-distribution data, with shape ``(N,)``: a tensor, an array or a list.
            Scores may be infinite.
        outside: Scores of out-of-distribution data, with shape ``(N',)``.
        level: Coverage of the interval.

    Returns:
        The area with its interval.

    Raises:
        ValueError: If there are fewer than two scores of either kind, a score is NaN, or the level
            is not between 0 and 1.
        TypeError: If scores are not real numbers.

    References:
        DeLong et al. (1988), equations 4 and 5

    Example:
        >>> print(auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0])))
        0.917 (0.686 to 1.000)
    """
    require_numbers("(0, 1)", level=level)
    above, below = _placements(_scores("inside", inside), _scores("outside", outside))
    error = math.sqrt((above.var() / len(above) + below.var() / len(below)).item())
    return _with_interval(above.mean().item(), error, level, lowest=0.0)


def auroc_gain(
    inside: Tensor,
    outside: Sequence[Tensor],
    *,
    than: tuple[Tensor, Sequence[Tensor]],
    level: float = 0.95,
) -> AUROC:
    """Paired difference between the AUROCs of two scores, averaged over out-of-distribution sets.

    Both scores are of the same images, so that the difference is paired image by image: the
    variance that the scores have in common cancels.

    Arguments:
        inside: Scores of in-distribution data, with shape ``(N,)``.
        outside: Scores of every out-of-distribution set, each ``(N_k,)``.
        than: The other score of the same images in the same order, as a pair (inside, outside).
        level: Coverage of the interval.

    Returns:
        The mean difference of the AUROCs, with its interval.

    Raises:
        ValueError: As for :func:`auroc`, and if the two scores have different numbers of images or
            sets.
        TypeError: As for :func:`auroc`, and if ``than`` is not a pair. Pass (inside, outside).

    References:
        DeLong et al. (1988), on correlated areas

    Example:
        >>> inside, outside = torch.tensor([1.0, 2.0, 3.0]), [torch.tensor([0.0, 1.0])]
        >>> print(auroc_gain(inside, outside, than=(inside, outside)))
        0.000 (0.000 to 0.000)
    """
    require_numbers("(0, 1)", level=level)
    if not isinstance(than, tuple | list) or len(than) != 2:
        raise TypeError(f"than must be a pair (inside, outside) of scores; got {described(than)}.")
    ours = [_scores("inside", inside), *_sets("outside", outside)]
    theirs = [_scores("than[0]", than[0]), *_sets("than[1]", than[1])]
    counts, other_counts = [len(s) for s in ours], [len(s) for s in theirs]
    if len(ours) < 2 or counts != other_counts:
        raise ValueError(
            f"A paired difference needs two scores of the same images, of one set outside or more; "
            f"got {counts[0]} inside and {counts[1:]} outside, and {other_counts[0]} and "
            f"{other_counts[1:]}."
        )
    pairs = [
        (_placements(ours[0], one), _placements(theirs[0], other))
        for one, other in zip(ours[1:], theirs[1:], strict=True)
    ]
    above = torch.stack([one[0] - other[0] for one, other in pairs]).mean(0)
    below = [(one[1] - other[1]) / len(pairs) for one, other in pairs]
    variance = sum(values.var().item() / len(values) for values in (above, *below))
    return _with_interval(above.mean().item(), math.sqrt(variance), level, lowest=-1.0)


def _with_interval(value: float, error: float, level: float, *, lowest: float) -> AUROC:
    margin = NormalDist().inv_cdf(0.5 + 0.5 * level) * error
    return AUROC(value, max(lowest, value - margin), min(1.0, value + margin), error)


def _scores(name: str, scores: Any) -> Tensor:  # noqa: ANN401
    x = real_tensor(name, scores, ndim=1, rows=2, infinite=True, exact=True)
    return x.cpu().double().contiguous()


def _sets(name: str, sets: Any) -> list[Tensor]:  # noqa: ANN401
    items = items_of(name, sets, "scores, one (N,) per set")
    return [_scores(f"{name}[{k}]", scores) for k, scores in enumerate(items)]


def _placements(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Fraction of other scores in the right order, per score; the mean is the AUROC."""
    return _fraction_below(inside, outside), 1 - _fraction_below(outside, inside)


def _fraction_below(scores: Tensor, others: Tensor) -> Tensor:
    """Fraction of other scores below each score; ties count one half."""
    others = others.sort().values
    ends = [torch.searchsorted(others, scores, right=right) for right in (False, True)]
    return (ends[0] + ends[1]).cpu().double() / (2 * len(others))
