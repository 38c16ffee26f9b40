"""Two-sample test of draws of a prior against encodings of held-out data, group by group."""

from __future__ import annotations

import math
from typing import Any

from ncprior.data.stream import first_batch
from ncprior.diagnostics.calibration import Mean
from ncprior.diagnostics.missing import missing_jsd
from ncprior.diagnostics.walks import evaluating
from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.training.stages import nested

_STEPS = 500  # of the fresh heads
_NUM_DRAWS = 8192
_BATCH = 256


def remaining_jsd(prior: NCPrior, held_out: Any, sampler: Sampler) -> list[Mean]:  # noqa: ANN401
    """Jensen-Shannon divergence of the encodings and the draws of a sampler, for every group.

    A fresh head is trained on one part of the held-out data to tell encodings from draws, and
    measured on another. It sees all that head, sampler and strength have left.

    Arguments:
        prior: The prior; groups whose heads are off are drawn from the base.
        held_out: Held-out data.
        sampler: The sampler.

    Returns:
        The divergence in nats with its standard error, a lower bound; NaN for a group whose latents
        no head of ours fits.
    """
    with evaluating(prior):
        batch = first_batch(held_out, _BATCH)
        fresh = NCPrior.for_source(nested(prior, sampler), batch)
        return missing_jsd(
            fresh, held_out, steps=_STEPS, num_draws=_NUM_DRAWS, batch_size=_BATCH
        )


def total(means: list[Mean]) -> Mean:
    """Sum over groups, with its standard error."""
    known = [mean for mean in means if not math.isnan(mean.value)]
    value = sum(mean.value for mean in known)
    return Mean(value, math.sqrt(sum(mean.error**2 for mean in known)))
