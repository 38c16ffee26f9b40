"""Two-sample test of draws of a prior against encodings of held-out data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ncprior.bases.latents import latents_of
from ncprior.evaluation.two_sample import TwoSampleTest, two_sample_test
from ncprior.prior import NCPrior

_BATCH = 1000

_FOLDS = 2


@torch.no_grad()
def compare_draws(prior: NCPrior, held_out: Any, seed: int) -> TwoSampleTest:  # noqa: ANN401
    """Returns the two-sample test of the draws of a prior with one group and no condition.

    It sees all that base, head, sampler and strength have left.
    """
    encodings = latents_of(prior.source, held_out)
    drawn = torch.cat([_draw(prior, len(part)) for part in encodings.split(_BATCH)])
    return two_sample_test(encodings.flatten(1), drawn.flatten(1), folds=_FOLDS, seed=seed)


def _draw(prior: NCPrior, count: int) -> Tensor:
    return prior.draw(0, prior.source.group(prior.source.start(count))).z
