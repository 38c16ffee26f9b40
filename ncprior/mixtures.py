r"""Gaussian mixtures on latents, and their fit by expectation-maximisation.

.. math::
    p(z) = \sum_j \pi_j \, N(z; \mu_j, \Sigma_j)

With one component this is a Gaussian. As a base for NCP a fitted mixture leaves the heads less to
correct: SIR with M proposals corrects about log M nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from ncprior.fitting import standardise

__all__ = ["GaussianMixture", "fit_gaussian", "fit_mixture"]

_Shape: TypeAlias = "Size | list[int] | tuple[int, ...]"
_BLOCK = 2**24  # numbers held at once for densities under many components
_ROUNDING = 1e-5  # share of variances that covers for rounding in float32
_KMEANS_ROWS, _KMEANS_STEPS = 20_000, 20
_FIRST_STEPS = 10  # of expectation-maximisation, for each start
COVARIANCES = ("full", "diagonal")


class GaussianMixture(Distribution):
    """A mixture of K Gaussians over latents of any event shape, of empty batch shape.

    Proposals cost one matrix product per component and no more memory than themselves.

    Arguments:
        logits: Unnormalised log-weights, with shape ``(K,)``.
        loc: Means, with shape ``(K, D)``; D is the number of latents.
        scale: Standard deviations of diagonal covariances, with shape ``(K, D)``, or lower Cholesky
            factors of full ones, with shape ``(K, D, D)``.
        event_shape: Shape of z of D numbers in all; ``(D,)`` if ``None``.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> p = GaussianMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2))
        >>> p.sample((5,)).shape, p.log_prob(torch.zeros(5, 2)).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        *,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        event = loc.shape[1:] if event_shape is None else Size(event_shape)
        k, d = loc.shape if loc.ndim == 2 else (0, 0)
        fits = tuple(logits.shape) == (k,) and tuple(scale.shape) in ((k, d), (k, d, d))
        if k < 1 or not fits or math.prod(event) != d:
            raise ValueError(
                f"A mixture takes logits (K,), loc (K, D) and scale (K, D) or (K, D, D), with an "
                f"event shape of D numbers; got {tuple(logits.shape)}, {tuple(loc.shape)}, "
                f"{tuple(scale.shape)} and event shape {tuple(event)}."
            )
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(Size(), event, validate_args=False)

    @classmethod
    def from_sklearn(
        cls,
        mixture: Any,  # noqa: ANN401
        event_shape: Sequence[int] | None = None,
    ) -> GaussianMixture:
        """Takes over a fitted ``sklearn.mixture.GaussianMixture``, in float32.

        Arguments:
            mixture: The fitted mixture, of any ``covariance_type``.
            event_shape: Shape of z; ``(D,)`` if ``None``.

        Raises:
            ValueError: If it is not fitted.

        Example:
            >>> from sklearn.mixture import GaussianMixture as Theirs
            >>> theirs = Theirs(3, covariance_type="tied").fit(torch.randn(100, 2).numpy())
            >>> GaussianMixture.from_sklearn(theirs).loc.shape
            torch.Size([3, 2])
        """
        if not hasattr(mixture, "means_"):
            raise ValueError("The mixture is not fitted: call mixture.fit(z) first.")
        logits, loc = torch.as_tensor(mixture.weights_).log(), torch.as_tensor(mixture.means_)
        covariance, (k, d) = torch.as_tensor(mixture.covariances_), loc.shape
        match mixture.covariance_type:
            case "full" | "tied":
                scale = torch.linalg.cholesky(covariance).expand(k, d, d)
            case "diag":
                scale = covariance.sqrt()
            case _:  # spherical
                scale = covariance[:, None].expand(k, d).sqrt()
        return cls(logits.float(), loc.float(), scale.float(), event_shape=event_shape)

    @property
    def support(self) -> constraints.Constraint:
        """All of R^D."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """E[z], with shape ``(*batch, *event)``."""
        return self._centre.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """The variance of each latent, with shape ``(*batch, *event)``."""
        within = self.scale.square().sum(-1) if self.is_full else self.scale.square()
        between = (self.loc - self._weights @ self.loc).square()
        variance = self._weights @ (within + between)
        return variance.reshape(self.event_shape).expand(self._extended_shape())

    @property
    def is_full(self) -> bool:
        """Whether the covariances are full ones."""
        return self.scale.ndim == 3

    def expand(self, batch_shape: _Shape, _instance: Any = None) -> GaussianMixture:  # noqa: ANN401
        """Makes independent rows, which share the parameters."""
        new = type(self)(**self.tensors(), event_shape=self.event_shape)
        new._batch_shape = Size(batch_shape)
        return new

    def config(self) -> dict[str, Any]:
        """Returns what a file says of the mixture besides its tensors, ready for JSON."""
        return {"event_shape": list(self.event_shape)}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters by the names of the constructor's arguments."""
        return {"logits": self.logits, "loc": self.loc, "scale": self.scale}

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> GaussianMixture:
        """Makes the mixture that has this :meth:`config` and these :meth:`tensors`.

        Raises:
            TypeError: If a tensor is missing or unknown.
        """
        parts: dict[str, Any] = {**tensors}
        return cls(**parts, **config)

    def to(self, device: torch.device | str) -> GaussianMixture:
        """Returns the mixture with its parameters on a device.

        Example:
            >>> fit_gaussian(torch.randn(50, 2)).to("cpu").loc.shape
            torch.Size([1, 2])
        """
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return type(self)(**tensors, event_shape=self.event_shape).expand(self.batch_shape)

    @torch.no_grad()
    def sample(self, sample_shape: _Shape = Size()) -> Tensor:  # noqa: B008
        """Draws z, with shape ``(*sample_shape, *batch, *event)``."""
        shape = self._extended_shape(Size(sample_shape))
        count = math.prod(shape[: len(shape) - len(self.event_shape)])
        noise = self.loc.new_empty(count, self.loc.shape[1]).normal_()
        if not self.is_full:
            j = torch.multinomial(self._weights, max(1, count), replacement=True)[:count]
            return (self.loc[j] + self.scale[j] * noise).reshape(shape)
        # One block of noise per component, then shuffled: the law of labels drawn one by one, by
        # contiguous matrix products.
        labels = torch.multinomial(self._weights.cpu(), max(1, count), replacement=True)[:count]
        blocks = noise.split(labels.bincount(minlength=len(self.loc)).tolist())
        parts = zip(self.loc, blocks, self.scale, strict=True)
        z = torch.cat([mean + block @ factor.mT for mean, block, factor in parts])
        return z[torch.randperm(count, device=z.device)].reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(z) in nats, with shape ``(*sample_shape, *batch)``."""
        lead = value.shape[: value.ndim - len(self.event_shape)]
        return self.log_joint(value.reshape(-1, self.loc.shape[1])).logsumexp(1).reshape(lead)

    def log_joint(self, z: Tensor) -> Tensor:
        """Returns log π_j N(z; μ_j, Σ_j) in nats of flat z, ``(N, D)``, with shape ``(N, K)``."""
        block = max(1, _BLOCK // max(1, z.numel()))
        squares = [self._squares(z, slice(j, j + block)) for j in range(0, len(self.loc), block)]
        constant = 0.5 * z.shape[1] * math.log(2 * math.pi)
        log_weight = self.logits.log_softmax(0) - self._log_det - constant
        return log_weight - 0.5 * torch.cat(squares, dim=1)

    def whiten(self, z: Tensor) -> Tensor:
        """Returns u of z = m + S u, both with shape ``(B, *event)``.

        m is the mean and S Sᵀ = Σ_j π_j Σ_j the mean covariance of a component: the latents in which
        components are round on average, and chains need no small steps for narrow directions.

        Example:
            >>> narrow = fit_gaussian(torch.randn(1000, 2) * torch.tensor([1.0, 1e-3]))
            >>> narrow.whiten(narrow.sample((1000,))).std(0).round()
            tensor([1., 1.])
        """
        away = (z - self._centre).flatten(1)
        if not self.is_full:
            return (away / self._spread).reshape(z.shape)
        u: Tensor = torch.linalg.solve_triangular(self._spread, away.mT, upper=False).mT
        return u.reshape(z.shape)

    def unwhiten(self, u: Tensor) -> Tensor:
        """Returns z = m + S u of u, the inverse of :meth:`whiten`; differentiable."""
        flat = u.flatten(1)
        away = flat @ self._spread.mT if self.is_full else flat * self._spread
        return away.reshape(u.shape) + self._centre

    def _squares(self, z: Tensor, block: slice) -> Tensor:
        """Squared Mahalanobis distances to some components, ``(N, K')``."""
        away = z - self.loc[block, None]  # (K', N, D)
        white = away @ self._whitening[block] if self.is_full else away / self.scale[block, None]
        return white.square().sum(-1).mT

    @lazy_property
    def _weights(self) -> Tensor:
        return self.logits.softmax(0)

    @lazy_property
    def _centre(self) -> Tensor:
        """E[z], of event shape."""
        return (self._weights @ self.loc).reshape(self.event_shape)

    @lazy_property
    def _spread(self) -> Tensor:
        """S of :meth:`whiten`: ``(D, D)``, or ``(D,)`` of diagonal covariances."""
        if not self.is_full:
            return (self._weights @ self.scale.square()).sqrt()
        factors = self._weights.sqrt()[:, None, None] * self.scale
        covariance = (factors @ factors.mT).sum(0)
        more = _ROUNDING * covariance.diagonal().diag()
        factor: Tensor = torch.linalg.cholesky(covariance + more)
        return factor

    @lazy_property
    def _whitening(self) -> Tensor:
        """W with W Wᵀ = Σ⁻¹, of full covariances: (z - μ) W is N(0, I)."""
        eye = torch.eye(self.loc.shape[1], dtype=self.loc.dtype, device=self.loc.device)
        inverse: Tensor = torch.linalg.solve_triangular(
            self.scale, eye.expand_as(self.scale), upper=False
        )
        return inverse.mT

    @lazy_property
    def _log_det(self) -> Tensor:
        """log |Σ_j|^½, with shape ``(K,)``."""
        scale = self.scale.diagonal(dim1=-2, dim2=-1) if self.is_full else self.scale
        return scale.log().sum(-1)


def fit_gaussian(z: Tensor, *, covariance: str = "full") -> GaussianMixture:
    """Fits one Gaussian by its moments.

    Arguments:
        z: Latents, with shape ``(N, *event)``.
        covariance: ``"full"`` or ``"diagonal"``.

    Returns:
        A mixture of one component.

    Example:
        >>> base = fit_gaussian(3 + torch.randn(10_000, 2))
        >>> (base.mean - 3).abs().max() < 0.1
        tensor(True)
    """
    return fit_mixture(z, 1, covariance=covariance, starts=1)


@torch.no_grad()
def fit_mixture(
    z: Tensor,
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
        z: Latents, with shape ``(N, *event)``, such as those of :func:`ncprior.bases.latents_of`.
        num_components: K.
        covariance: ``"full"`` or ``"diagonal"``.
        max_steps: Most steps of expectation-maximisation.
        tolerance: Gain in mean log p(z), in nats, below which it stops.
        regularisation: Added to the variances, as a share of each latent's variance.
        starts: How many starts are tried for a few steps; the best one is carried on.
        batch_size: Rows of z visited at once.

    Returns:
        The mixture, in float32.

    Raises:
        ValueError: If there are fewer rows than components, or values that are not finite.

    References:
        | Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster et al., 1977)
        | Choosing Starting Values for the EM Algorithm (Biernacki et al., 2003)

    Example:
        >>> centres = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
        >>> z = centres[torch.randint(2, (2000,))] + 0.1 * torch.randn(2000, 2)
        >>> fit_mixture(z, 2).loc.sort(0).values.round()[:, 0]
        tensor([-2.,  2.])
    """
    if covariance not in COVARIANCES:
        raise ValueError(f"The covariance is one of {', '.join(COVARIANCES)}; got {covariance!r}.")
    if not 1 <= num_components < len(z) or z.ndim < 2:
        raise ValueError(
            f"A mixture of {num_components} components needs z of shape (N, *event) with more "
            f"rows than components; got {tuple(z.shape)}."
        )
    counts = {"max_steps": max_steps, "starts": starts, "batch_size": batch_size}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}.")
    white, centre, spread = standardise(z)
    em = _EM(white, covariance, regularisation, batch_size)
    first = [em.run(em.start(num_components), _FIRST_STEPS, tolerance) for _ in range(starts)]
    best, _ = em.run(max(first, key=lambda run: run[1])[0], max_steps, tolerance)
    scale = best.scale * (spread[:, None] if best.is_full else spread)
    return GaussianMixture(best.logits, best.loc * spread + centre, scale, event_shape=z.shape[1:])


class _EM:
    """Expectation-maximisation on standardised, flat latents."""

    def __init__(self, z: Tensor, covariance: str, regularisation: float, batch_size: int) -> None:
        self.z, self.is_full = z, covariance == "full"
        self.regularisation, self.batch_size = regularisation, batch_size

    def start(self, num_components: int) -> GaussianMixture:
        """Makes a first mixture from the clusters of k-means."""
        return self._maximise(self._labels(num_components))

    def run(
        self, mixture: GaussianMixture, max_steps: int, tolerance: float
    ) -> tuple[GaussianMixture, float]:
        """Climbs to a maximum, and returns the mixture and its mean log p(z)."""
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
        centres = _kmeans(self.z[torch.randperm(len(self.z))[:_KMEANS_ROWS]], k)
        for z in self.z.split(self.batch_size):
            yield z, torch.nn.functional.one_hot(torch.cdist(z, centres).argmin(1), k).to(z)

    def _responsibilities(
        self, mixture: GaussianMixture, total: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The E-step: yields batches with p(j | z), and adds up log p(z)."""
        for z in self.z.split(self.batch_size):
            log_joint = mixture.log_joint(z)
            log_p = log_joint.logsumexp(1, keepdim=True)
            total += log_p.to("cpu", torch.float64).sum()
            yield z, (log_joint - log_p).exp()

    def _maximise(self, batches: Iterator[tuple[Tensor, Tensor]]) -> GaussianMixture:
        """The M-step, from batches of z and p(j | z)."""
        sums: list[Tensor] = []
        for z, weight in batches:
            if self.is_full:
                second = torch.stack([(w[:, None] * z).mT @ z for w in weight.mT])
            else:
                second = weight.mT @ z.square()
            new = [t.to("cpu", torch.float64) for t in (weight.sum(0), weight.mT @ z, second)]
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
        """Cholesky factors; a covariance that rounding made indefinite gets more of a diagonal."""
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
        more = self.regularisation
        while True:
            factor: Tensor
            factor, info = torch.linalg.cholesky_ex(covariance + more * eye)
            if not info.any():
                return factor
            more = max(10 * more, 1e-12)


def _kmeans(z: Tensor, k: int) -> Tensor:
    """Centres of k-means, from k-means++."""
    centres = z[torch.randint(len(z), (1,), device=z.device)]
    for _ in range(k - 1):
        distance = torch.cdist(z, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, z[torch.multinomial(distance, 1)]])
    for _ in range(_KMEANS_STEPS if k > 1 else 0):
        nearest = torch.nn.functional.one_hot(torch.cdist(z, centres).argmin(1), k).to(z)
        count = nearest.sum(0)[:, None]
        centres = torch.where(count > 0, nearest.mT @ z / count.clamp(min=1), centres)
    return centres
