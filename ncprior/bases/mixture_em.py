"""Gaussian mixtures fitted to latents by expectation-maximisation (EM), started by k-means++."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ncprior.bases.mixture import GaussianMixture
from ncprior.utils.optimise import standardise
from ncprior.utils.require import (
    real_tensor,
    require_choice,
    require_counts,
    require_numbers,
)

COVARIANCES = ("full", "diagonal")

_KMEANS_ROWS, _KMEANS_STEPS = 20_000, 20

_FIRST_STEPS = 10  # EM steps of each start


def fit_gaussian(z: Tensor | ArrayLike, *, covariance: str = "full") -> GaussianMixture:
    """Gaussian fitted to latents by its moments.

    Arguments:
        z: Latents, with shape ``(N, *event)``, as for :func:`fit_mixture`.
        covariance: ``"full"`` or ``"diagonal"``.

    Returns:
        A mixture of one component.

    Raises:
        TypeError: If the latents are not floating-point numbers.
        ValueError: If there are fewer than two rows, or values that are not finite.

    Example:
        >>> base = fit_gaussian(3 + torch.randn(10_000, 2))
        >>> (base.mean - 3).abs().max() < 0.1
        tensor(True)
    """
    return fit_mixture(z, 1, covariance=covariance, starts=1)


@torch.no_grad()
def fit_mixture(
    z: Tensor | ArrayLike,
    num_components: int = 10,
    *,
    covariance: str = "full",
    max_steps: int = 300,
    tolerance: float = 1e-4,
    regularisation: float = 1e-6,
    starts: int = 5,
    batch_size: int = 8192,
) -> GaussianMixture:
    """Fits a Gaussian mixture by expectation-maximisation, from k-means++.

    The latents are visited in batches on their own device; moments are summed in float64.

    Arguments:
        z: Latents, with shape ``(N, *event)``, such as those of :func:`ncprior.bases.latents_of`:
            floating-point numbers, as a tensor, an array or a list.
        num_components: K.
        covariance: ``"full"`` or ``"diagonal"``.
        max_steps: Largest number of EM steps.
        tolerance: Gain in mean log p(z), in nats, below which it stops.
        regularisation: Added to the variances, as a fraction of each latent's variance.
        starts: Number of random starts, run for a few steps each; the best one is continued.
        batch_size: Rows of z visited at once.

    Returns:
        The mixture, in float32.

    Raises:
        TypeError: If an argument has the wrong type, or z are integers: codes of categories have
            no Gaussians.
        ValueError: If an argument is out of range, there are fewer rows than components, or values
            that are not finite.

    References:
        | Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster et al., 1977)
        | Choosing Starting Values for the EM Algorithm (Biernacki et al., 2003)

    Example:
        >>> centres = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
        >>> z = centres[torch.randint(2, (2000,))] + 0.1 * torch.randn(2000, 2)
        >>> fit_mixture(z, 2).loc.sort(0).values.round()[:, 0]
        tensor([-2.,  2.])
    """
    require_choice("covariance", covariance, COVARIANCES)
    require_counts(num_components=num_components, max_steps=max_steps)
    require_counts(starts=starts, batch_size=batch_size)
    require_numbers("[0, inf)", tolerance=tolerance, regularisation=regularisation)
    num_components, batch_size = int(num_components), int(batch_size)  # torch takes no others
    z = real_tensor("z", z, integers=False)
    if num_components >= len(z) or z.ndim < 2:
        raise ValueError(
            f"A mixture of {num_components} components needs z of shape (N, *event) with more "
            f"rows than components; got {tuple(z.shape)}."
        )
    white, centre, spread = standardise(z)
    em = _EM(white, covariance, regularisation, batch_size)
    first = [em.run(em.start(num_components), _FIRST_STEPS, tolerance) for _ in range(starts)]
    best, _ = em.run(max(first, key=lambda run: run[1])[0], max_steps, tolerance)
    scale = best.scale * (spread[:, None] if best.is_full else spread)
    return GaussianMixture(best.logits, best.loc * spread + centre, scale, event_shape=z.shape[1:])


class _EM:
    """Expectation-maximisation (EM) on standardised, flat latents."""

    def __init__(self, z: Tensor, covariance: str, regularisation: float, batch_size: int) -> None:
        self.z, self.is_full = z, covariance == "full"
        self.regularisation, self.batch_size = regularisation, batch_size

    def start(self, num_components: int) -> GaussianMixture:
        """Returns a first mixture, from the clusters of k-means."""
        return self._maximise(self._labels(num_components))

    def run(
        self, mixture: GaussianMixture, max_steps: int, tolerance: float
    ) -> tuple[GaussianMixture, float]:
        """Runs EM to convergence; returns the mixture and its mean log p(z) in nats."""
        mean = -math.inf
        for _ in range(max_steps):
            total, before = torch.zeros((), dtype=torch.float64), mean
            better = self._maximise(self._responsibilities(mixture, total))
            mean = total.item() / len(self.z)
            if mean - before < tolerance:
                break
            mixture = better
        return mixture, mean

    def _labels(self, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches with the one-hot labels of k-means."""
        centres = _kmeans(self.z[_some_rows(self.z)], k)
        for z in self.z.split(self.batch_size):
            yield z, torch.nn.functional.one_hot(torch.cdist(z, centres).argmin(1), k).to(z)

    def _responsibilities(
        self, mixture: GaussianMixture, total: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The E-step: yields batches of z with p(j | z), and adds log p(z) to ``total``."""
        for z in self.z.split(self.batch_size):
            log_joint = mixture.log_joint(z)
            log_p = log_joint.logsumexp(1, keepdim=True)
            total += log_p.cpu().double().sum()
            yield z, (log_joint - log_p).exp()

    def _maximise(self, batches: Iterator[tuple[Tensor, Tensor]]) -> GaussianMixture:
        """The M-step, from batches of z and p(j | z)."""
        sums: list[Tensor] = []
        for z, weight in batches:
            if self.is_full:
                second = torch.stack([(w[:, None] * z).mT @ z for w in weight.mT])
            else:
                second = weight.mT @ z.square()
            new = [t.cpu().double() for t in (weight.sum(0), weight.mT @ z, second)]
            sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else new
        count = sums[0] + 1e-10
        loc = sums[1] / count[:, None]
        if self.is_full:
            moments = sums[2] / count[:, None, None]
            scale = self._factor(moments - loc[:, :, None] * loc[:, None, :])
        else:
            moments = sums[2] / count[:, None]
            scale = ((moments - loc.square()).clamp(min=0) + self.regularisation).sqrt()
        logits = count.log().log_softmax(0)
        return GaussianMixture(logits.to(self.z), loc.to(self.z), scale.to(self.z))

    def _factor(self, covariance: Tensor) -> Tensor:
        """Cholesky factors, with more regularisation if rounding makes a covariance indefinite."""
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
        more = self.regularisation
        while True:
            factor: Tensor
            factor, info = torch.linalg.cholesky_ex(covariance + more * eye)
            if not info.any():
                return factor
            more = max(10 * more, 1e-12)


def _some_rows(z: Tensor) -> Tensor:
    return torch.randperm(len(z), device=z.device)[:_KMEANS_ROWS]


def _kmeans(z: Tensor, k: int) -> Tensor:
    """Centres of k-means, started by k-means++."""
    centres = z[torch.randint(len(z), (1,), device=z.device)]
    for _ in range(k - 1):
        distance = torch.cdist(z, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, z[torch.multinomial(distance, 1)]])
    for _ in range(_KMEANS_STEPS if k > 1 else 0):
        nearest = torch.nn.functional.one_hot(torch.cdist(z, centres).argmin(1), k).to(z)
        count = nearest.sum(0)[:, None]
        centres = torch.where(count > 0, nearest.mT @ z / count.clamp(min=1), centres)
    return centres
