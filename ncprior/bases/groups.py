"""Latents and contexts of all groups of a VAE: training data of bases that see the earlier groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior.data.batches import one_pass
from ncprior.data.row_store import RowStore
from ncprior.source import LatentSource, device_of, num_rows, posterior_of
from ncprior.utils.require import require_finite

_BATCH = 500  # rows

_MEMORY = 2**32  # bytes; more latents and contexts are kept on disk


class GroupData(NamedTuple):
    """Latents of one group, and their contexts.

    Attributes:
        z: One draw z_k ~ q(z_k | z_<k, x) per row, with shape ``(N, *event)``.
        context: Returns c(z_<k) of rows, with shape ``(n, ...)``, from their numbers; ``None``
            without a context.
        frame: Means and standard deviations of the VAE's own prior N(μ, σ²) for each row, given its
            context, with shape ``(N, *event)``; ``None`` for another prior, or without a context.
    """

    z: Tensor
    context: Callable[[Tensor], Tensor] | None
    frame: tuple[Tensor, Tensor] | None


def group_data(source: LatentSource[Any, Any], data: Any) -> list[GroupData]:  # noqa: ANN401
    """Returns latents and contexts of every group, along one walk per row of the data.

    Arguments:
        source: The VAE.
        data: Training data, as for :func:`ncprior.bases.latents_of`.

    Raises:
        ValueError: If the data have no rows, or a latent is not finite.
    """
    device = device_of(source)
    walks = (tuple(_walk(source, x)) for x in one_pass(data, _BATCH, device))
    first = next(walks, None)
    if first is None:
        raise ValueError("The data have no rows. Pass one row of x or more.")
    rows = RowStore(chain([first], walks), budget=_MEMORY)[:]
    return [
        GroupData(
            z.to(device),
            None if context is None else partial(_read, context, device),
            None if frame is None else (frame[0].to(device), frame[1].to(device)),
        )
        for z, context, frame in rows
    ]


def frame_of(prior: Any) -> tuple[Tensor, Tensor] | None:  # noqa: ANN401
    """Returns mean and standard deviation of a Gaussian with independent latents, else ``None``."""
    normal = prior.base_dist if isinstance(prior, Independent) else prior
    if type(normal) is not Normal:
        return None
    shape = prior.batch_shape + prior.event_shape
    return normal.loc.expand(shape), normal.scale.expand(shape)


@torch.no_grad()
def _walk(source: LatentSource[Any, Any], x: Any) -> Iterator[tuple[Any, ...]]:  # noqa: ANN401
    """Draws of z_k from the posterior, contexts and frames of all groups, for one batch."""
    encoding = source.encode(x)
    state = source.start(num_rows(encoding), encoding)
    for k in range(source.num_groups):
        group = source.group(state)
        z = posterior_of(group).sample()
        require_finite(f"Group {k}: z drawn from q(z | x)", z)
        yield z, group.context, None if group.context is None else frame_of(group.prior)
        if k + 1 < source.num_groups:
            state = source.advance(state, z)


def _read(context: Tensor, device: torch.device, rows: Tensor) -> Tensor:
    """Contexts of rows, which may be on disk."""
    return context[rows.to(context.device)].to(device)
