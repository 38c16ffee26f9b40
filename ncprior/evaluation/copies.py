"""Near-copy share: the fraction of drawn rows that are very close to a training row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncprior.evaluation.tables import features_of
from ncprior.utils.require import require_counts, require_numbers


class NearCopies(NamedTuple):
    """Share of near copies of training rows, with its confidence interval.

    Attributes:
        share: Fraction of drawn rows whose nearest training row is at most ``distance`` away.
        low: Lower end of the interval of the share, for the randomness of drawn and held-out rows.
        high: Upper end of the interval.
        expected: The same fraction of held-out rows, which copy nothing.
        distance: The largest distance of a near copy, in the units of the features.
    """

    share: float
    low: float
    high: float
    expected: float
    distance: float

    @property
    def copies(self) -> bool:
        """Whether drawn rows are near copies more often than held-out rows, beyond the noise."""
        return self.low > self.expected

    def __str__(self) -> str:
        share, low, high, expected = (f"{100 * x:.1f}" for x in self[:4])
        return f"near copies of training rows: {share} % ({low}–{high}), expected {expected} %"


@torch.no_grad()
def near_copies(
    train: Any,  # noqa: ANN401
    held_out: Any,  # noqa: ANN401
    drawn: Any,  # noqa: ANN401
    *,
    quantile: float = 0.05,
    level: float = 0.95,
    chunk_size: int = 256,
) -> NearCopies:
    r"""Near-copy share: how often drawn rows are closer to training rows than new data are.

    The distance of a row is the Euclidean distance to its nearest training row. A near copy is a
    row with a distance of at most :math:`t`, a low quantile of the distances of held-out rows.
    Draws from the distribution of the data have the share of held-out rows, about ``quantile``;
    a prior that stores training rows has a share of up to 1. Where more held-out rows than that are
    exact duplicates of training rows, as in tables and codes, :math:`t` is 0 and the expected share
    is that of the duplicates.

    Held-out rows are made in the same way as drawn rows: compare drawn latents with latents of
    held-out data. Decoded rows are smoother than data, and can be closer to everything; compare
    them with reconstructions of held-out data.

    The interval is Wilson's for the drawn rows, widened by that of the expected share.

    Arguments:
        train: Features of training data, with shape ``(N, ...)``: a tensor, an array, a list or a
            DataFrame. In a DataFrame, numbers are divided by their standard deviations in
            ``train``, and two different categories have distance 1.
        held_out: Features of data outside of the training data.
        drawn: Features of samples.
        quantile: Share of near copies among held-out rows, apart from duplicates.
        level: Coverage of the interval.
        chunk_size: Rows compared at once; memory holds ``chunk_size`` × N numbers.

    Returns:
        The share with its interval, the expected share and the distance.

    Raises:
        TypeError: If rows are no numbers or categories.
        ValueError: If there are fewer than 1 / ``quantile`` held-out rows, columns differ, a value
            is missing or not finite, or a number is out of range.

    References:
        Interval Estimation for the Difference Between Independent Proportions (Newcombe, 1998)

    Example:
        >>> train, held_out, drawn = torch.randn(3, 1000, 2)
        >>> near_copies(train, held_out, drawn).copies
        False
        >>> print(near_copies(train, held_out, train[:500]))
        near copies of training rows: 100.0 % (98.3–100.0), expected 5.0 %
    """
    require_numbers("(0, 1)", quantile=quantile, level=level)
    require_counts(chunk_size=chunk_size)
    return copies_of(
        train, held_out, {"drawn": drawn}, quantile=quantile, level=level, chunk_size=chunk_size
    )["drawn"]


def copies_of(
    train: Any,  # noqa: ANN401
    held_out: Any,  # noqa: ANN401
    arms: Mapping[str, Any],
    *,
    quantile: float = 0.05,
    level: float = 0.95,
    chunk_size: int = 256,
) -> dict[str, NearCopies]:
    """Near-copy shares of several sets of drawn rows, by name, as of :func:`near_copies`."""
    train, held_out, *drawn = features_of(train=train, held_out=held_out, **arms)
    if quantile * len(held_out) < 1:
        raise ValueError(
            f"A quantile of {quantile} needs at least {math.ceil(1 / quantile)} rows held_out; "
            f"got {len(held_out)}. Pass more, or a larger quantile."
        )
    new, *drawn = (_nearest(x, train, int(chunk_size)) for x in (held_out, *drawn))
    distance = new.kthvalue(math.ceil(quantile * len(new))).values
    (expected, least, most), *shares = (
        _wilson((x <= distance).cpu().double().mean().item(), len(x), level) for x in (new, *drawn)
    )
    below, above = expected - least, most - expected
    return {
        name: NearCopies(
            share,
            max(share - math.hypot(share - low, above), 0.0),
            min(share + math.hypot(high - share, below), 1.0),
            expected,
            distance.item(),
        )
        for name, (share, low, high) in zip(arms, shares, strict=True)
    }


def _nearest(rows: Tensor, train: Tensor, chunk_size: int) -> Tensor:
    """Distance to the nearest training row, ``(N,)``; exactly 0 for a duplicate."""
    centre, found = train.mean(0), []
    for part in rows.split(chunk_size):
        nearest = torch.cdist(part - centre, train - centre).argmin(1)
        # Distances from cdist are differences of squares, which are not exactly 0.
        found.append((part - train[nearest]).norm(dim=1))
    return torch.cat(found)


def _wilson(share: float, count: int, level: float) -> tuple[float, float, float]:
    """A share of ``count`` rows with both ends of Wilson's interval."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = share + z**2 / (2 * count)
    margin = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    whole = 1 + z**2 / count
    return share, (centre - margin) / whole, (centre + margin) / whole
