"""Replay buffer of Langevin chains: new chains can continue earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ncprior.utils.require import require_counts, require_numbers


class ReplayBuffer:
    """Replay buffer: the noise of the last chains, which some of the new chains continue.

    Arguments:
        size: Largest number of kept chains; the oldest are replaced first.
        fraction: Probability that a new chain continues a kept one, if there are any.

    Raises:
        ValueError: If the size is below 1, or the fraction is not from 0 to 1.

    References:
        Training Restricted Boltzmann Machines using Approximations to the Likelihood Gradient
        (Tieleman, ICML 2008); Xiao et al. (2021), whose persistent chains keep ε_z alone.
    """

    def __init__(self, size: int, fraction: float) -> None:
        require_counts(size=size)
        require_numbers("[0, 1]", fraction=fraction)
        self.size, self.fraction = size, fraction
        self.kept: tuple[Tensor, ...] = ()  # each (at most size, *event)
        self.pushed = 0

    def mix(self, fresh: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Returns fresh noise with some rows, taken at random, replaced by kept ones."""
        if not self.kept:
            return tuple(fresh)
        rows, device = len(fresh[0]), fresh[0].device
        replayed = torch.rand(rows, device=device) < self.fraction
        index = torch.randint(len(self.kept[0]), (rows,), device=device)
        return tuple(
            torch.where(replayed.reshape(-1, *(1,) * (new.ndim - 1)), old[index].to(new), new)
            for old, new in zip(self.kept, fresh, strict=True)
        )

    def push(self, noise: Sequence[Tensor]) -> None:
        """Adds the noise of finished chains, which replaces the oldest."""
        noise = [part.detach()[: self.size] for part in noise]
        filled, count = len(self.kept[0]) if self.kept else 0, len(noise[0])
        if filled < self.size:
            parts = zip(self.kept, noise, strict=True) if self.kept else ((n,) for n in noise)
            self.kept = tuple(torch.cat(pair)[: self.size] for pair in parts)
        place = torch.arange(self.pushed, self.pushed + count, device=noise[0].device) % self.size
        for kept, new in zip(self.kept, noise, strict=True):
            kept[place.to(kept.device)] = new
        self.pushed += count
