"""Data x of a batch, and batches of a pass, after a check: rows, and NaN or infinity in x."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ncprior.distributions import build, is_half, parameters
from ncprior.utils.batches import data_of, to_device
from ncprior.utils.precision import at_least_float32
from ncprior.utils.require import require_finite


def checked_batches(batches: Iterable[Any], device: torch.device | None = None) -> Iterator[Any]:
    """Yields batches, each after a check of its x, at the price of a synchronisation.

    Arguments:
        batches: Batches, as :func:`~ncprior.data.one_pass` returns them.
        device: Device that batches are moved to, or ``None`` to leave them where they are.

    Raises:
        ValueError: If there is no batch, or the x of one has no rows, NaN or infinity.
        TypeError: If a batch has no tensor x.
    """
    count = 0
    for count, batch in enumerate(batches, start=1):
        require_finite(f"x in batch {count} of the data", data_of(batch))
        yield batch if device is None else to_device(batch, device)
    if count == 0:
        raise ValueError("The data must have 1 or more rows; got none. Pass rows of data.")


def log_prob_of_data(likelihood: Distribution, x: Tensor) -> Tensor:
    """Returns log p(x | z) in nats, with shape ``(B,)``.

    Arguments:
        likelihood: p(x | z), one z per row.
        x: The rows, as ``source.observed`` returns them.

    Raises:
        ValueError: If x or its log-density has another shape.
    """
    if isinstance(likelihood, Distribution):
        shape = likelihood.batch_shape + likelihood.event_shape
        if x.shape != shape:
            raise ValueError(
                f"Data must have the shape of p(x | z), {tuple(shape)}; got {tuple(x.shape)}. Pass "
                f"data as the VAE decodes them."
            )
    x = at_least_float32(x)
    log_p = likelihood.log_prob(x)  # which validates x
    if log_p.shape != x.shape[:1]:
        raise ValueError(
            f"log p(x | z) must have shape (B,), here ({len(x)},); got {tuple(log_p.shape)}. Wrap "
            f"p(x | z) in Independent(p, {x.ndim - 1})."
        )
    if is_half(likelihood) and (known := parameters(likelihood)) is not None:
        return build(known).log_prob(x)  # else it would be rounded to whole nats
    return log_p
