"""The three arms of the comparison: samples of the base prior, of NCP and of the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ncprior.bases.joint import JointSource
from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.source import LatentSource, num_rows, require_source, sample_posterior
from ncprior.utils.batches import take_rows
from ncprior.utils.random_state import seeded
from ncprior.utils.require import (
    numbers,
    require_callable,
    require_counts,
    require_flags,
    require_instance,
)

ARMS = ("base prior", "NCP", "posterior")

_BATCH = 1000  # images per batch


class Generation(NamedTuple):
    """One generation of samples of one arm.

    Attributes:
        x: Images, with shape ``(N, C, H, W)``.
        latents: One z_k per group, each with shape ``(N, *event)``.
        ess: Effective sample size of the proposals of every group, with shape ``(N, K)``; NaN
            without proposals.
    """

    x: Tensor
    latents: tuple[Tensor, ...]
    ess: Tensor


def draw_arms(
    prior: NCPrior,
    sampler: Sampler,
    x: Any,  # noqa: ANN401
    *,
    features: Callable[[Tensor], Tensor],
    num_samples: int,
    generations: int,
    base: LatentSource[Any, Any] | None = None,
    condition: Callable[[Any], Any] = lambda x: None,
    progress: bool = True,
) -> tuple[dict[str, list[Tensor]], dict[str, Generation]]:
    """Features of every generation of every arm, and the first generations themselves.

    The i-th generations of all arms have the same seed. The posterior arm takes training images in
    random order, several times if there are fewer images than samples.

    Arguments:
        prior: The prior.
        sampler: The sampler of NCP.
        x: Training data: images ``(N, C, H, W)``, or a tuple of images and their conditions.
        features: Maps images to features, ``(B, F)``.
        num_samples: Samples per generation.
        generations: R, the number of generations of each arm.
        base: The VAE with the prior of the base arm; by default the prior's source, with a fitted
            base if it has one.
        condition: Maps a batch of training data to the condition of the source; all arms have the
            same conditions.
        progress: Whether to show a progress bar.

    Returns:
        The features of every generation, and each arm's first generation, by the arm's name.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is below 1.

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
        >>> len(features["NCP"]), first["posterior"].latents[0].shape
        (2, torch.Size([20, 2]))
    """
    require_instance("prior", prior, NCPrior, "Pass an NCPrior: NCPrior(source, heads).")
    for name, function in (("sampler", sampler), ("features", features), ("condition", condition)):
        require_callable(name, function, "See the example in the docstring.")
    if base is not None:
        require_source(base)
    require_counts(num_samples=num_samples, generations=generations)
    require_flags(progress=progress)
    total = num_rows(x)
    require_counts(**{"The number of rows of x": total})
    old = _off(prior, prior.source if base is None else base)
    arms = {"base prior": old, "NCP": prior, "posterior": prior}
    kept: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    first: dict[str, Generation] = {}
    seeds = torch.randint(2**31, (generations,)).tolist()
    work = [(seed, arm) for seed in seeds for arm in ARMS]
    for seed, arm in tqdm(work, desc="samples", disable=not progress):
        with seeded(seed):
            passes = -(-num_samples // total)
            rows = torch.cat([torch.randperm(total) for _ in range(passes)])[:num_samples]
            batches = [take_rows(x, some) for some in rows.split(_BATCH)]
            generation = _generate(arms[arm], sampler, batches, arm, condition)
        kept[arm].append(in_batches(features, generation.x))
        first.setdefault(arm, generation)
    return kept, first


def _off(prior: NCPrior, source: LatentSource[Any, Any]) -> NCPrior:
    """The source's own prior; below a joint head, the VAE has the heads of its groups."""
    heads: nn.Module = prior.heads
    if isinstance(prior.source, JointSource) and not isinstance(source, JointSource):
        heads = prior.source.prior.heads
    old = NCPrior(source, heads)
    old.active = [False] * source.num_groups
    return old


@torch.no_grad()
def log_z(prior: NCPrior, num_draws: int) -> float:
    """Estimate of log Z = log E_p[r] in nats, for one group; 0 for an exact ratio."""
    require_instance("prior", prior, NCPrior, "Pass an NCPrior: NCPrior(source, heads).")
    require_counts(num_draws=num_draws)
    base = prior.source.group(prior.source.start(num_draws)).prior
    log_r = prior.log_ratio([base.sample()])[:, 0]
    return torch.logsumexp(log_r.double(), 0).item() - math.log(num_draws)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a function to rows in batches, and concatenates the results.

    Raises:
        TypeError: If x is no numbers, or the function no function or of no tensor.
        ValueError: If x has no rows, or NaN or infinity.

    Example:
        >>> in_batches(torch.exp, torch.zeros(2500, 1)).shape
        torch.Size([2500, 1])
    """
    require_callable("function", function, "Pass a function of a batch of rows.")
    remedy = "Return a tensor of one row per row."
    results = [function(batch) for batch in numbers("x", x).split(_BATCH)]
    return torch.cat([require_instance("function(x)", y, Tensor, remedy) for y in results])


@torch.no_grad()
def _generate(
    prior: NCPrior,
    sampler: Sampler,
    batches: list[Any],
    arm: str,
    condition: Callable[[Any], Any],
) -> Generation:
    """Draws one sample for each row of data."""
    images, latents, ess = [], [], []
    for batch in batches:
        if arm == "posterior":
            drawn, state = sample_posterior(prior.source, batch)
            images.append(prior.source.decode(state))
            sizes: list[Tensor | None] = [None] * len(drawn)
        else:
            sample = prior.sample(num_rows(batch), sampler, condition=condition(batch))
            images.append(sample.x)
            drawn, sizes = sample.latents, [draw.ess for draw in sample.draws]
        latents.append(drawn)
        nan = images[-1].new_full((len(images[-1]),), math.nan)
        ess.append(torch.stack([nan if size is None else size for size in sizes], dim=1))
    groups = zip(*latents, strict=True)
    return Generation(torch.cat(images), tuple(map(torch.cat, groups)), torch.cat(ess))
