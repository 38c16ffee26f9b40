r"""Samplers of p(z) ∝ r(z)·p(z): pure functions ``sampler(prior, log_ratio) -> Draw``.

``prior`` is p(z) of batch shape ``(B,)``; ``log_ratio`` maps z, with shape ``(*, B, *event)``, to
log r(z) in nats, with shape ``(*, B)``. Anything with this signature is a sampler; configure one
with ``functools.partial(sir, num_proposals=500)``.

References:
    | A Contrastive Learning Approach for Training Variational Autoencoder Priors
    | (Aneja et al., NeurIPS 2021), section 4.3
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from ncprior.distributions import Sampleable, is_prior
from ncprior.utils.draws import drawn
from ncprior.utils.random_state import seeded
from ncprior.utils.require import described, numbers, require_callable, require_instance

LogRatio: TypeAlias = Callable[[Tensor], Tensor]

Sampler: TypeAlias = "Callable[[Sampleable, LogRatio], Draw]"

NOT_FINITE = (
    "log r is not finite for some proposals. Look for NaN or infinity in the head's weights, the "
    "prior or the context."
)


class Draw(NamedTuple):
    """Draws z, one per row, with their sampling diagnostics; a diagnostic that a sampler does not compute is ``None``.

    Attributes:
        z: The latents, with shape ``(B, *event)``.
        ess: Effective sample size of the proposals, (Σ r)² / Σ r², from 1 to M, with shape
            ``(B,)``.
        log_mean_weight: log (1/M) Σ r, an estimate of log Z in nats, with shape ``(B,)``.
        acceptance: Acceptance rate of a Markov chain, from 0 to 1, with shape ``(B,)``.

    Example:
        >>> Draw(z=torch.zeros(4, 2)).ess is None
        True
    """

    z: Tensor
    ess: Tensor | None = None
    log_mean_weight: Tensor | None = None
    acceptance: Tensor | None = None


class Sample(NamedTuple):
    """Decoded x, latents and diagnostics of the draws of :meth:`ncprior.NCPrior.sample`.

    Attributes:
        x: The decoder's mean, or with ``draw_x`` a draw of p(x | z), with shape ``(B, ...)``.
        latents: One z_k per group, each with shape ``(B, *event)``.
        draws: One :class:`~ncprior.Draw` per group, with effective sample size and other
            diagnostics of the sampler.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> sample = prior.sample(8, partial(sir, num_proposals=100))
        >>> sample.x.shape, sample.latents[0].shape, sample.draws[0].ess.shape
        (torch.Size([8, 3]), torch.Size([8, 2]), torch.Size([8]))
    """

    x: Tensor
    latents: tuple[Tensor, ...]
    draws: tuple[Draw, ...]


def latents_at_once(z: Tensor, chunk_size: int | None) -> int:
    """Number of latents per call of a head: ``chunk_size``, or one that suits the device of z.

    On a CPU, few latents stay in its cache. On an accelerator, the launch of kernels dominates small
    calls. A chunk there has at most 2²⁶ numbers.

    Arguments:
        z: Latents, with shape ``(M, B, *event)``.
        chunk_size: The number that was asked for, or ``None``.
    """
    if chunk_size is not None:
        return chunk_size
    if z.device.type == "cpu":
        return 4096
    return max(1, min(2**17, 2**26 // max(1, z.shape[2:].numel())))


def check_prior(prior: Sampleable) -> None:
    """Validates that an object is a distribution or another sampler of z, and no ``NCPrior``.

    Raises:
        TypeError: If it is not.
    """
    if not is_prior(prior):
        raise TypeError(
            f"prior must be p(z), a distribution of batch shape (B,); got {described(prior)}. "
            f"Draw from an NCPrior by NCPrior.sample(n, sampler)."
        )


def check_target(prior: Sampleable, log_ratio: LogRatio) -> None:
    """Validates the arguments that all samplers share.

    Raises:
        TypeError: If the prior is not a distribution or another sampler of z, or ``log_ratio`` is
            not a function.
        ValueError: If the prior's batch shape is not ``(B,)``; use ``prior.expand((B,))``.
    """
    check_prior(prior)
    require_callable("log_ratio", log_ratio, "Pass a function that maps z to log r(z) in nats.")
    if isinstance(prior, Distribution) and len(prior.batch_shape) != 1:
        raise ValueError(
            f"The prior given to a sampler must have batch shape (B,); got {tuple(prior.batch_shape)} with "
            f"event shape {tuple(prior.event_shape)}. Use prior.expand((B,))."
        )


def draw_from(prior: Sampleable, count: int) -> Tensor:
    """Draws ``count`` z per row of a prior, with shape ``(count, B, *event)``.

    Raises:
        TypeError: If the prior does not draw a tensor of real numbers or codes.
        ValueError: If its draws do not have such a shape.
    """
    z = drawn(prior, Size((count,)))
    if not isinstance(z, Tensor) or z.is_complex():
        raise TypeError(
            f"The prior must draw a tensor of real numbers or codes; got {described(z)}."
        )
    if z.ndim < 2 or len(z) != count:
        raise ValueError(
            f"The prior's sample(({count},)) must have shape ({count}, B, *event), with one row for "
            f"each sample; got {described(z)}."
        )
    return z


def start_at(init: Any, prior: Sampleable) -> Tensor:  # noqa: ANN401
    """Returns the start of Markov chains on the prior's device, after a check of shape and values.

    Arguments:
        init: Latents of every row, ``(B, *event)``, as a tensor, an array or a list.
        prior: p(z), of batch shape ``(B,)``.

    Raises:
        TypeError: If ``init`` holds no real numbers or codes.
        ValueError: If its shape is wrong, or a value is NaN or infinite.
    """
    z = numbers("init", init).detach()
    if z.dtype == torch.float64 and not isinstance(init, Tensor):
        z = z.to(torch.get_default_dtype())  # arrays and lists are in double precision by default
    with seeded(0):  # the generators stay as they are
        like = draw_from(prior, 1)[0]
    if z.shape != like.shape:
        raise ValueError(
            f"init must have the prior's shape (B, *event), {tuple(like.shape)}; got "
            f"{tuple(z.shape)}."
        )
    return z.to(like.device)


def checked_draw(draw: Any, shape: Size | None = None) -> Draw:  # noqa: ANN401
    """Returns the draw of a sampler, after a check of its type and, if given, of z's shape.

    Raises:
        TypeError: If it is not a :class:`Draw` of a tensor z.
        ValueError: If z has another shape.
    """
    require_instance("The result of a sampler", draw, Draw, "Return ncprior.Draw(z=z).")
    require_instance("z of a Draw", draw.z, Tensor, "Return latents of shape (B, *event).")
    if shape is not None and draw.z.shape != shape:
        raise ValueError(
            f"z of a Draw must have shape (B, *event), here {tuple(shape)}; got "
            f"{tuple(draw.z.shape)}. Return one z per row."
        )
    return draw  # type: ignore[no-any-return]


def checked(log_r: Tensor, shape: Size) -> Tensor:
    """Returns log r in at least float32, after a check of its type and shape.

    Raises:
        TypeError: If log r is not a tensor of real numbers.
        ValueError: If log r has another shape.
    """
    if not isinstance(log_r, Tensor) or log_r.is_complex() or log_r.dtype == torch.bool:
        raise TypeError(
            f"log_ratio must return log r(z), a tensor of real numbers; got {described(log_r)}."
        )
    if log_r.shape != shape:
        raise ValueError(
            f"log_ratio must map z of shape (*, B, *event) to log r of shape (*, B), here "
            f"{tuple(shape)}; got {tuple(log_r.shape)}."
        )
    return log_r if log_r.dtype == torch.float64 else log_r.float()


def finite(log_r: Tensor) -> Tensor:
    """Returns log r unchanged if it is finite everywhere, at the price of one synchronisation.

    Raises:
        FloatingPointError: If a value is not finite.
    """
    if not torch.isfinite(log_r).all():
        raise FloatingPointError(NOT_FINITE)
    return log_r


def like_event(mask: Tensor, z: Tensor) -> Tensor:
    """Returns a mask of rows in a shape that broadcasts over the event of z."""
    return mask.reshape(mask.shape + (1,) * (z.ndim - mask.ndim))


def over_event(values: Tensor, rows: Tensor) -> Tensor:
    """Values with shape (*, B, *event) as (*, B, D), for rows of shape (*, B)."""
    return values.reshape(*rows.shape, math.prod(values.shape[rows.ndim :]))
