"""Data x of a batch, and batches of a pass, after a check: rows, and NaN or infinity in x."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ncprior.utils.batches import to_device
from ncprior.utils.require import described, require_finite


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


def data_of(batch: Any) -> Tensor:  # noqa: ANN401
    """Returns the data x of a batch: the batch itself, or the first item of a tuple or a mapping.

    Raises:
        TypeError: If that is no tensor of real numbers.
        ValueError: If it is empty.
    """
    x = batch
    if isinstance(batch, Mapping):
        x = next(iter(batch.values()), None)
    elif isinstance(batch, tuple | list):
        x = batch[0] if batch else None
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(
            f"A batch must be a tensor x of real numbers, or a tuple or mapping whose first item is "
            f"x; got {described(batch)} with {described(x)}. Pass such batches."
        )
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"A batch must have 1 or more rows of x; got {described(x)}.")
    return x


def log_prob_of_data(likelihood: Distribution, batch: Any) -> Tensor:  # noqa: ANN401
    """Returns log p(x | z) in nats of the x of a batch, with shape ``(B,)``.

    Arguments:
        likelihood: p(x | z), one z per row.
        batch: The batch, as for :func:`data_of`.

    Raises:
        ValueError: If x or its log-density has another shape.
    """
    x = data_of(batch)
    if isinstance(likelihood, Distribution):
        shape = likelihood.batch_shape + likelihood.event_shape
        if x.shape != shape:
            raise ValueError(
                f"Data must have the shape of p(x | z), {tuple(shape)}; got {tuple(x.shape)}. Pass "
                f"data as the VAE decodes them."
            )
    log_p = likelihood.log_prob(x)
    if log_p.shape != x.shape[:1]:
        raise ValueError(
            f"log p(x | z) must have shape (B,), here ({len(x)},); got {tuple(log_p.shape)}. Wrap "
            f"p(x | z) in Independent(p, {x.ndim - 1})."
        )
    return log_p
