"""Distributions of the counts of a cell, with batch shape (B,)."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Size, Tensor
from torch.distributions import Distribution, NegativeBinomial, Normal, constraints
from torch.nn.functional import logsigmoid

_NODES = 24  # of the quadrature over the background of a protein

_Shape = Size | list[int] | tuple[int, ...]


class _Rows(Distribution):
    """A distribution over cells; a subclass has ``mean``, ``sample`` and ``log_prob``."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, mean: Tensor) -> None:
        self._mean = mean
        super().__init__(mean.shape[:1], mean.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._mean


class Cells(_Rows):
    """A distribution over genes, such as those of scvi-tools, as one over cells.

    Arguments:
        genes: The distribution of each count, of batch shape ``(B, genes)``.
    """

    def __init__(self, genes: Distribution) -> None:
        self.genes = genes
        super().__init__(genes.mean)

    def sample(self, sample_shape: _Shape = ()) -> Tensor:
        # scvi-tools samples in inference mode; a clone is a tensor like any other.
        return self.genes.sample(Size(sample_shape)).clone()

    def log_prob(self, value: Tensor) -> Tensor:
        return self.genes.log_prob(value).sum(-1)


def negative_binomial(mean: Tensor, inverse_dispersion: Tensor) -> Distribution:
    """A negative binomial distribution with the parameters of scvi-tools."""
    logits = (mean + 1e-8).log() - (inverse_dispersion + 1e-8).log()
    return NegativeBinomial(inverse_dispersion, logits=logits, validate_args=False)


class ZeroInflated(Distribution):
    """Counts that are 0 with an extra probability.

    Arguments:
        counts: Their distribution otherwise, of batch shape ``(B, genes)``.
        logits: Log-odds of the extra zeros.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, counts: Distribution, logits: Tensor) -> None:
        self.counts, self.logits = counts, logits
        super().__init__(counts.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.counts.mean * torch.sigmoid(-self.logits)

    def sample(self, sample_shape: _Shape = ()) -> Tensor:
        x = self.counts.sample(Size(sample_shape))
        return torch.where(torch.rand_like(x) < torch.sigmoid(self.logits), 0.0, x)

    def log_prob(self, value: Tensor) -> Tensor:
        log_p = logsigmoid(-self.logits) + self.counts.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(logsigmoid(self.logits), log_p), log_p)


class Proteins(NamedTuple):
    """Parameters of the counts of proteins, each ``(B, proteins)``.

    A count is negative binomial with mean b with probability sigmoid(``logits``), and with mean
    ``increase`` · b otherwise, where log b is normal: the background of the protein.

    Attributes:
        loc: Mean of log b.
        scale: Standard deviation of log b.
        increase: Mean of a protein that is there, in units of b.
        logits: Log-odds that the protein is background.
        inverse_dispersion: That of the negative binomial distributions.
    """

    loc: Tensor
    scale: Tensor
    increase: Tensor
    logits: Tensor
    inverse_dispersion: Tensor

    def mean(self) -> Tensor:
        """The mean counts."""
        background = (self.loc + self.scale.square() / 2).exp()
        return background * (1 + torch.sigmoid(-self.logits) * (self.increase - 1))

    def sample(self, sample_shape: Size) -> Tensor:
        """Counts, each from a background of its own."""
        b = Normal(self.loc, self.scale, validate_args=False).sample(sample_shape).exp()
        is_background = torch.rand_like(b) < torch.sigmoid(self.logits)
        mean = torch.where(is_background, b, b * self.increase)
        return negative_binomial(mean, self.inverse_dispersion.expand_as(mean)).sample()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probabilities of counts, by Gauss-Hermite quadrature over log b."""
        nodes, weights = (
            torch.from_numpy(part).to(self.loc)[:, None, None]
            for part in np.polynomial.hermite.hermgauss(_NODES)
        )
        b = (self.loc + math.sqrt(2) * self.scale * nodes).exp()
        there, absent = (
            negative_binomial(mean, self.inverse_dispersion).log_prob(value)
            for mean in (b * self.increase, b)
        )
        log_p = torch.logaddexp(logsigmoid(self.logits) + absent, logsigmoid(-self.logits) + there)
        return (log_p + (weights / math.sqrt(math.pi)).log()).logsumexp(0)


class GenesAndProteins(_Rows):
    """Counts of genes, and behind them counts of proteins.

    Arguments:
        genes: The distribution of each count of a gene, of batch shape ``(B, genes)``.
        proteins: Parameters of the counts of proteins.
    """

    def __init__(self, genes: Distribution, proteins: Proteins) -> None:
        self.genes, self.proteins = genes, proteins
        super().__init__(torch.cat([genes.mean, proteins.mean()], -1))

    def sample(self, sample_shape: _Shape = ()) -> Tensor:
        shape = Size(sample_shape)
        return torch.cat([self.genes.sample(shape), self.proteins.sample(shape)], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        x, y = value.split([self.genes.mean.shape[-1], self.proteins.loc.shape[-1]], -1)
        return self.genes.log_prob(x).sum(-1) + self.proteins.log_prob(y).sum(-1)


class Peaks(Cells):
    """Open regions of a cell, 0 or 1; any count above 0 is open.

    Arguments:
        regions: The distribution of each region, of batch shape ``(B, regions)``.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob((value > 0).to(self.mean))
