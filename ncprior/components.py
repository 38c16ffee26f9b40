r"""Sampling within the components of a mixture base, which keeps their shares as they are.

A mixture draws z in two steps, a component j ~ π_j and z ~ p_j(z). Best-of-M over the whole mixture
takes mass from those components where q and p_j differ most, as good proposals are rare there: of M
proposals, one of an easier component wins. Within the component each row is drawn from

.. math::
    \sum_j \pi_j \, \frac{r(z) \, p_j(z)}{Z_j}, \qquad Z_j = E_{p_j}[r].

With the exact r = q/p this is q itself where π_j is the share of q that component j is responsible
for, since Z_j = E_q[π_j p_j / p] / π_j: so it is for every mixture that expectation-maximisation on
encodings has left at rest. M proposals are then as good as the average component asks for, not the
worst.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from ncprior.mixtures import GaussianMixture
from ncprior.samplers import Draw, LogRatio, Sampler

if TYPE_CHECKING:
    from ncprior.source import Sampleable

__all__ = ["Components", "within_components"]

_Shape: TypeAlias = "Size | list[int] | tuple[int, ...]"


class Components(Distribution):
    """Rows of a Gaussian mixture of which each has its component given: p_j(z), of batch shape (B,).

    Arguments:
        mixture: The mixture.
        labels: The component j of every row, with shape ``(B,)``.

    Example:
        >>> mixture = GaussianMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2))
        >>> rows = Components(mixture, torch.tensor([0, 2, 2, 1]))
        >>> rows.sample((50,)).shape, rows.log_prob(torch.zeros(50, 4, 2)).shape
        (torch.Size([50, 4, 2]), torch.Size([50, 4]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, mixture: GaussianMixture, labels: Tensor) -> None:
        self.mixture, self.labels = mixture, labels
        self._rows = [(j, (labels == j).nonzero()[:, 0]) for j in labels.unique().tolist()]
        super().__init__(labels.shape, mixture.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All of R^D."""
        return self.mixture.support

    @property
    def mean(self) -> Tensor:
        """μ_j of every row, with shape ``(B, *event)``."""
        return self.mixture.loc[self.labels].reshape(self._extended_shape())

    @torch.no_grad()
    def sample(self, sample_shape: _Shape = Size()) -> Tensor:  # noqa: B008
        """Draws z, with shape ``(*sample_shape, B, *event)``."""
        shape = self._extended_shape(Size(sample_shape))
        z = self.mixture.loc.new_empty(math.prod(sample_shape), len(self.labels), self._dims)
        z.normal_()
        for mean, factor, rows in self._parts(self.mixture.scale):
            noise = z[:, rows]
            z[:, rows] = mean + (noise @ factor.mT if self.mixture.is_full else noise * factor)
        return z.reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p_j(z) in nats, with shape ``(*sample_shape, B)``."""
        lead = value.shape[: value.ndim - len(self.event_shape)]
        z = value.reshape(-1, len(self.labels), self._dims)
        full = self.mixture.is_full
        factors = self.mixture._whitening if full else self.mixture.scale.reciprocal()
        squares = [
            (away @ factor if full else away * factor).square().sum(-1)
            for away, factor in (
                (z[:, rows] - mean, factor) for mean, factor, rows in self._parts(factors)
            )
        ]
        order = torch.cat([rows for _, rows in self._rows]).argsort()
        constant = self.mixture._log_det[self.labels] + 0.5 * self._dims * math.log(2 * math.pi)
        return (-0.5 * torch.cat(squares, dim=1)[:, order] - constant).reshape(lead)

    @property
    def _dims(self) -> int:
        return self.mixture.loc.shape[1]

    def _parts(self, factors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields mean, factor and rows of every component that has any."""
        for j, rows in self._rows:
            yield self.mixture.loc[j], factors[j], rows


def within_components(sampler: Sampler) -> Sampler:
    """Makes a sampler draw each row's component of a mixture base first, and z within it.

    Arguments:
        sampler: Any sampler, such as ``partial(sir, num_proposals=50)``.

    Returns:
        The sampler; ``log_mean_weight`` of its draws is log Z_j of the row's component.

    Raises:
        TypeError: When drawing, if the prior is no :class:`~ncprior.mixtures.GaussianMixture`.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> mixture = GaussianMixture(torch.zeros(2), torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1))
        >>> sampler = within_components(partial(sir, num_proposals=20))
        >>> z = sampler(mixture.expand((4000,)), lambda z: 0.3 * z[..., 0]).z  # Z_2 ≫ Z_1
        >>> round((z > 0).float().mean().item(), 1)
        0.5
    """

    def within(prior: Sampleable, log_ratio: LogRatio) -> Draw:
        if not isinstance(prior, GaussianMixture) or len(prior.batch_shape) != 1:
            raise TypeError(
                f"within_components needs a mixture base, such as rebase(source, "
                f"fit_mixture(latents_of(source, x))); got {type(prior).__name__}."
            )
        weights = prior.logits.softmax(0)
        labels = torch.multinomial(weights, prior.batch_shape[0], replacement=True)
        return sampler(Components(prior, labels), log_ratio)

    return within
