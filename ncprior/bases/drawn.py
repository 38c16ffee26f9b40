"""Base that is drawn by a function, such as a sampler of a trained prior."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Size, Tensor


class Drawn:
    """Base that is drawn by a function: it can be sampled, and has no density.

    Draws are made one after another, so that the memory for one is enough.

    Arguments:
        draw: Returns one z per row, with shape ``(B, *event)``, and their estimates log Ẑ in nats,
            or ``None``.

    Attributes:
        log_mean_weights: Mean log Ẑ of every draw so far, in nats, if the function returns it; on
            the device of the draws.
    """

    def __init__(self, draw: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        self.draw = draw
        self.log_mean_weights: list[Tensor] = []

    @torch.no_grad()
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws z, with shape ``(*sample_shape, B, *event)``."""
        draws = [self.draw() for _ in range(math.prod(sample_shape))]
        self.log_mean_weights += [weight.mean() for _, weight in draws if weight is not None]
        z = torch.stack([z for z, _ in draws])
        return z.reshape(*sample_shape, *z.shape[1:])
