r"""How strongly to correct: the α at which what a sampler draws has the log r that the data have.

The laws :math:`p_\alpha \propto r^\alpha p` are an exponential family in log r. The one that gives
encodings of held-out data the highest likelihood has their mean of log r,

.. math::
    \frac{d}{d\alpha} E_q[\log p_\alpha(z)] = E_q[\log r] - E_{p_\alpha}[\log r] = 0,

and there is but one, as the likelihood is concave in α. For r = q/p it is at α = 1. A trained head
is right on average where p and q have samples, which is what its NCE loss and its calibration see; a
sampler goes where r is large. And SIR of few proposals and short chains draw from a law that is
flatter than p_α: the same condition, on what they do draw, makes up for that too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from ncprior.data.stream import one_pass
from ncprior.diagnostics.calibration import Mean
from ncprior.diagnostics.diagnose import evaluating, scaled_log_r, walk_posterior
from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.source import Group, device_of, require_eval
from ncprior.utils.random_state import seeded

_STEPS = 12  # of the search at most; a smooth function takes about five

_SURE = 3.0  # standard errors of the difference: below, draws are right as they are

_CLOSE = 0.5  # standard errors: closer, a search gains nothing


@torch.no_grad()
def match_strength(
    prior: NCPrior,
    held_out: Any,  # noqa: ANN401
    sampler: Sampler,
    *,
    most: float = 2.0,
    batch_size: int = 256,
    progress: bool = True,
) -> float:
    """Finds the strength α at which a sampler's draws have the mean log r of held-out encodings.

    With several groups, all share one α, draws of each are taken at z_<k ~ q, and log r is summed
    over groups. The prior stays as it is: ``prior.strength = match_strength(…)`` is yours to say.

    Arguments:
        prior: The trained prior.
        held_out: Data that no head was trained on, as for :func:`ncprior.diagnostics.diagnose`. All
            of it is used, some ten times: a few thousand rows will do.
        sampler: The sampler that the strength is for, with its settings.
        most: The largest strength, 1 or more. Where the draws fall short even there, it is what is
            returned, with a warning: beyond, a sampler picks but the best of too few.
        batch_size: Rows per batch, where batches are made here.
        progress: Whether to show a progress bar.

    Returns:
        α: 1 where the draws are right as they are, within three standard errors, or nothing has
        been learnt; 0 where the base is closer to the data than any correction.

    Raises:
        ValueError: If no head is in use, there are fewer than 2 rows, or ``most`` is out of range.
        TypeError: If the data can be read only once, or the sampler cannot work with the prior.
        FloatingPointError: If log r is not finite, naming the group.

    Warns:
        UserWarning: If the draws fall short at the largest strength.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> match_strength(prior, torch.randn(50, 3), partial(sir, num_proposals=9), progress=False)
        1.0
    """
    if not 1 <= most < math.inf:
        raise ValueError(f"most must be 1 or more and finite; got {most}.")
    require_eval(prior.source, prior.source.module)
    device, seed = device_of(prior.source), int(torch.randint(2**31, ()))

    def along_data(measure: Callable[[NCPrior, int, Group, Tensor], Tensor]) -> Tensor:
        """What is measured at every row of data, summed over groups, with shape ``(rows,)``."""
        found = []
        with seeded(seed):
            for batch in one_pass(held_out, batch_size, device):
                encoding = prior.source.encode(batch)
                found.append(walk_posterior(prior, encoding, measure).nansum(0))
        return torch.cat(found) if found else torch.empty(0)

    def excess(strength: float) -> Mean:
        """How far the draws' mean log r is above that of the data."""

        def of_draw(prior: NCPrior, k: int, group: Group, z: Tensor) -> Tensor:
            with _at(prior, strength):
                z = prior.draw(k, group, sampler).z
            return scaled_log_r(prior, k, z, group)

        drawn = along_data(of_draw)
        bar.update()
        return Mean.of((drawn - of_data)[None])

    with evaluating(prior), _at(prior, 1.0), tqdm(desc="strength", disable=not progress) as bar:
        if not any(prior.is_on(k) for k in range(prior.source.num_groups)):
            raise ValueError("No head is in use, and a strength acts on heads. See prior.active.")
        of_data = along_data(lambda prior, k, group, z: scaled_log_r(prior, k, z, group))
        if len(of_data) < 2:
            raise ValueError(f"A mean with its error needs 2 rows of data; got {len(of_data)}.")
        return _root(excess, most)


def _root(excess: Callable[[float], Mean], most: float) -> float:
    """Where a rising function of α is 0 within its error, by the Illinois method."""
    at_one = excess(1.0)
    if abs(at_one.value) <= _SURE * at_one.error:
        return 1.0
    end = 0.0 if at_one.value > 0 else most
    at_end = excess(end)
    if (at_end.value > 0) == (at_one.value > 0) or _is_close(at_end):
        if end > 0 and not _is_close(at_end):
            warnings.warn(
                f"Even at strength {most:g} the draws fall short of the data's mean log r, by "
                f"{-at_end.value:.2f} nats. Take more proposals, a sampler that walks, or a closer "
                f"base.",
                stacklevel=4,
            )
        return end
    (a, f), (b, g) = (1.0, at_one.value), (end, at_end.value)
    for _ in range(_STEPS):
        middle = b - g * (b - a) / (g - f)
        found = excess(middle)
        if _is_close(found):
            break
        if (found.value > 0) == (g > 0):
            f = f / 2  # so that no end stays for good
        else:
            a, f = b, g
        b, g = middle, found.value
    return middle


def _is_close(found: Mean) -> bool:
    return abs(found.value) <= _CLOSE * found.error


@contextmanager
def _at(prior: NCPrior, strength: float) -> Iterator[None]:
    """A prior of another strength; on leaving, of its own again."""
    before, prior.strength = prior.strength, strength
    try:
        yield
    finally:
        prior.strength = before
