r"""Strength α of a prior at which a sampler's draws have the same mean log r as held-out data.

The distributions :math:`p_\alpha \propto r^\alpha p` are an exponential family in log r. The
member with the highest likelihood of encodings of held-out data has the same mean of log r as the
encodings,

.. math::
    \frac{d}{d\alpha} E_q[\log p_\alpha(z)] = E_q[\log r] - E_{p_\alpha}[\log r] = 0,

and it is unique, as the log-likelihood is concave in α. For r = q/p it is α = 1. A trained head is
accurate on average where p and q have samples, where its NCE loss and its calibration are
measured; a sampler moves to where r is large. Moreover, SIR with few proposals and short Langevin
chains draw from a distribution that is flatter than p_α. The same condition on the actual draws
corrects for both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from ncprior.data.batches import one_pass
from ncprior.data.generators import own_generators_restored
from ncprior.diagnostics.calibration import Mean
from ncprior.diagnostics.walks import evaluating, scaled_log_r, walk_posterior
from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.source import Group, device_of
from ncprior.utils.random_state import seeded
from ncprior.utils.require import (
    require_callable,
    require_counts,
    require_flags,
    require_instance,
    require_numbers,
)
from ncprior.utils.visible import require_eval

_STEPS = 12  # largest number of steps of the search; a smooth function takes about five

_SURE = 3.0  # standard errors of the difference; below, α = 1 is accepted

_CLOSE = 0.5  # standard errors of the difference; below, the search stops


class StrengthWarning(UserWarning):
    """A warning that the largest strength is too small."""


@torch.no_grad()
def match_strength(
    prior: NCPrior,
    held_out: Any,  # noqa: ANN401
    sampler: Sampler,
    *,
    max_strength: float = 2.0,
    batch_size: int = 256,
    progress: bool = True,
) -> float:
    """Strength α at which a sampler's draws have the mean log r of held-out encodings.

    All groups have the same α. The draws of group k are under z_<k ~ q, and log r is summed over
    groups. The prior does not change; set ``prior.strength = match_strength(…)`` yourself.

    Arguments:
        prior: The trained prior.
        held_out: Data that no head was trained on, as for :func:`ncprior.diagnostics.diagnose`.
            All of it is used about ten times: a few thousand rows are enough.
        sampler: The sampler whose strength is fitted, with its settings.
        max_strength: The largest strength, 1 or more. It is returned, with a warning, if the mean
            log r of the draws is still too low there. At larger strengths a sampler only picks the
            best of too few proposals.
        batch_size: Rows per batch, where batches are made here.
        progress: Whether to show a progress bar.

    Returns:
        α. It is 1 if the draws at α = 1 match the data within three standard errors, or the head
        has learnt nothing; 0 if the base is closer to the data than any correction.

    Raises:
        ValueError: If no head is in use, there are fewer than 2 rows, or ``max_strength`` is
            out of range.
        TypeError: If the data can be read only once, or the sampler cannot work with the prior.
        FloatingPointError: If log r is not finite; the message names the group.

    Warns:
        StrengthWarning: If the mean log r of the draws is too low at the largest strength, a
            ``UserWarning``.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> match_strength(prior, torch.randn(50, 3), partial(sir, num_proposals=9), progress=False)
        1.0
    """
    require_instance("prior", prior, NCPrior, "Pass a prior with trained heads.")
    require_callable("sampler", sampler, "Pass a sampler, such as partial(sir, num_proposals=50).")
    require_numbers("[1, inf)", max_strength=max_strength)
    require_counts(batch_size=batch_size)
    require_flags(progress=progress)
    require_eval(prior.source, prior.source.module)
    device, seed = device_of(prior.source), int(torch.randint(2**31, ()))

    def along_data(measure: Callable[[NCPrior, int, Group, Tensor], Tensor]) -> Tensor:
        """Measured values of every row of data, summed over groups, with shape ``(rows,)``."""
        found = []
        with seeded(seed), own_generators_restored(held_out):
            for batch in one_pass(held_out, batch_size, device):
                encoding = prior.source.encode(batch)
                found.append(walk_posterior(prior, encoding, measure).nansum(0))
        return torch.cat(found) if found else torch.empty(0)

    def excess(strength: float) -> Mean:
        """Mean log r of the draws minus that of the data."""

        def of_draw(prior: NCPrior, k: int, group: Group, z: Tensor) -> Tensor:
            with at_strength(prior, strength):
                z = prior.draw(k, group, sampler).z
            return scaled_log_r(prior, k, z, group)

        drawn = along_data(of_draw)
        bar.update()
        return Mean.of((drawn - of_data)[None])

    with (
        evaluating(prior),
        at_strength(prior, 1.0),
        tqdm(desc="strength", disable=not progress) as bar,
    ):
        if not any(prior.is_on(k) for k in range(prior.source.num_groups)):
            raise ValueError("A strength acts on heads, and none is in use. Set prior.active.")
        of_data = along_data(lambda prior, k, group, z: scaled_log_r(prior, k, z, group))
        if len(of_data) < 2:
            raise ValueError(f"A mean with its error needs 2 rows of data; got {len(of_data)}.")
        return _root(excess, max_strength)


def _root(excess: Callable[[float], Mean], max_strength: float) -> float:
    """Root of an increasing function of α within its error, by the Illinois method."""
    at_one = excess(1.0)
    if abs(at_one.value) <= _SURE * at_one.error:
        return 1.0
    end = 0.0 if at_one.value > 0 else max_strength
    at_end = excess(end)
    if (at_end.value > 0) == (at_one.value > 0) or _is_close(at_end):
        if end > 0 and not _is_close(at_end):
            warnings.warn(
                f"At strength {max_strength:g} the mean log r of the draws is still below that of the "
                f"data, by {-at_end.value:.2f} nats. Take more proposals, a sampler with Langevin "
                f"moves, or a closer base.",
                StrengthWarning,
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
            f = f / 2  # the Illinois step, so that neither end stays fixed
        else:
            a, f = b, g
        b, g = middle, found.value
    return middle


def _is_close(found: Mean) -> bool:
    return abs(found.value) <= _CLOSE * found.error


@contextmanager
def at_strength(prior: NCPrior, strength: float) -> Iterator[None]:
    """Context with another strength of a prior; its own is restored at the end."""
    before, prior.strength = prior.strength, strength
    try:
        yield
    finally:
        prior.strength = before
