"""The three arms that the demonstration compares: base prior, NCP and posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from ncprior.prior import NCPrior
from ncprior.samplers import Sampler
from ncprior.source import sample_posterior

__all__ = ["ARMS", "Generation", "draw_arms", "in_batches", "log_z"]

ARMS = ("base prior", "NCP", "posterior")
_BATCH = 1000  # images drawn or judged at once


class Generation(NamedTuple):
    """One generation of one arm.

    Attributes:
        x: Images, with shape ``(N, 1, H, W)``.
        z: Their latents, with shape ``(N, D)``.
        ess: Effective sample size of the proposals, NaN where there are none, with shape ``(N,)``.
    """

    x: Tensor
    z: Tensor
    ess: Tensor


def draw_arms(
    prior: NCPrior,
    sampler: Sampler,
    x: Tensor,
    *,
    features: Callable[[Tensor], Tensor],
    num_samples: int,
    generations: int,
    progress: bool = True,
) -> tuple[dict[str, list[Tensor]], dict[str, Generation]]:
    """Draws every generation of every arm, of which it keeps features.

    The i-th generations of all arms share a seed. The posterior arm takes training images in
    random order, and again where there are fewer of them than samples.

    Arguments:
        prior: The prior, of one group.
        sampler: How NCP is drawn.
        x: Training images, with shape ``(N, 1, H, W)``.
        features: Maps images to features, ``(B, F)``.
        num_samples: Samples per generation.
        generations: R, the number of generations of each arm.
        progress: Whether to show a progress bar.

    Returns:
        The features of every generation, and each arm's first generation, by the arm's name.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> features, first = draw_arms(
        ...     prior,
        ...     partial(sir, num_proposals=10),
        ...     x,
        ...     features=torch.sin,
        ...     num_samples=20,
        ...     generations=2,
        ...     progress=False,
        ... )
        >>> len(features["NCP"]), first["posterior"].z.shape
        (2, torch.Size([20, 2]))
    """
    kept: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    first: dict[str, Generation] = {}
    seeds = torch.randint(2**31, (generations,)).tolist()
    work = [(seed, arm) for seed in seeds for arm in ARMS]
    for seed, arm in tqdm(work, desc="samples", disable=not progress):
        torch.manual_seed(seed)
        passes = -(-num_samples // len(x))
        rows = torch.cat([torch.randperm(len(x)) for _ in range(passes)])[:num_samples]
        generation = _generate(prior, sampler, x[rows], arm)
        kept[arm].append(in_batches(features, generation.x))
        first.setdefault(arm, generation)
    return kept, first


@torch.no_grad()
def log_z(prior: NCPrior, num_draws: int) -> float:
    """Returns log E_p[r] in nats over draws of the base prior of one group: 0 for an exact ratio.

    Example:
        >>> abs(log_z(prior, 1000)) < 1e-12  # a new head: r = 1
        True
    """
    base = prior.source.group(prior.source.start(num_draws)).prior
    log_r = prior.log_ratio([base.sample()])[:, 0]
    return torch.logsumexp(log_r.double(), 0).item() - math.log(num_draws)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a function of rows to many rows.

    Example:
        >>> in_batches(torch.exp, torch.zeros(2500, 1)).shape
        torch.Size([2500, 1])
    """
    return torch.cat([function(batch) for batch in x.split(_BATCH)])


@torch.no_grad()
def _generate(prior: NCPrior, sampler: Sampler, x: Tensor, arm: str) -> Generation:
    """Draws as many samples as there are rows of x."""
    parts = []
    for batch in x.split(_BATCH):
        if arm == "posterior":
            (z,), state = sample_posterior(prior.source, batch)
            images, ess = prior.source.decode(state), None
        else:
            with prior.disabled() if arm == "base prior" else nullcontext():
                images, (z,), (draw,) = prior.sample(len(batch), sampler)
            ess = draw.ess
        parts.append(
            Generation(images, z, z.new_full((len(z),), math.nan) if ess is None else ess)
        )
    return Generation(*map(torch.cat, zip(*parts, strict=True)))
