"""Samples of the aggregate posterior, as training data of a base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ncprior.data.batches import one_pass
from ncprior.source import LatentSource, device_of, num_rows, posterior_of, require_source
from ncprior.utils.batches import map_tensors
from ncprior.utils.require import require_choice, require_counts, require_finite

_BATCH = 1000  # rows


@torch.no_grad()
def latents_of(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    *,
    k: int = 0,
    of: str = "samples",
    batch_size: int = _BATCH,
) -> Tensor:
    """Latents of data, encoded by a source: training data of a base.

    Arguments:
        source: The VAE.
        data: A tensor or map-style dataset of x, a ``DataLoader``, or a list of batches.
        k: Index of the latent group, from 0.
        of: ``"samples"``, one z_k ~ q(z_k | z_<k, x) per row, the distribution on which heads are
            trained; or ``"means"`` of q, to which RAE fits its mixture.
        batch_size: Rows per batch, where batches are made here.

    Returns:
        The latents, with shape ``(N, *event)``.

    Raises:
        TypeError: If the source is not a :class:`~ncprior.LatentSource`, or a count is not a whole
            number.
        ValueError: If there is no group k, an argument is out of range, the data have no rows, or
            they or their latents are not finite.

    Example:
        >>> latents_of(source, x).shape
        torch.Size([4, 2])
    """
    require_source(source)
    require_counts(f"[0, {source.num_groups - 1}]", k=k)
    require_choice("of", of, ("samples", "means"))
    require_counts(batch_size=batch_size)
    batches = one_pass(data, batch_size, device_of(source))
    return torch.cat(_taken(source, batches, partial(_take, of=of), k=k, of=of))


@torch.no_grad()
def draws_of(source: LatentSource[Any, Any], data: Any, num_draws: int) -> Tensor:  # noqa: ANN401
    """Returns several draws z ~ q(z | x) of the first group per row, each of which is encoded once.

    Arguments:
        source: The VAE.
        data: Rows of x, as :func:`latents_of` takes them.
        num_draws: Number of draws per row.

    Returns:
        The latents, with shape ``(num_draws * N, *event)``, one draw of all rows after the other.
    """

    def take(q: Distribution) -> Tensor:
        return torch.stack([_take(q, "samples") for _ in range(num_draws)])

    batches = one_pass(data, _BATCH, device_of(source))
    return torch.cat(_taken(source, batches, take), 1).flatten(0, 1)


def _taken(
    source: LatentSource[Any, Any],
    batches: Iterable[Any],
    take: Callable[[Distribution], Tensor],
    *,
    k: int = 0,
    of: str = "samples",
) -> list[Tensor]:
    """Takes something of q(z_k | z_<k, x) for every batch, where z_<k are samples or means."""
    taken = []
    for batch in batches:
        map_tensors(_require_no_infinity, batch)
        with _blaming_data(batch):
            encoding = source.encode(batch)
            state = source.start(num_rows(encoding), encoding)
            for _ in range(k):
                state = source.advance(state, _take(posterior_of(source.group(state)), of))
            taken.append(take(posterior_of(source.group(state))))
        require_finite("q(z | x)", taken[-1])
    if sum(z.numel() for z in taken) == 0:
        raise ValueError("The data have no rows. Pass one row of x or more.")
    return taken


@contextmanager
def _blaming_data(batch: Any) -> Iterator[None]:  # noqa: ANN401
    """Context that traces errors of the encoder and its posterior back to NaN in the data."""
    try:
        yield
    except (RuntimeError, ValueError):
        map_tensors(_require_finite_x, batch)
        raise


def _require_no_infinity(x: Tensor) -> Tensor:
    """Validates x before an encoder that saturates; NaN may mark missing values."""
    if x.is_floating_point():
        require_finite("x", x.nan_to_num(0.0, math.inf, -math.inf))
    return x


def _require_finite_x(x: Tensor) -> Tensor:
    require_finite("x", x)
    return x


def _take(q: Distribution, of: str) -> Tensor:
    if of == "means":
        return q.mean
    try:
        return q.sample()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"q(z | x) cannot be sampled ({error}). Look for NaN or infinity in x, and in the "
            f"output of the encoder."
        ) from error
