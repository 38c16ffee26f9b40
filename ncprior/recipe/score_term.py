"""Whether heads can be trained with the score term."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ncprior.prior import NCPrior
from ncprior.source import Group, device_of, num_rows, posterior_of, visit
from ncprior.utils.batches import own_batch
from ncprior.utils.draws import drawn
from ncprior.utils.gradients import gradients_enabled, gradients_kept, leaves
from ncprior.utils.supports import support_of

_NO_SECOND_DERIVATIVE = re.compile("derivative|differentiate")  # of what torch says then


@gradients_enabled()
def has_scores(prior: NCPrior, x: Any) -> bool:  # noqa: ANN401
    """Whether the score term can be computed, and differentiated, in every group.

    Arguments:
        prior: A prior with new heads.
        x: One batch.

    Returns:
        False for latents that are not on all of R^n, without a density, or whose features have no
        second derivative.
    """

    def look(k: int, group: Group) -> Tensor:
        posterior = posterior_of(group)
        found.append(not support_of(group.prior) and not support_of(posterior))
        return drawn(posterior)

    found: list[bool] = []
    finite: list[bool] = []
    x = own_batch(x, device_of(prior.source))
    with torch.no_grad():
        encoding = prior.source.encode(x)
        visit(prior.source, prior.source.start(num_rows(encoding), encoding), look)
    if not all(found):
        return False
    try:
        for loss in prior.group_losses(x, score_weight=1.0):
            reached = leaves(loss.total)
            with gradients_kept(reached):
                loss.total.backward()
                finite += [p.grad is None or bool(p.grad.isfinite().all()) for p in reached]
    except TypeError:  # no density, or no gradient in z
        return False
    except RuntimeError as error:
        if not _NO_SECOND_DERIVATIVE.search(str(error)):
            raise
        return False
    return all(finite)
