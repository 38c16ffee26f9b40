"""Samples of the aggregate posterior, as training data of a base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ncprior.data.stream import one_pass
from ncprior.source import LatentSource, device_of, num_rows, posterior_of, require_source


@torch.no_grad()
def latents_of(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    *,
    k: int = 0,
    of: str = "samples",
    batch_size: int = 1000,
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
        ValueError: If there is no group k, or ``of`` is neither of the two.

    Example:
        >>> latents_of(source, x).shape
        torch.Size([4, 2])
    """
    require_source(source)
    if not 0 <= k < source.num_groups or of not in ("samples", "means"):
        raise ValueError(
            f"k must be from 0 to {source.num_groups - 1}, and of 'samples' or 'means'; "
            f"got {k} and {of!r}."
        )
    device, latents = device_of(source), []
    for batch in one_pass(data, batch_size, device):
        encoding = source.encode(batch)
        state = source.start(num_rows(encoding), encoding)
        for _ in range(k):
            state = source.advance(state, _take(posterior_of(source.group(state)), of))
        latents.append(_take(posterior_of(source.group(state)), of))
    return torch.cat(latents)


def _take(q: Distribution, of: str) -> Tensor:
    return q.sample() if of == "samples" else q.mean
