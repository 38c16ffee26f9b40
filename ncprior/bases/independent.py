"""Latents that are Gaussian and independent of all others, found from draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEVEL = 0.01  # probability that one latent of all is taken for a dependent one

_FEWEST_ROWS = 100  # fewer do not show that a latent is independent

_MOST_WORK = 2**38  # rows times pairs of latents: some 20 seconds on two cores


def looks_independent(white: Tensor) -> Tensor:
    """A mask of latents whose draws do not differ from those of an independent Gaussian.

    In a VAE these are collapsed latents, with q(z_j | x) = p(z_j) for every x. Under independence
    of N(0, 1), the Hermite polynomials h_1, …, h_4 of a latent have mean 0, and h_1 and h_2 have
    no correlation with those of another latent.

    Arguments:
        white: Flat latents of mean 0 and standard deviation 1, with shape ``(N, D)``.

    Returns:
        The mask, with shape ``(D,)``; all false for fewer than 100 rows, and for several thousand
        latents, whose pairs are too many.
    """
    n, d = white.shape
    if n < _FEWEST_ROWS or n * d**2 > _MOST_WORK:
        return torch.zeros(d, dtype=torch.bool, device=white.device)
    h_2 = (white.square() - 1) / math.sqrt(2)
    h_3 = (white**3 - 3 * white) / math.sqrt(6)
    h_4 = (white**4 - 6 * white.square() + 3) / math.sqrt(24)
    h = torch.cat([white, h_2], dim=1)
    h = (h - h.mean(0)) / h.std(0).clamp_min(1e-12)
    ties = (h.mT @ h / math.sqrt(n)).abs().reshape(2, d, 2, d).amax((0, 2))
    shapes = torch.stack([h_3.mean(0), h_4.mean(0)]).abs().amax(0) * math.sqrt(n)
    statistic = torch.maximum(ties.fill_diagonal_(0.0).amax(0), shapes)
    tests = 2 * d * (d - 1) + 2 * d
    p = torch.tensor(1 - _LEVEL / (2 * tests), dtype=torch.float64)
    looks: Tensor = statistic < torch.special.ndtri(p).item()
    return looks
