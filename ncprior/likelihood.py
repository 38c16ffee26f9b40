r"""Lower bounds on log p(x) of a frozen VAE, with its base prior and with NCP, in nats.

For the base prior, the importance-weighted bound with z^s ~ q(z|x):

.. math::
    \log p(x) \ge \log \frac{1}{S} \sum_s p(x|z^s) \prod_k
    \frac{p(z_k^s | z_{<k}^s)}{q(z_k^s | z_{<k}^s, x)}

For SIR(M), the law that SIR with M proposals draws from, each group's density

.. math::
    p_{SIR}(z_k | z_{<k}) = E\!\left[ \frac{p(z_k|z_{<k}) \, r(z_k)}
    {\frac{1}{M}\big(r(z_k) + \sum_{j<M} r(z^j)\big)} \right], \qquad z^j \sim p(\cdot|z_{<k}),

takes the place of p. Pools of z^j are drawn afresh for every group and draw, and averaged inside
the logarithm: the product is unbiased, and the bound a bound, for any number L of pools. SIR(M) is
a model of its own; NCP is its limit.

References:
    | Importance Weighted Autoencoders (Burda et al., ICLR 2016)
    | Energy-Inspired Models: Learning with Sampler-Induced Distributions (Lawson et al., 2019)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_map_only

from ncprior.prior import NCPrior
from ncprior.source import Group, LatentSource, num_rows, posterior_of

__all__ = ["Bounds", "iwae", "sir_iwae"]


class Bounds(NamedTuple):
    """Lower bounds on log p(x) of two priors, from the same draws of z.

    Attributes:
        base: With the base prior, in nats, with shape ``(B,)``.
        sir: With SIR(M), in nats, with shape ``(B,)``.

    Example:
        >>> bounds = Bounds(torch.tensor([-90.0]), torch.tensor([-88.0]))
        >>> (bounds.sir - bounds.base).item()
        2.0
    """

    base: Tensor
    sir: Tensor


def iwae(
    source: LatentSource[Any, Any],
    x: Any,  # noqa: ANN401
    *,
    num_samples: int,
    chunk_size: int = 1024,
) -> Tensor:
    """Returns the importance-weighted lower bound on log p(x) with the source's own prior.

    Arguments:
        source: The VAE; it needs ``likelihood``, and densities of prior and posterior.
        x: One batch, as the user's loader yields it; the likelihood must know the first item.
        num_samples: S, the number of draws of z per row.
        chunk_size: Most draws held at once.

    Returns:
        The bound in nats, with shape ``(B,)``.

    Raises:
        ValueError: If the source does not know p(x | z).
        TypeError: If a prior has no density.

    References:
        Burda et al. (2016), equation 8.

    Example:
        >>> iwae(source, x, num_samples=10).shape
        torch.Size([4])
    """
    return _bounds(source, None, x, num_samples, 1, 1, chunk_size).base


def sir_iwae(
    prior: NCPrior,
    x: Any,  # noqa: ANN401
    *,
    num_samples: int,
    num_proposals: int,
    num_pools: int = 1,
    chunk_size: int = 1024,
) -> Bounds:
    """Returns lower bounds on log p(x) with the base prior and with SIR(M), from the same draws.

    Arguments:
        prior: The prior.
        x: One batch, as the user's loader yields it.
        num_samples: S, the number of draws of z per row.
        num_proposals: M.
        num_pools: L, the number of pools of M - 1 proposals per draw and group.
        chunk_size: Most latents given to a head at once.

    Returns:
        Both bounds in nats; the gain of NCP is their difference, paired.

    Raises:
        ValueError: If the source does not know p(x | z), or a number is below 1.

    Example:
        >>> bounds = sir_iwae(prior, x, num_samples=10, num_proposals=5)
        >>> torch.equal(bounds.base, bounds.sir)  # a new head: r = 1
        True
    """
    if min(num_samples, num_proposals, num_pools) < 1:
        raise ValueError(
            f"num_samples, num_proposals and num_pools must be at least 1; got {num_samples}, "
            f"{num_proposals} and {num_pools}."
        )
    return _bounds(prior.source, prior, x, num_samples, num_proposals, num_pools, chunk_size)


@torch.no_grad()
def _bounds(
    source: LatentSource[Any, Any],
    prior: NCPrior | None,
    x: Any,  # noqa: ANN401
    num_samples: int,
    num_proposals: int,
    num_pools: int,
    chunk_size: int,
) -> Bounds:
    if not hasattr(source, "likelihood"):
        raise ValueError(
            f"{type(source).__name__} does not know p(x | z): it has no method `likelihood`."
        )
    encoding = source.encode(x)
    rows = num_rows(encoding)
    at_once = max(1, chunk_size // rows)
    weights = []
    for first in range(0, num_samples, at_once):
        count = min(at_once, num_samples - first)
        tiled, images = _tile(encoding, count), _tile(x, count)
        state = source.start(count * rows, tiled)
        log_w = log_gain = torch.zeros(count * rows, dtype=torch.float64)
        for k in range(source.num_groups):
            group = source.group(state)
            q, p = posterior_of(group), group.prior
            if not isinstance(p, Distribution):
                raise TypeError(
                    f"The likelihood needs log p(z); the prior {type(p).__name__} of group {k} "
                    f"can only be sampled."
                )
            z, log_q = _sample_and_log_prob(q)
            log_w = log_w + _wide(p.log_prob(z) - log_q)
            if prior is not None and prior.is_on(k):
                log_gain = log_gain + _sir_gain(
                    prior, k, group, z, num_proposals, num_pools, chunk_size
                )
            state = source.advance(state, z)
        pixels = images[0] if isinstance(images, tuple | list) else images
        log_w = log_w + _wide(source.likelihood(state).log_prob(pixels))
        weights.append(torch.stack([log_w, log_w + log_gain]).reshape(2, count, rows))
    base, sir = torch.cat(weights, dim=1).logsumexp(1) - math.log(num_samples)
    return Bounds(base, sir)


def _sir_gain(
    prior: NCPrior, k: int, group: Group, z: Tensor, m: int, num_pools: int, chunk_size: int
) -> Tensor:
    """An unbiased estimate of p_SIR / p at z, as its logarithm in nats, ``(B,)``."""

    def log_r(z: Tensor) -> Tensor:
        return _wide(prior.strength * prior.log_r(k, z, group.context))

    own, at_once = log_r(z[None])[0], max(1, chunk_size // len(z))
    estimates = []
    for _ in range(num_pools):
        total = own
        for first in range(0, m - 1, at_once):
            others = group.prior.sample(torch.Size((min(at_once, m - 1 - first),)))
            total = torch.logaddexp(total, log_r(others).logsumexp(0))
        estimates.append(own - total + math.log(m))
    return torch.stack(estimates).logsumexp(0) - math.log(num_pools)


def _sample_and_log_prob(q: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Draws z and its density; a flowed posterior may know it at its own draws alone."""
    if hasattr(q, "sample_and_log_prob"):
        z, log_q = q.sample_and_log_prob()
        return z, log_q
    z = q.sample()
    return z, q.log_prob(z)


def _tile(tree: Any, count: int) -> Any:  # noqa: ANN401
    return tree_map_only(Tensor, lambda t: t.repeat(count, *(1,) * (t.ndim - 1)), tree)


def _wide(log_p: Tensor) -> Tensor:
    return log_p.to("cpu", torch.float64)
