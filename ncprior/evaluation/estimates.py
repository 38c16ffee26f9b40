"""Estimates of log p(x) of several rows, and their difference between two models."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ncprior.evaluation.normaliser import LogZ
from ncprior.utils.require import require_counts, require_instance

_FEW, _TOLERATED = 10, 0.05  # effective samples of a row, and the share of rows with fewer


class Gain(NamedTuple):
    """Mean difference of log p(x) between two models, with its standard error over x, in nats.

    Attributes:
        value: The mean difference, in nats.
        error: Its standard error, in nats.

    Example:
        >>> print(Gain(2.0, 0.05))
        +2.00 ± 0.10 nats
    """

    value: float
    error: float

    def __str__(self) -> str:
        """Shows the gain with its 95 % interval."""
        return f"{self.value:+.2f} ± {1.96 * self.error:.2f} nats"


class Likelihood(NamedTuple):
    """Estimates of log p(x) under one model, one per row.

    Attributes:
        model: ``"base"``, ``"SIR(M)"`` with its M, or ``"NCP"``.
        normalisation: ``"local"``, group by group, or ``"global"``.
        lower: The lower bound, on average at most log p(x), in nats, with shape ``(N,)``. Under NCP
            it is one only if log Z comes from exact draws, see :func:`ncprior.evaluation.log_normaliser`.
        estimate: The jackknife estimate, in nats, with shape ``(N,)``.
        upper: The upper estimate, in nats, with shape ``(N,)``; never more than log 4 above
            ``lower``, so that it means nothing where ``ess`` is a few.
        ess: Effective number of the S draws of z, of 1 to S, with shape ``(N,)``.
        num_samples: S, the draws of z per row.
        num_pools: L, the pools of proposals; 0 if none are drawn.
        log_z: log Z, which is subtracted from all rows; ``None`` but for NCP.

    Example:
        >>> x, ess = torch.tensor([-85.0, -83.0]), torch.tensor([50.0, 60.0])
        >>> print(Likelihood("base", "local", x - 0.1, x, x + 0.1, ess, 100, 0))
        base: NLL 83.90 to 84.10 nats (± 1.96 over 2 rows); S = 100, ESS 55
    """

    model: str
    normalisation: str
    lower: Tensor
    estimate: Tensor
    upper: Tensor
    ess: Tensor
    num_samples: int
    num_pools: int
    log_z: LogZ | None = None

    @property
    def is_two_sided(self) -> bool:
        """Whether at most 5 % of the rows have no ``upper``, or so small an ``ess`` that it means nothing."""
        known = (self.ess >= min(_FEW, self.num_samples / 2)) & ~self.upper.isnan()
        return 1 - known.float().mean().item() <= _TOLERATED

    @property
    def nll_lower(self) -> float:
        """Mean negative log-likelihood over the rows, from below if ``is_two_sided``, in nats."""
        return -self.upper.mean().item()

    @property
    def nll_upper(self) -> float:
        """Mean negative log-likelihood over the rows, from above on average, in nats."""
        return -self.lower.mean().item()

    def bits_per_dim(self, num_dims: int) -> tuple[float, float]:
        """Returns ``nll_lower`` and ``nll_upper`` in bits per dimension of x.

        Example:
            >>> x = torch.tensor([-8.0 * math.log(2.0)], dtype=torch.float64)
            >>> Likelihood("base", "local", x, x, x, x, 8, 0).bits_per_dim(8)
            (1.0, 1.0)
        """
        require_counts(num_dims=num_dims)
        unit = num_dims * math.log(2)
        return self.nll_lower / unit, self.nll_upper / unit

    def gain_over(self, other: Likelihood) -> Gain:
        """Paired difference of the lower bounds to those of another model on the same rows.

        Its error covers the rows and log Z, which is one number for all rows.

        Raises:
            TypeError: If the other is not a :class:`Likelihood`.
            ValueError: If it is of another number of rows.

        Example:
            >>> from ncprior.evaluation import log_likelihood
            >>> found = log_likelihood(prior, x, num_samples=8, num_proposals=5)
            >>> print(found["sir"].gain_over(found["base"]))  # a new head: r = 1
            +0.00 ± 0.00 nats
        """
        require_instance("other", other, Likelihood, "Pass a result of log_likelihood.")
        if len(self.lower) != len(other.lower):
            raise ValueError(
                f"A paired difference needs estimates of the same rows; got {len(self.lower)} and "
                f"{len(other.lower)} rows."
            )
        difference = self.lower - other.lower
        log_zs = [] if self.log_z is other.log_z else [self.log_z, other.log_z]
        errors = [_standard_error(difference), *(z.upper_error for z in log_zs if z is not None)]
        return Gain(difference.mean().item(), math.hypot(*errors))

    def __str__(self) -> str:
        """Shows the range of the negative log-likelihood, or its upper end, and its settings."""
        of_log_z = 0.0 if self.log_z is None else self.log_z.upper_error
        error = 1.96 * math.hypot(_standard_error(self.lower), of_log_z)
        pools = f", L = {self.num_pools}" if self.num_pools else ""
        kind = "" if self.model == "base" else f", {self.normalisation}ly normalised"
        start = f"{self.nll_lower:.2f} to" if self.is_two_sided else "at most"
        return (
            f"{self.model}{kind}: NLL {start} {self.nll_upper:.2f} nats "
            f"(± {error:.2f} over {len(self.lower)} rows); S = {self.num_samples}{pools}, "
            f"ESS {self.ess.mean():.0f}"
        )


def _standard_error(values: Tensor) -> float:
    """Standard error of the mean; NaN for one value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
