"""Area under the ROC curve with a confidence interval, and paired differences of two areas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor


class AUROC(NamedTuple):
    """Area under the receiver operating characteristic, or a difference of two such areas.

    Attributes:
        value: The area, from 0 to 1, or the difference, from -1 to 1.
        low: Lower end of its interval.
        high: Upper end.
        error: Its standard error.
    """

    value: float
    low: float
    high: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def auroc(inside: Tensor, outside: Tensor, *, level: float = 0.95) -> AUROC:
    """Returns the probability that a score from inside is larger than one from outside.

    Ties count one half. The variance is DeLong's, the interval that of a normal law, cut to [0, 1];
    where every pair is in order it has no width.

    Arguments:
        inside: Scores of in-distribution data, with shape ``(N,)``.
        outside: Scores of other data, with shape ``(N',)``.
        level: Coverage of the interval.

    Returns:
        The area with its interval.

    Raises:
        ValueError: If there are fewer than two scores of either, a NaN, or the level is no share.

    References:
        DeLong et al. (1988), equations 4 and 5

    Example:
        >>> print(auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0])))
        0.917 (0.686 to 1.000)
    """
    above, below = _placements(inside, outside)
    error = math.sqrt((above.var() / len(above) + below.var() / len(below)).item())
    return _with_interval(above.mean().item(), error, level, lowest=0.0)


def auroc_gain(
    inside: Tensor,
    outside: Sequence[Tensor],
    *,
    than: tuple[Tensor, Sequence[Tensor]],
    level: float = 0.95,
) -> AUROC:
    """Returns how much larger the AUROC of one score is than another's, on average over sets.

    Both score the same images, whose variance they share: the difference is paired, image by image.

    Arguments:
        inside: Scores of in-distribution data, with shape ``(N,)``.
        outside: Scores of every other set, each ``(N_k,)``.
        than: The other's scores of the same images in the same order, inside and outside.
        level: Coverage of the interval.

    Returns:
        The mean difference of the areas, with its interval.

    Raises:
        ValueError: As :func:`auroc` does, and if the two scores are not of as many images and sets.

    References:
        DeLong et al. (1988), on correlated areas

    Example:
        >>> inside, outside = torch.tensor([1.0, 2.0, 3.0]), [torch.tensor([0.0, 1.0])]
        >>> print(auroc_gain(inside, outside, than=(inside, outside)))
        0.000 (0.000 to 0.000)
    """
    others, other_outside = than
    if not outside or [len(inside), *map(len, outside)] != [len(others), *map(len, other_outside)]:
        raise ValueError(
            f"A paired difference needs two scores of the same images, of one set outside or more; "
            f"got {len(inside)} inside and {[len(s) for s in outside]} outside, and {len(others)} "
            f"and {[len(s) for s in other_outside]}."
        )
    pairs = [
        (_placements(inside, ours), _placements(others, theirs))
        for ours, theirs in zip(outside, other_outside, strict=True)
    ]
    above = torch.stack([ours[0] - theirs[0] for ours, theirs in pairs]).mean(0)
    below = [(ours[1] - theirs[1]) / len(pairs) for ours, theirs in pairs]
    variance = sum(share.var().item() / len(share) for share in (above, *below))
    return _with_interval(above.mean().item(), math.sqrt(variance), level, lowest=-1.0)


def _with_interval(value: float, error: float, level: float, *, lowest: float) -> AUROC:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}.")
    margin = NormalDist().inv_cdf(0.5 + 0.5 * level) * error
    return AUROC(value, max(lowest, value - margin), min(1.0, value + margin), error)


def _placements(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Of each score, the share of the other kind that it is in order with; their mean is the area."""
    inside, outside = (scores.to("cpu", torch.float64).flatten() for scores in (inside, outside))
    if min(len(inside), len(outside)) < 2:
        raise ValueError(
            f"An AUROC needs two scores or more of either kind; got {len(inside)} inside and "
            f"{len(outside)} outside."
        )
    if inside.isnan().any() or outside.isnan().any():
        raise ValueError("Some scores are NaN. Look at the images they belong to.")
    return _share_below(inside, outside), 1 - _share_below(outside, inside)


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Of each score, the share of others below it, ties counted by half."""
    others = others.sort().values
    ends = [torch.searchsorted(others, scores, right=right) for right in (False, True)]
    return (ends[0] + ends[1]).double() / (2 * len(others))
