"""Calibration of trained heads on held-out data."""

from __future__ import annotations

from typing import Any

from ncprior.diagnostics.diagnose import diagnose
from ncprior.diagnostics.strength import at_strength
from ncprior.heads.product import rescale_head
from ncprior.prior import NCPrior
from ncprior.utils.require import require_counts, require_instance


def calibrate_heads(
    prior: NCPrior,
    held_out: Any,  # noqa: ANN401
    batch_size: int = 256,
) -> tuple[float, ...]:
    """Rescales each group's log r to a·log r + b, with the a and b that fit held-out data best.

    The strength of the prior plays no part: it multiplies the calibrated log r.

    Arguments:
        prior: The prior; its heads are changed in place.
        held_out: Data that no head was trained on, as for :func:`ncprior.diagnostics.diagnose`.
        batch_size: Rows per batch, where batches are made here.

    Returns:
        The slope a per group: below 1 if the head was over-confident; 1 if the head is off, or no slope
        above 0 fits, and it is left as it was.

    Raises:
        TypeError: If a head has no method ``rescale(slope, offset)``. Add one, or use a head of
            ``ncprior.heads``.

    References:
        | On Calibration of Modern Neural Networks (Guo et al., 2017), temperature scaling

    Example:
        >>> calibrate_heads(prior, torch.randn(100, 3))  # a new head's log r is 0
        (1.0,)
    """
    require_instance("prior", prior, NCPrior, "Pass the trained NCPrior.")
    require_counts(batch_size=batch_size)
    for head in prior.heads:
        rescale_head(head, 1.0, 0.0)  # raises before the heads are measured
    slopes = []
    with at_strength(prior, 1.0):
        report = diagnose(prior, held_out, fresh_steps=0, batch_size=batch_size)
    for group in report.groups:
        slope = group.slope if group.slope > 0 else 1.0
        if slope != 1:
            rescale_head(prior.heads[group.group], slope, group.offset)
        slopes.append(slope)
    return tuple(slopes)
