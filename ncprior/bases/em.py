r"""Expectation-maximisation (EM) of Gaussian mixtures, as matrix products.

A Gaussian is an exponential family. Its log-density is linear in the statistics t(z) = (z zᵀ, z, 1),

.. math::
    \log \pi_j N(z; \mu_j, \Sigma_j) = \theta_j \cdot t(z),

so that the E-step is one matrix product of all θ_j with all t(z), and the M-step one product of
the responsibilities with all t(z). Where the statistics of many latents are more than memory should
hold, both steps take one component at a time instead, with products in float32.

The covariances are shrunk by a prior of ν rows: component j of n_j rows with covariance S_j gets

.. math::
    \Sigma_j = \frac{n_j S_j + \nu T}{n_j + \nu}, \qquad
    T = \frac{N W + \nu \, \mathrm{diag}(W)}{N + \nu}, \qquad W = \sum_j \frac{n_j}{N} S_j.

Components of many rows keep their own shape; those of few rows take the mean shape of all.

References:
    | Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster et al., 1977)
    | Bayesian Regularization for Normal Mixture Estimation (Fraley & Raftery, 2007)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 2**20  # numbers of a block of rows: 8 MiB in float64

_KEPT = 2**24  # statistics that are kept between steps: 128 MiB


class Components(NamedTuple):
    """Parameters of a mixture in float64.

    Attributes:
        log_weight: log π, with shape ``(K,)``.
        loc: Means, with shape ``(K, D)``.
        scale: Lower Cholesky factors, ``(K, D, D)``, or standard deviations, ``(K, D)``.
    """

    log_weight: Tensor
    loc: Tensor
    scale: Tensor


class Rows:
    """Latents for EM, with their statistics.

    Arguments:
        z: Flat latents, with shape ``(N, D)``.
        is_full: Whether covariances are full.
    """

    def __init__(self, z: Tensor, *, is_full: bool) -> None:
        d, n = z.shape[1], len(z)
        self.pairs = torch.tril_indices(d, d, device=z.device) if is_full else None
        num_statistics = d + 1 + (d if self.pairs is None else self.pairs.shape[1])
        self.num_latents, self.num_rows = d, n
        self.is_kept = num_statistics * n <= _KEPT
        self.is_wide = is_full and not self.is_kept
        z = z.mT.contiguous()  # statistics are products of rows of (D, N)
        blocks = z.split(max(1, _BLOCK // (d if self.is_wide else num_statistics)), dim=1)
        self.blocks = tuple(map(self._statistics, blocks)) if self.is_kept else blocks

    def __len__(self) -> int:
        return self.num_rows

    def _statistics(self, z: Tensor) -> Tensor:
        """t(z) of a block of rows, with shape ``(S, n)``."""
        z = z.double()
        square = z.square() if self.pairs is None else z[self.pairs[0]].mul_(z[self.pairs[1]])
        return torch.cat([square, z, torch.ones_like(z[:1])])

    def log_prob(self, mixture: Components) -> Tensor:
        """Returns log p(z) in nats, with shape ``(N,)``."""
        return torch.cat([joint.logsumexp(0) for joint in self._log_joint(mixture)])

    def sums(self, mixture: Components) -> tuple[Tensor, float]:
        """The E-step: sums of p(j | z) t(z), with shape ``(K, S)``, and the mean log p(z)."""
        total, sums = mixture.loc.new_zeros(()), mixture.loc.new_zeros(())
        for block, log_joint in zip(self.blocks, self._log_joint(mixture), strict=True):
            most = log_joint.amax(0)
            joint = log_joint.sub_(most).exp_()
            p = joint.sum(0)
            total += (most + p.log()).sum()
            sums = sums + self._weighted(joint.div_(p), block)
        return sums, total.item() / len(self)

    def hard_sums(self, labels: Tensor, k: int) -> Tensor:
        """Returns the sums of t(z) over the rows of each of k labels, with shape ``(K, S)``."""
        hot = torch.nn.functional.one_hot(labels, k).mT.double()
        parts = hot.split([block.shape[1] for block in self.blocks], dim=1)
        pairs = zip(parts, self.blocks, strict=True)
        return torch.stack([self._weighted(part, block) for part, block in pairs]).sum(0)

    def _weighted(self, weight: Tensor, block: Tensor) -> Tensor:
        """Sums of t(z) over a block, for weights ``(K, n)``, with shape ``(K, S)``."""
        if not self.is_wide:
            return weight @ (block if self.is_kept else self._statistics(block)).mT
        i, j = torch.tril_indices(len(block), len(block), device=block.device)
        weight, block = weight.float(), block.float()
        square = torch.stack([((w * block) @ block.mT)[i, j] for w in weight])
        return torch.cat([square, weight @ block.mT, weight.sum(1, keepdim=True)], 1).double()

    def _log_joint(self, mixture: Components) -> Iterator[Tensor]:
        """Yields log π_j N(z; μ_j, Σ_j) in nats for every block, with shape ``(K, n)``."""
        if not self.is_wide:
            theta = self._natural(mixture)
            for block in self.blocks:
                yield theta @ (block if self.is_kept else self._statistics(block))
            return
        log_weight, loc, scale = mixture
        eye = torch.eye(loc.shape[1], dtype=loc.dtype, device=loc.device).expand_as(scale)
        white = torch.linalg.solve_triangular(scale, eye, upper=False).float()
        log_det = scale.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = log_weight - log_det - 0.5 * loc.shape[1] * math.log(2 * math.pi)
        for z in self.blocks:
            parts = zip(white, loc.float(), strict=True)
            square = torch.stack(
                [(w @ (z.float() - m[:, None])).square().sum(0) for w, m in parts]
            )
            yield constant[:, None] - 0.5 * square.double()

    def maximise(self, sums: Tensor, prior_rows: float, regularisation: float) -> Components:
        """The M-step.

        Arguments:
            sums: Sums of p(j | z) t(z), with shape ``(K, S)``.
            prior_rows: ν, the rows that the shared covariance counts for.
            regularisation: Added to the variances.
        """
        d = self.num_latents
        count = sums[:, -1] + 1e-10
        loc = sums[:, -1 - d : -1] / count[:, None]
        log_weight = count.log().log_softmax(0)
        if self.pairs is None:
            within = (sums[:, :d] / count[:, None] - loc.square()).clamp(min=0)
            shared = (count / count.sum()) @ within
            variance = _shrunk(within, shared, count[:, None], prior_rows)
            return Components(log_weight, loc, (variance + regularisation).sqrt())
        second = sums.new_empty(len(count), d, d)
        i, j = self.pairs
        second[:, i, j] = second[:, j, i] = sums[:, : len(i)] / count[:, None]
        within = second - loc[:, :, None] * loc[:, None, :]
        pooled = torch.einsum("k,kij->ij", count / count.sum(), within)
        shared = _shrunk(pooled, pooled.diagonal().diag(), count.sum(), prior_rows)
        covariance = _shrunk(within, shared, count[:, None, None], prior_rows)
        return Components(log_weight, loc, _factor(covariance, regularisation))

    def _natural(self, mixture: Components) -> Tensor:
        """θ_j, with shape ``(K, S)``."""
        log_weight, loc, scale = mixture
        constant = log_weight - 0.5 * loc.shape[1] * math.log(2 * math.pi)
        if self.pairs is None:
            precision = scale.square().reciprocal()
            linear, square = precision * loc, -0.5 * precision
            log_det = scale.log().sum(1)
        else:
            inverse = torch.cholesky_inverse(scale)
            i, j = self.pairs
            linear = (inverse @ loc[:, :, None])[:, :, 0]
            square = inverse[:, i, j] * torch.where(i == j, -0.5, -1.0)
            log_det = scale.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = constant - log_det - 0.5 * (linear * loc).sum(1)
        return torch.cat([square, linear, constant[:, None]], dim=1)


def _shrunk(own: Tensor, shared: Tensor, count: Tensor, prior_rows: float) -> Tensor:
    return (count * own + prior_rows * shared) / (count + prior_rows)


def _factor(covariance: Tensor, regularisation: float) -> Tensor:
    """Cholesky factors, with more regularisation if rounding makes a covariance indefinite."""
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    more = regularisation
    while True:
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(covariance + more * eye)
        if not info.any():
            return factor
        more = max(10 * more, 1e-12)


def kmeans(z: Tensor, k: int, steps: int = 20) -> Tensor:
    """Labels of k-means for flat latents, started by k-means++, with shape ``(N,)``."""
    centres = z[torch.randint(len(z), (1,), device=z.device)]
    nearest = torch.full((len(z),), math.inf, dtype=z.dtype, device=z.device)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, (z - centres[-1]).square().sum(1))
        centres = torch.cat([centres, z[torch.multinomial(nearest + 1e-12, 1)]])
    labels = torch.cdist(z, centres).argmin(1)
    for _ in range(steps if k > 1 else 0):
        hot = torch.nn.functional.one_hot(labels, k).to(z)
        count = hot.sum(0)[:, None]
        centres = torch.where(count > 0, hot.mT @ z / count.clamp(min=1), centres)
        labels = torch.cdist(z, centres).argmin(1)
    return labels
