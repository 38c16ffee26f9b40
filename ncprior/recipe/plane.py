"""Two directions in which draws of one distribution differ most from draws of another.

A VAE's training brings mean and variance of the encodings close to those of its prior, so that
principal components show little. The directions here are found among coordinates, principal
components, directions of other variances, and directions of other fourth moments (FOBI), by the
largest Kolmogorov-Smirnov distance of the projections.

References:
    | Source Separation Using Higher Order Moments (Cardoso, 1989)
    | https://doi.org/10.1109/ICASSP.1989.266878
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncprior.utils.random_state import seeded

_MOST_COMPONENTS = 48


def separating_plane(first: Tensor, second: Tensor) -> Tensor:
    """Two orthonormal directions that separate two samples, with shape ``(D, 2)``.

    Arguments:
        first: Draws with shape ``(N, D)``.
        second: Draws with shape ``(M, D)``.

    Returns:
        The directions; for D = 1, the second is zero.
    """
    first, second = first.double(), second.double()
    both = torch.cat([first, second])
    with seeded(0):  # of a random projection
        rank = min(_MOST_COMPONENTS, *both.shape)
        components = torch.pca_lowrank(both, rank, niter=4)[2]
    inner = [_moments(x @ components) for x in (first, second)]
    found = [torch.linalg.eigh(b - a).eigenvectors for a, b in zip(*inner, strict=True)]
    candidates = torch.cat(
        [components @ torch.cat([torch.eye(rank, dtype=both.dtype), *found], 1), _axes(both)], 1
    )
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


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments, and second moments weighted by the squared norm."""
    centred = z - z.mean(0)
    weights = centred.square().sum(1, keepdim=True) / z.shape[1]
    return centred.T @ centred / len(z), (weights * centred).T @ centred / len(z)


def _axes(z: Tensor) -> Tensor:
    """The coordinate axes of largest variance."""
    count = min(_MOST_COMPONENTS, z.shape[1])
    axes = torch.zeros(z.shape[1], count, dtype=z.dtype)
    axes[z.var(0).topk(count).indices, torch.arange(count)] = 1.0
    return axes


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of every column."""
    a, b = a.T.contiguous().sort().values, b.T.contiguous().sort().values
    both = torch.cat([a, b], 1).contiguous()
    below = [torch.searchsorted(x, both, right=True) / x.shape[1] for x in (a, b)]
    return (below[0] - below[1]).abs().amax(1)
