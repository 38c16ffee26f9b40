r"""Stages: another head on what the first one left, in one of two forms that are never mixed.

*Product*. With ℓ_s the log-ratio that stage s has learnt,

.. math::
    \log r = \sum_s \ell_s, \qquad \ell_s \approx \log \frac{q}{r_{<s} \, p / Z_{<s}},
    \qquad r_{<s} = \exp \sum_{t<s} \ell_t,

each contrasted with draws of r_{<s}·p itself, by tempered sequential Monte Carlo. The prior stays
one density, and sampling stays as it was: ``fit(prior, data, stages=3)``.

*Nested*. A stage contrasts q with what the sampler of the stage before really draws, and at sampling
time proposes from that sampler and weighs by its own ratio alone. It mends whatever that sampler
leaves, at few proposals too; its head evaluations multiply, and it has no log-density:

    second = NCPrior.for_source(nested(prior, partial(sir, num_proposals=20)), x)

References:
    | Telescoping Density-Ratio Estimation (Rhodes, Xu & Gutmann, 2020)
    | Adaptive Multi-stage Density Ratio Estimation for Learning Latent Space Energy-based Model
    | (Xiao & Han, NeurIPS 2022)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor

from ncprior.bases.empirical import Empirical
from ncprior.bases.rebase import Rebased, rebase
from ncprior.prior import NCPrior
from ncprior.samplers.base import Draw, Sampler
from ncprior.samplers.smc import tempered_smc
from ncprior.source import Group, LatentSource, device_of

_PARTICLES = 16  # per row, where rows have targets of their own

_POPULATION = 2048  # particles that share one target

_MOVES = 4  # per temperature: with fewer, particles stay close to their siblings

_SCATTER = 0.5  # nats


class Drawn:
    """A base whose draws are made by a sampler: it can be sampled, and has no density.

    Arguments:
        draw: Makes one draw per row.

    Attributes:
        log_mean_weights: Mean log Ẑ in nats of every draw so far, where the sampler tells it.
    """

    def __init__(self, draw: Callable[[], Draw]) -> None:
        self.draw = draw
        self.log_mean_weights: list[float] = []

    @torch.no_grad()
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws z, with shape ``(*sample_shape, B, *event)``."""
        draws = [self.draw() for _ in range(math.prod(sample_shape))]
        means = [d.log_mean_weight.mean() for d in draws if d.log_mean_weight is not None]
        self.log_mean_weights += torch.stack(means).tolist() if means else []
        z = torch.stack([draw.z for draw in draws])
        return z.reshape(*sample_shape, *z.shape[1:])


def nested(prior: NCPrior, sampler: Sampler) -> Rebased:
    """Makes a trained prior's draws the base of another: stages in nested form.

    Heads trained on it learn what this sampler leaves of the gap, and are saved alone: to load
    them, load the first prior and nest it again.

    Arguments:
        prior: The trained prior; it is used as it is whenever a draw is made.
        sampler: The sampler that its draws are made with, such as ``partial(sir,
            num_proposals=20)``. One draw of the next stage costs as many evaluations of these heads
            as the product of both numbers of proposals.

    Returns:
        A source: the same VAE with that prior. Samplers that need log p refuse it.

    Example:
        >>> from ncprior import sir
        >>> second = NCPrior.for_source(nested(prior, partial(sir, num_proposals=7)), x)
        >>> second.sample(4, partial(sir, num_proposals=7)).x.shape  # 49 evaluations and 7
        torch.Size([4, 3])
    """

    def base(k: int, group: Group) -> Drawn:
        return Drawn(lambda: Draw(prior.draw(k, group, sampler).z))

    return rebase(prior.source, base)


def reweighted(prior: NCPrior) -> Rebased:
    """Makes Π r·p itself a base, drawn from by tempered sequential Monte Carlo.

    Heads trained on it are multiplied in: stages in product form, which ``fit(stages=…)`` does.

    Arguments:
        prior: The prior so far, on a base with a density.

    Returns:
        A source whose groups' priors are r_k·p(z_k | z_<k). Rows of a group without a context
        share their particles.
    """

    def base(k: int, group: Group) -> Drawn:
        share = k == 0 and group.context is None
        particles = 1 if share else _PARTICLES
        smc = partial(
            tempered_smc, share_particles=share, num_particles=particles, num_moves=_MOVES
        )
        return Drawn(partial(prior.draw, k, group, smc))

    return rebase(prior.source, base)


@torch.no_grad()
def with_cached_proposals(
    source: LatentSource[Any, Any], count: int, seed: int
) -> tuple[Rebased, Rebased]:
    """Draws from a base once, for training to use again and again.

    Arguments:
        source: A source of one group, whose prior is the same for every row.
        count: The number of draws that are kept for training; a tenth more, and at least 2,048,
            are kept apart. Where draws come in populations, both have populations of their own.
        seed: Seed of the draws; the generators outside stay as they are.

    Returns:
        The source on the draws kept for training, and on those kept for held-out losses.

    Warns:
        UserWarning: If the base is drawn by tempered Monte Carlo whose estimates of log Z scatter
            so much that its draws are not to be trusted.
    """
    device = device_of(source)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        base = source.group(source.start(_POPULATION)).prior
        z, apart = (
            base.sample(Size((-(-n // _POPULATION),))).flatten(0, 1)[:n]
            for n in (count, max(_POPULATION, count // 10))
        )
    log_z = torch.tensor(base.log_mean_weights if isinstance(base, Drawn) else [])
    if len(log_z) > 1 and log_z.std() > _SCATTER:
        warnings.warn(
            f"The draws of the prior so far are not to be trusted: log Z scatters by "
            f"{log_z.std():.2f} nats between populations of {_POPULATION}. A closer base would help.",
            stacklevel=2,
        )
    return rebase(source, Empirical(z)), rebase(source, Empirical(apart))
