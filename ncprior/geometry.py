"""Projections and neighbours of samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PCA", "Neighbours", "nearest"]


class PCA:
    """Principal components of a sample.

    Arguments:
        x: The sample, with shape ``(N, F)``.
        num_components: d; fewer if N or F allow no more.

    References:
        Aneja et al. (2021), table 9, compares latents after a projection to d = 500.

    Example:
        >>> x = torch.randn(100, 1) @ torch.randn(1, 5)  # a line in five dimensions
        >>> y = PCA(x, 2)(x)
        >>> bool(y[:, 1].abs().max() < 1e-4)
        True
    """

    def __init__(self, x: Tensor, num_components: int) -> None:
        self.mean = x.mean(0)
        _, _, v = torch.linalg.svd(x - self.mean, full_matrices=False)
        self.components = v[:num_components].mT  # (F, d)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the coordinates of x, with shape ``(N, d)``."""
        y: Tensor = (x - self.mean) @ self.components
        return y


class Neighbours(NamedTuple):
    """Nearest rows, nearest first.

    Attributes:
        distance: Euclidean distances, with shape ``(N, k)``.
        row: Rows of the data, with shape ``(N, k)``.
    """

    distance: Tensor
    row: Tensor


def nearest(queries: Tensor, data: Tensor, k: int = 1, *, chunk_size: int = 256) -> Neighbours:
    """Finds the rows of data that are nearest to each query: are samples copies of training data?

    Arguments:
        queries: With shape ``(N, *event)``.
        data: With shape ``(N', *event)``.
        k: How many neighbours.
        chunk_size: Queries compared at once.

    Returns:
        Distances and rows of the k nearest.

    Raises:
        ValueError: If there are fewer than k rows of data, or the shapes do not match.

    References:
        Aneja et al. (2021), figure 4.

    Example:
        >>> data = torch.arange(10.0)[:, None]
        >>> nearest(torch.tensor([[3.2]]), data, 2).row
        tensor([[3, 4]])
    """
    if queries.shape[1:] != data.shape[1:] or not 1 <= k <= len(data):
        raise ValueError(
            f"Queries and data must have rows of one shape, and k be from 1 to the rows of data; "
            f"got {tuple(queries.shape)}, {tuple(data.shape)} and k = {k}."
        )
    flat = data.flatten(1)
    found = [
        torch.cdist(part, flat).topk(k, largest=False)
        for part in queries.flatten(1).split(chunk_size)
    ]
    return Neighbours(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]))
