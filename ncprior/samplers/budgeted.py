"""Budgeted rejection sampling: the best acceptance of proposals for a given number of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ncprior.distributions import Sampleable
from ncprior.samplers.base import Draw, LogRatio, checked
from ncprior.samplers.sir import Pool, stream
from ncprior.utils.require import require_counts, require_flags


@torch.no_grad()
def budgeted_rejection(
    prior: Sampleable,
    log_ratio: LogRatio,
    *,
    num_proposals: int,
    chunk_size: int | None = None,
    share_proposals: bool = False,
) -> Draw:
    r"""Budgeted rejection sampling: M proposals of p per draw, accepted with probability min(1, β r).

    Among all rules that accept one of M proposals on average, the rule

    .. math::
        a(z) = \min(1, \beta r(z)), \qquad E_p \, a(z) = 1 / M,

    gives accepted draws p·a·M the least f-divergence from r·p / Z, for every f. SIR is such a rule,
    too, at the same cost. This one is exact as soon as 1 / β bounds r, while SIR has an error of the
    order of 1/M.

    β need not be known. With e ~ Exp(1), a proposal is accepted if log r + e ≥ -log β. With
    ``share_proposals``, the B·M proposals of a batch are one pool, and the B with the largest keys log r + e
    are accepted: β is the one that accepts B of them. Without it, the largest of M keys is accepted in
    each row by itself, and β differs from row to row. Between Gaussians, these draws are closer to
    r·p / Z than those of SIR, but not as close as with a pool.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(*, B, *event)``, to log r(z) in nats, ``(*, B)``. It
            must not keep a reference to z, which may be overwritten after the call.
        num_proposals: M, the number of proposals per row.
        chunk_size: Largest number of latents (proposals × rows) per call of ``log_ratio``; at least
            one proposal per row is always given. ``None``: 4,096 on a CPU, more on an accelerator.
        share_proposals: Whether the rows of a batch share a pool of B·M proposals. p and log r must
            be the same for every row, as in the first group of a VAE without conditions. The draws of
            a batch are all different.

    Returns:
        A draw with ``z``, ``ess`` and ``log_mean_weight``, as of :func:`ncprior.sir`. Those of a pool
        are the same for all rows, and its ESS is divided by B.

    Raises:
        TypeError: If an argument has the wrong type, or draws or log r are not real numbers.
        ValueError: If ``num_proposals`` or ``chunk_size`` is below 1, the prior or log r has the
            wrong shape, or rows differ and cannot share proposals.
        FloatingPointError: If log r is not finite.

    References:
        | Optimal Budgeted Rejection Sampling for Generative Models (Verine et al., AISTATS 2024)
        | https://arxiv.org/abs/2311.00460

    Example:
        >>> prior = Normal(torch.zeros(1000), 1.0)
        >>> draw = budgeted_rejection(prior, lambda z: 0.5 * z, num_proposals=20)  # N(0.5, 1)
        >>> round(draw.z.mean().item(), 1)
        0.5
    """
    require_counts(num_proposals=num_proposals)
    require_counts("[1, inf) or None", chunk_size=chunk_size)
    require_flags(share_proposals=share_proposals)

    def make(count: int, rows: int) -> Pool:
        return _Shared(count, rows) if share_proposals and rows else _Own(count, rows, share=False)

    return stream(prior, log_ratio, make, num_proposals, chunk_size, share=share_proposals)


class _Own(Pool):
    """Running maximum of log r + Exp(1) over the proposals of each row."""

    def keys(self, log_r: Tensor) -> Tensor:
        """Keys of proposals, with shape (n, B)."""
        return log_r + torch.empty_like(log_r).exponential_()


class _Shared(Pool):
    """The B proposals of the largest log r + Exp(1) so far, out of B·M."""

    def __init__(self, num_proposals: int, rows: int) -> None:
        super().__init__(num_proposals * rows, rows, share=True)

    def add(self, z: Tensor, log_r: Tensor) -> None:
        """Adds proposals (n, B, *event) with their log r, (n, B)."""
        log_r = checked(log_r, z.shape[:2]).flatten()
        z, key = z.flatten(0, 1), log_r + torch.empty_like(log_r).exponential_()
        if self.seen:
            z, key = torch.cat([self.z, z]), torch.cat([self.key, key])
        self.key, first = key.topk(self.rows)
        self.z = z[first]
        self.weigh(log_r[:, None])

    def draw(self) -> Draw:
        """Returns the accepted proposals in random order, with the statistics of the pool."""
        drawn = super().draw()
        order = torch.randperm(self.rows, device=self.z.device)
        ess = None if drawn.ess is None else drawn.ess / self.rows
        return drawn._replace(z=self.z[order], ess=ess)
