r"""Stages: further heads, trained on the remaining gap, in one of two forms that are never mixed.

*Product*. With ℓ_s the log-ratio learnt by stage s,

.. math::
    \log r = \sum_s \ell_s, \qquad \ell_s \approx \log \frac{q}{r_{<s} \, p / Z_{<s}},
    \qquad r_{<s} = \exp \sum_{t<s} \ell_t,

where each stage is contrasted with draws of :math:`r_{<s} \, p` by tempered sequential Monte
Carlo. The prior is still one density, and is sampled as before: ``fit(prior, data, stages=3)``.

*Nested*. A stage contrasts q with the draws of the previous stage's sampler. At sampling time, it
proposes from that sampler and weighs by its own ratio alone. It closes the remaining gap of the
sampler, also at few proposals; but head evaluations multiply, and there is no log-density::

    second = NCPrior.for_source(nested(prior, partial(sir, num_proposals=20)), x)

References:
    | Telescoping Density-Ratio Estimation (Rhodes, Xu & Gutmann, 2020)
    | Adaptive Multi-stage Density Ratio Estimation for Learning Latent Space Energy-based Model
    | (Xiao & Han, NeurIPS 2022)
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor

from ncprior.bases.drawn import Drawn
from ncprior.bases.empirical import Empirical
from ncprior.bases.rebase import Rebased, rebase
from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.samplers.smc import tempered_smc
from ncprior.saving.identity import prior_facts
from ncprior.source import Group, LatentSource
from ncprior.utils.random_state import seeded
from ncprior.utils.require import require_callable, require_instance

_PARTICLES = 16  # per row, if every row has its own target

_POPULATION = 2048  # particles that share one target

_MOVES = 4  # per temperature: with fewer, particles stay close to their siblings

_SCATTER = 0.5  # largest standard deviation of log Z between populations, in nats


def nested(prior: NCPrior, sampler: Sampler) -> Rebased:
    """Returns a source whose base prior is sampled by a trained prior: stages in nested form.

    Heads trained on this source learn the remaining gap of the sampler. They are saved without the
    first prior: to load them, load the first prior and nest it again.

    Arguments:
        prior: The trained prior, in its state at the time of each draw.
        sampler: The sampler of its draws, such as ``partial(sir, num_proposals=20)``. For one draw
            of the next stage, the heads of the trained prior are evaluated as often as the product
            of both samplers' numbers of proposals.

    Returns:
        A source: the same VAE with that base. Samplers that need log p raise ``TypeError`` on it.

    Example:
        >>> from ncprior import sir
        >>> second = NCPrior.for_source(nested(prior, partial(sir, num_proposals=7)), x)
        >>> second.sample(4, partial(sir, num_proposals=7)).x.shape  # 49 evaluations and 7
        torch.Size([4, 3])
    """

    require_instance("prior", prior, NCPrior, "Pass a trained NCPrior.")
    require_callable("sampler", sampler, "Pass one such as partial(sir, num_proposals=20).")
    return rebase(prior.source, _Nested(prior, sampler))


class _Nested:
    """The base of nested stages: draws of a trained prior by a sampler."""

    def __init__(self, prior: NCPrior, sampler: Sampler) -> None:
        self.prior, self.sampler = prior, sampler

    def __call__(self, k: int, group: Group) -> Drawn:
        return Drawn(lambda: (self.prior.draw(k, group, self.sampler).z, None))

    def facts(self) -> dict[str, Any]:
        return {"nested": prior_facts(self.prior, self.sampler)}


def reweighted(prior: NCPrior, source: LatentSource[Any, Any] | None = None) -> Rebased:
    """Returns a source whose base is Π r·p, drawn by tempered sequential Monte Carlo.

    Heads trained on it are multiplied in: stages in product form, as ``fit(stages=…)`` does.

    Arguments:
        prior: The prior so far, on a base with a density.
        source: The source of the posterior; ``None`` takes that of the prior.

    Returns:
        The source with another base, whose groups' priors are r_k·p(z_k | z_<k). Rows of a group without a context
        share their particles.
    """

    def base(k: int, group: Group) -> Drawn:
        share = k == 0 and group.context is None
        particles = 1 if share else _PARTICLES
        smc = partial(
            tempered_smc, share_particles=share, num_particles=particles, num_moves=_MOVES
        )

        def draw() -> tuple[Tensor, Tensor | None]:
            found = prior.draw(k, group, smc)
            return found.z, found.log_mean_weight

        return Drawn(draw)

    return rebase(prior.source if source is None else source, base)


def cache_size(num_rows: int | None, per_row: int, limits: tuple[int, int]) -> int:
    """Number of draws of a base to make once and reuse, in proportion to the rows of data.

    Arguments:
        num_rows: Rows of the training data, or ``None`` if unknown, which gives the most draws.
        per_row: Draws per row.
        limits: Fewest and most draws.

    Example:
        >>> [cache_size(n, 10, (5000, 50_000)) for n in (100, 2000, None)]
        [5000, 20000, 50000]
    """
    fewest, most = limits
    return most if num_rows is None else min(most, max(fewest, per_row * num_rows))


@torch.no_grad()
def with_cached_proposals(
    source: LatentSource[Any, Any], count: int, seed: int
) -> tuple[Rebased, Rebased]:
    """Samples a base once, and returns sources whose bases are these draws.

    Arguments:
        source: A source of one group, whose prior is the same for every row.
        count: Number of draws for training. Another tenth, and at least 2,048, are drawn for
            held-out losses, from populations of their own where draws come in populations.
        seed: Seed of the draws; the generators outside stay as they are.

    Returns:
        The source with the draws for training, and with those for held-out losses.

    Warns:
        UserWarning: If the base is drawn by tempered Monte Carlo and its estimates of log Z differ
            by more than 0.5 nats (standard deviation), so that its draws are unreliable. Use a
            base closer to the aggregate posterior.
    """
    with seeded(seed):
        base = source.group(source.start(_POPULATION)).prior
        z, apart = (
            base.sample(Size((-(-n // _POPULATION),))).flatten(0, 1)[:n]
            for n in (count, max(_POPULATION, count // 10))
        )
    found = base.log_mean_weights if isinstance(base, Drawn) else []
    log_z = torch.stack(found) if found else torch.empty(0)
    if len(log_z) > 1 and log_z.std() > _SCATTER:
        warnings.warn(
            f"The draws of the prior so far are unreliable: log Z has a standard deviation of "
            f"{log_z.std():.2f} nats between populations of {_POPULATION}. Fit a closer base.",
            stacklevel=2,
        )
    return rebase(source, Stored(z)), rebase(source, Stored(apart))


class Stored(Empirical):
    """Some draws of a base, in its place."""
