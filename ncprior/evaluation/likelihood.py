r"""Two-sided estimates of log p(x) of a frozen VAE with its base prior, SIR(M) or NCP, in nats.

Each of the three models is measured by importance sampling with the same z^s ~ q(z|x), s ≤ S:

.. math::
    w_s = p(x|z^s) \prod_k \frac{p(z_k^s | z_{<k}^s)}{q(z_k^s | z_{<k}^s, x)} \, g_k(z_k^s),
    \qquad E \, w_s = p(x).

* base: g = 1.
* SIR(M), the distribution of draws of SIR with M proposals: g is unbiased for p_SIR/p,

  .. math::
      \frac{r(z_k)}{\frac{1}{M} \big( r(z_k) + \sum_{j<M} r(z^j) \big)},
      \qquad z^j \sim p(\cdot | z_{<k}),

  averaged over L pools of fresh z^j inside the logarithm, which gives a bound for every L.
* NCP, the limit M → ∞: g = r, and one global log Z (:func:`ncprior.evaluation.log_normaliser`) is
  subtracted.

SIR(M) is normalised group by group, NCP globally: they are different models.

A lower bound, an estimate and an upper estimate of log p(x) follow from the w_s
(:func:`ncprior.evaluation.bounds`).

References:
    | Importance Weighted Autoencoders (Burda et al., ICLR 2016)
    | Energy-Inspired Models: Learning with Sampler-Induced Distributions (Lawson et al., 2019)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Size, Tensor
from torch.distributions import Distribution

from ncprior.data.batches import one_pass
from ncprior.data.checked import checked_batches, log_prob_of_data
from ncprior.data.tiled import TiledEncodings
from ncprior.distributions import is_point
from ncprior.evaluation.bounds import BLOCKS, bounds
from ncprior.evaluation.estimates import Likelihood
from ncprior.evaluation.normaliser import LogZ
from ncprior.heads.checks import naming_parts
from ncprior.heads.fast import prepare_input_head
from ncprior.prior import NCPrior
from ncprior.samplers.base import LogRatio
from ncprior.samplers.proposals import is_same_density
from ncprior.source import (
    Group,
    LatentSource,
    device_of,
    num_rows,
    posterior_of,
    require_source,
    visit,
)
from ncprior.training.particles import ess_of
from ncprior.utils.batches import tile_rows
from ncprior.utils.draws import drawn, sample_and_log_prob
from ncprior.utils.precision import in_float64
from ncprior.utils.require import require_counts, require_flags, require_instance
from ncprior.utils.visible import require_eval


@torch.no_grad()
def log_likelihood(
    prior: NCPrior | LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    *,
    num_samples: int,
    num_proposals: int | None = None,
    num_pools: int = 1,
    share_pools: bool = False,
    log_z: LogZ | None = None,
    batch_size: int = 50,
    chunk_size: int = 4096,
    progress: bool = False,
) -> dict[str, Likelihood]:
    """Two-sided estimates of log p(x) under the base and, on request, SIR(M) and NCP.

    Arguments:
        prior: The prior; or a source, for which only the base is measured. The source needs
            ``likelihood``, and densities of its priors and posteriors.
        data: Held-out x: a tensor or map-style dataset, a ``DataLoader``, or a list of batches. If
            a batch is a tuple such as (image, label) or a mapping, p(x | z) is evaluated at its
            first item.
        num_samples: S, the draws of z per row. If S is below 8, only lower bounds are estimated.
        num_proposals: M of SIR(M); ``None`` leaves SIR(M) out.
        num_pools: L, the pools of M - 1 proposals per draw and group.
        share_pools: Whether all z of a chunk share their pools: M - 1 evaluations of a head per
            chunk instead of per z. The estimate is unbiased for each x, but the errors of all x
            are correlated and fall only with the number of chunks. Only for groups without
            context, whose p(z) is the same for all rows.
        log_z: Result of :func:`ncprior.evaluation.log_normaliser`; ``None`` leaves NCP out.
        batch_size: Rows per batch, where batches are made here.
        chunk_size: Largest number of z in memory, and of latents given to a head at once.
        progress: Whether to show a progress bar.

    Returns:
        The estimates by model: ``"base"`` and, on request, ``"sir"`` and ``"ncp"``. All use the
        same draws of z, so that differences are paired.

    Raises:
        ValueError: If the source has no method ``likelihood``, a number is out of range, the data
            has no rows or NaN, the VAE is in training mode, or ``share_pools`` is set and p(z) of
            a group differs between rows.
        TypeError: If a prior or a posterior has no density, the data can be read only once, or an argument has
            the wrong type.
        FloatingPointError: If a weight is NaN or infinite.

    References:
        Burda et al. (2016), equation 8; Lawson et al. (2019), equation 5.

    Example:
        >>> found = log_likelihood(prior, x, num_samples=8, num_proposals=5)
        >>> torch.equal(found["base"].lower, found["sir"].lower)  # a new head: r = 1
        True
    """
    require_counts(
        num_samples=num_samples, num_pools=num_pools, batch_size=batch_size, chunk_size=chunk_size
    )
    require_counts("[1, inf) or None", num_proposals=num_proposals)
    require_flags(share_pools=share_pools, progress=progress)
    num_samples, num_pools, chunk_size = int(num_samples), int(num_pools), int(chunk_size)
    num_proposals = None if num_proposals is None else int(num_proposals)
    if log_z is not None:
        require_instance("log_z", log_z, LogZ, "Pass a result of log_normaliser, or None.")
    heads = prior if isinstance(prior, NCPrior) else None
    source = prior.source if isinstance(prior, NCPrior) else prior
    if heads is None and (num_proposals is not None or log_z is not None):
        raise ValueError(
            "num_proposals and log_z need ratio heads; got a source. Pass an NCPrior instead."
        )
    require_source(source)
    require_eval(source, source.module)
    pools = (num_proposals, num_pools, share_pools)
    device = device_of(source)
    sums_on = torch.device("cpu") if device.type == "mps" else device
    log_weights = _Weights(source, heads, *pools, chunk_size, sums_on)
    batches = tqdm(one_pass(data, batch_size), desc="log p(x)", disable=not progress)
    columns: list[list[Tensor]] = [[], [], []]
    with naming_parts(source, None if heads is None else heads.heads):
        for batch in checked_batches(batches, device):
            for column, log_w in zip(columns, log_weights(batch, num_samples), strict=True):
                column.append(torch.stack([*bounds(log_w), ess_of(log_w.mT)]))
    base, sir, ncp = (torch.cat(column, 1) for column in columns)
    made = partial(_likelihood, num_samples=num_samples)
    found = {"base": made("base", "local", base)}
    if num_proposals is not None:
        found["sir"] = made(f"SIR({num_proposals})", "local", sir, num_pools=num_pools)
    if log_z is not None:
        constants = (log_z.upper, 0.5 * (log_z.lower + log_z.upper), log_z.lower, 0.0)
        ncp = ncp - ncp.new_tensor(constants)[:, None]  # the upper end from the lower bound
        found["ncp"] = made("NCP", "global", ncp, log_z=log_z)
    return found


def _likelihood(
    model: str,
    normalisation: str,
    found: Tensor,
    *,
    num_pools: int = 0,
    **numbers: Any,  # noqa: ANN401
) -> Likelihood:
    lower, estimate, upper, ess = found
    return Likelihood(
        model, normalisation, lower, estimate, upper, ess, num_pools=num_pools, **numbers
    )


@dataclass(frozen=True)
class _Weights:
    """Importance weights of z ~ q(z | x) under the base, SIR(M) and NCP without its log Z."""

    source: LatentSource[Any, Any]
    prior: NCPrior | None
    num_proposals: int | None
    num_pools: int
    share_pools: bool
    chunk_size: int
    device: torch.device  # of the sums, which are in float64

    def __call__(self, x: Any, num_samples: int) -> Tensor:  # noqa: ANN401
        """Returns log w of one batch, with shape ``(3, S, B)``, in float64."""
        encodings = TiledEncodings(self.source, x)
        rows = encodings.rows
        at_once, chunks = max(1, self.chunk_size // rows), []
        for block in torch.arange(num_samples).tensor_split(BLOCKS):  # blocks share no pools
            for some in filter(len, block.split(at_once)):
                log_w = self._walk(encodings.tiled(len(some)), tile_rows(x, len(some)))
                chunks.append(log_w.reshape(3, len(some), rows))
        log_w = torch.cat(chunks, dim=1).cpu()
        if not (log_w < math.inf).all():  # NaN is not
            raise FloatingPointError(
                "log p(x, z) - log q(z | x) or log r is NaN or infinite for some rows. Look for NaN or "
                "infinity in the VAE, its likelihood or the heads, and for q(z | x) of scale 0."
            )
        return log_w

    def _walk(self, encoding: Any, x: Any) -> Tensor:  # noqa: ANN401
        log_w = torch.zeros(3, num_rows(encoding), dtype=torch.float64, device=self.device)

        def weigh(k: int, group: Group) -> Tensor:
            if not isinstance(group.prior, Distribution):
                raise TypeError(
                    f"The likelihood needs log p(z); the prior {type(group.prior).__name__} of "
                    f"group {k} can only be sampled."
                )
            z, log_q = sample_and_log_prob(_with_density(k, posterior_of(group)))
            log_w.add_(in_float64(group.prior.log_prob(z) - log_q))
            if self.prior is not None and self.prior.is_on(k):
                self._require_shareable(k, group, group.prior.log_prob, z)
                own = in_float64(self.prior.strength * self.prior.log_r(k, z, group.context))
                log_w[2] += own
                if self.num_proposals is not None:
                    log_r = _log_ratio(self.prior, k, group.context)
                    log_w[1] += self._sir(group, log_r, own, self.num_proposals)
            return z

        _, state = visit(self.source, self.source.start(num_rows(encoding), encoding), weigh)
        return log_w + in_float64(
            log_prob_of_data(self.source.likelihood(state), self.source.observed(x))
        )

    def _require_shareable(self, k: int, group: Group, log_p: LogRatio, z: Tensor) -> None:
        if not self.share_pools or self.num_proposals is None:
            return
        if group.context is not None:
            reason = "has a context, on which its proposals may depend"
        elif not is_same_density(log_p, z[None]):
            reason = "has a prior that differs between rows"
        else:
            return
        raise ValueError(
            f"Group {k} {reason}: they cannot share proposals. Pass share_pools=False."
        )

    def _sir(self, group: Group, log_r: LogRatio, own: Tensor, m: int) -> Tensor:
        """Logarithm of an unbiased estimate of p_SIR / p at z with log-ratio ``own``, (B,)."""
        estimates = []
        for _ in range(self.num_pools):
            total = own
            for z in self._pool(group, len(own), m - 1):
                total = torch.logaddexp(total, log_r(z).logsumexp(0))
            estimates.append(own - total + math.log(m))
        return torch.stack(estimates).logsumexp(0) - math.log(self.num_pools)

    def _pool(self, group: Group, rows: int, count: int) -> Iterator[Tensor]:
        """Yields proposals in chunks of shape (*, B, *event), or (*, 1, *event) if shared."""
        if self.share_pools:
            z = drawn(group.prior, Size((-(-count // rows),))).flatten(0, 1)
            yield from z[:count, None].split(self.chunk_size)
            return
        at_once = max(1, self.chunk_size // rows)
        for first in range(0, count, at_once):
            yield drawn(group.prior, Size((min(at_once, count - first),)))


def _with_density(k: int, posterior: Distribution) -> Distribution:
    if is_point(posterior):
        raise TypeError(
            f"The likelihood needs log q(z | x); the posterior of group {k} is a point without a "
            f"density. Give the encoder noise, or pass PointMass(z, log_q)."
        )
    return posterior


def _log_ratio(prior: NCPrior, k: int, context: Tensor | None) -> LogRatio:
    """α log r_k(·, c) in nats, in float64, for many z of one context."""
    log_r = prepare_input_head(prior.source, k, prior.heads[k], context)
    return lambda z: in_float64(prior.strength * log_r(z))
