"""Two directions in which draws of one distribution differ most from draws of another.

A VAE's training brings mean and variance of the encodings close to those of its prior, so that
principal components show little. The directions here are found among coordinates, principal
components, directions of other variances, and directions at which the fourth moments differ most,
by the largest Kolmogorov-Smirnov distance of the projections.

References:
    | A Fast Fixed-Point Algorithm for Independent Component Analysis (Hyvärinen & Oja, 1997)
    | https://doi.org/10.1162/neco.1997.9.7.1483
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncprior.utils.random_state import seeded

_MOST_COMPONENTS = 48

_STARTS, _STEPS = 32, 20  # of the search by fourth moments


def separating_plane(first: Tensor, second: Tensor) -> Tensor:
    """Two orthonormal directions that separate two samples, with shape ``(D, 2)``.

    Arguments:
        first: Draws with shape ``(N, D)``.
        second: Draws with shape ``(M, D)``.

    Returns:
        The directions; for D = 1, the second is zero.
    """
    first, second = first.cpu().double(), second.cpu().double()
    both = torch.cat([first, second])
    rank = min(_MOST_COMPONENTS, *both.shape)
    with seeded(0):
        components = torch.pca_lowrank(both, rank, niter=4)[2]
        starts = torch.randn(rank, _STARTS, dtype=both.dtype)
    a, b = ((z - z.mean(0)) @ components for z in (first, second))
    spread = torch.linalg.eigh(b.T @ b / len(b) - a.T @ a / len(a)).eigenvectors
    inner = [torch.eye(rank, dtype=both.dtype), spread, _by_fourth_moments(a, b, starts)]
    candidates = torch.cat([components @ torch.cat(inner, 1), _axes(both)], 1)
    directions: list[Tensor] = []
    for _ in range(2):
        candidates = candidates / candidates.norm(dim=0).clamp(min=1e-12)
        best = candidates[:, _distance(first @ candidates, second @ candidates).argmax()]
        directions.append(best)
        candidates = candidates - best[:, None] * (best @ candidates)
        candidates = candidates * (
            candidates.norm(dim=0) > 0.2
        )  # others are rounding of the first
    return torch.stack(directions, 1).float()


def _by_fourth_moments(a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
    """Unit directions w at which E_b[(w·z)⁴] - E_a[(w·z)⁴] is extreme, by fixed-point iteration."""
    for _ in range(_STEPS):
        directions = directions / directions.norm(dim=0).clamp(min=1e-12)
        parts = [z.T @ (z @ directions) ** 3 / len(z) for z in (a, b)]
        directions = parts[1] - parts[0]
    return directions


def _axes(z: Tensor) -> Tensor:
    """The coordinate axes of largest variance."""
    count = min(_MOST_COMPONENTS, z.shape[1])
    axes = torch.zeros(z.shape[1], count, dtype=z.dtype)
    axes[z.var(0).topk(count).indices, torch.arange(count, device=z.device)] = 1.0
    return axes


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of every column."""
    a, b = a.T.contiguous().sort().values, b.T.contiguous().sort().values
    both = torch.cat([a, b], 1).contiguous()
    below = [torch.searchsorted(x, both, right=True) / x.shape[1] for x in (a, b)]
    return (below[0] - below[1]).abs().amax(1)
