"""What heads learn from: z ~ q(z_k | x, z_<k) against z ~ p(z_k | z_<k), z_<k of the posterior."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor

from ncprior.nce import nce_loss
from ncprior.source import LatentSource, num_rows, posterior_of, require_eval

if TYPE_CHECKING:
    from ncprior.prior import NCPrior

__all__ = ["contrasts", "group_losses"]


def contrasts(
    source: LatentSource[Any, Any],
    x: Any,  # noqa: ANN401
    num_draws: int = 1,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields, group by group, what its head is to tell apart, under z_<k of the posterior.

    Arguments:
        source: The VAE.
        x: One batch, as the user's loader yields it.
        num_draws: Draws of z_k per row, from posterior and prior each; the walk goes on with the
            first.

    Returns:
        Draws of the posterior and of the prior, with shape ``(2, num_draws, B, *event)``, and the
        context.

    Example:
        >>> [z.shape for z, context in contrasts(source, x)]
        [torch.Size([2, 1, 4, 2])]
    """
    count = Size((num_draws,))
    require_eval(source, getattr(source, "module", None))
    with torch.no_grad():
        encoding = source.encode(x)
        state = source.start(num_rows(encoding), encoding)
    for k in range(source.num_groups):
        with torch.no_grad():
            group = source.group(state)
            z_q, z_p = _draw(posterior_of(group), count), _draw(group.prior, count)
            if k + 1 < source.num_groups:
                state = source.advance(state, z_q[0])
            z = torch.stack([z_q, z_p.to(z_q.dtype)])
        yield z, group.context


def _draw(law: Any, count: Size) -> Tensor:  # noqa: ANN401
    """Draws of a law; a GPU need not wait for them, as a normal's ``sample`` makes it."""
    z: Tensor = law.rsample(count) if getattr(law, "has_rsample", False) else law.sample(count)
    return z


def group_losses(
    prior: NCPrior,
    x: Any,  # noqa: ANN401
    noise_weight: float,
    num_draws: int,
    *,
    precision: torch.dtype = torch.float32,
    groups: Container[int] | None = None,
) -> Iterator[Tensor]:
    """Yields each group's NCE loss in turn; one walk, of which only one head is alive at a time.

    Arguments:
        prior: The prior.
        x: One batch, as the user's loader yields it.
        noise_weight: ν, see :func:`ncprior.nce_loss`.
        num_draws: Draws of z_k per row, from posterior and prior each.
        precision: Of the factors of the heads' products, see :mod:`ncprior.inference`.
        groups: The groups that are wanted, of which the others' losses are 0; all by default.

    Returns:
        The losses in nats, scalars.

    Example:
        >>> for loss in group_losses(prior, x, noise_weight=1.0, num_draws=1):
        ...     loss.backward()
    """
    for k, (z, context) in enumerate(contrasts(prior.source, x, num_draws)):
        if groups is not None and k not in groups:
            yield z.new_zeros((), dtype=torch.float32)
            continue
        log_r = prior.log_r(k, z, context, precision=precision)
        yield nce_loss(log_r[0], log_r[1], noise_weight)
