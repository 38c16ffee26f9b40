r"""Gaussian mixtures on latents; :func:`ncprior.bases.fit_mixture` fits them.

.. math::
    p(z) = \sum_j \pi_j \, N(z; \mu_j, \Sigma_j)

With one component this is a Gaussian. A mixture fitted to the aggregate posterior leaves a smaller
gap to the heads, and SIR with M proposals corrects at most log M nats.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, Normal, constraints

from ncprior.bases.checks import flattened, own_floats, size_of
from ncprior.utils.require import described, require_instance

_Shape: TypeAlias = "Size | list[int] | tuple[int, ...]"

_BLOCK = 2**24  # largest number of floats in memory for densities under many components

_ROUNDING = 1e-5  # added fraction of the variances, against rounding in float32


class _Derived:
    """A property that is computed once for a mixture and all that it is expanded to."""

    def __init__(self, compute: Callable[[Any], Tensor]) -> None:
        self.compute, self.name = compute, compute.__name__

    @torch.inference_mode(False)  # a tensor of inference mode cannot be saved for a gradient
    def __get__(self, mixture: Any, owner: type | None = None) -> Tensor:  # noqa: ANN401
        if mixture is None:
            return self  # type: ignore[return-value]  # of the class
        if self.name not in mixture._kept:
            mixture._kept[self.name] = self.compute(mixture)
        found: Tensor = mixture._kept[self.name]
        return found


class GaussianMixture(Distribution):
    """Mixture of K Gaussians over latents of any event shape, of empty batch shape.

    Samples cost one matrix product per component, and no memory beyond the samples themselves.

    Arguments:
        logits: Unnormalised log-weights, with shape ``(K,)``.
        loc: Means, with shape ``(K, D)``; D is the number of latents.
        scale: Standard deviations of diagonal covariances, with shape ``(K, D)``, or lower
            Cholesky factors of full ones, with shape ``(K, D, D)``.
        event_shape: Shape of z without batch, D numbers in all; ``(D,)`` if ``None``.

    Raises:
        TypeError: If a parameter is not a tensor of real numbers.
        ValueError: If the shapes do not fit, a value is not finite, a standard deviation or a
            diagonal of a factor is not positive, or a factor is not lower triangular.

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
        logits, loc = own_floats("logits", logits), own_floats("loc", loc)
        scale = own_floats("scale", scale)
        dtype = reduce(torch.promote_types, (logits.dtype, loc.dtype, scale.dtype))
        logits, loc, scale = logits.to(dtype), loc.to(dtype), scale.to(dtype)
        event = loc.shape[1:] if event_shape is None else size_of(event_shape, "event_shape")
        k, d = loc.shape if loc.ndim == 2 else (0, 0)
        fits = tuple(logits.shape) == (k,) and tuple(scale.shape) in ((k, d), (k, d, d))
        if k < 1 or not fits or math.prod(event) != d:
            raise ValueError(
                f"A mixture takes logits (K,), loc (K, D) and scale (K, D) or (K, D, D), with an "
                f"event shape of D numbers; got {tuple(logits.shape)}, {tuple(loc.shape)}, "
                f"{tuple(scale.shape)} and event shape {tuple(event)}."
            )
        self.logits, self.loc, self.scale = logits, loc, scale
        self._kept: dict[str, Tensor] = {}  # what is derived; expanded mixtures share it
        super().__init__(Size(), event, validate_args=False)
        if not (logits.is_meta or loc.is_meta or scale.is_meta):
            self._check_values()

    @classmethod
    def from_sklearn(
        cls,
        mixture: Any,  # noqa: ANN401
        event_shape: Sequence[int] | None = None,
    ) -> GaussianMixture:
        """Converts a fitted ``sklearn.mixture.GaussianMixture``, to float32.

        Arguments:
            mixture: The fitted mixture, of any ``covariance_type``.
            event_shape: Shape of z; ``(D,)`` if ``None``.

        Raises:
            TypeError: If it is not a Gaussian mixture of scikit-learn.
            ValueError: If the mixture is not fitted; call its ``fit`` first.

        Example:
            >>> from sklearn.mixture import GaussianMixture as Theirs
            >>> theirs = Theirs(3, covariance_type="tied").fit(torch.randn(100, 2).numpy())
            >>> GaussianMixture.from_sklearn(theirs).loc.shape
            torch.Size([3, 2])
        """
        if isinstance(mixture, type) or not hasattr(mixture, "covariance_type"):
            raise TypeError(
                f"mixture must be a fitted sklearn.mixture.GaussianMixture; got {described(mixture)}."
            )
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

    @staticmethod
    def average(mixtures: Sequence[GaussianMixture]) -> GaussianMixture:
        """Returns the average density of mixtures, a mixture of all their components.

        The average of mixtures that were fitted from different starts is more likely on held-out
        data than one of them: of few rows, each has found clusters of its own.

        Arguments:
            mixtures: Mixtures of one event shape, all with full or all with diagonal covariances.

        Raises:
            TypeError: If one is no ``GaussianMixture``.
            ValueError: If there are none, or they differ in shape.

        References:
            Improved Gaussian Mixture Density Estimates Using Bayesian Penalty Terms and Network
            Averaging (Ormoneit & Tresp, 1995)

        Example:
            >>> from ncprior.bases import fit_mixture
            >>> z = torch.randn(300, 2)
            >>> GaussianMixture.average([fit_mixture(z, 3, starts=1) for _ in range(4)]).loc.shape
            torch.Size([12, 2])
        """
        remedy = "Pass fitted mixtures."
        mixtures = require_instance("mixtures", mixtures, (list, tuple), remedy)
        parts = [require_instance("A mixture", part, GaussianMixture, remedy) for part in mixtures]
        if len({(part.event_shape, part.scale.shape[1:]) for part in parts}) != 1:
            raise ValueError(
                f"An average needs mixtures of one event shape, all with full or all with diagonal "
                f"covariances; got {[(tuple(p.event_shape), tuple(p.scale.shape)) for p in parts]}."
            )
        return GaussianMixture(
            torch.cat([part.logits.log_softmax(0) for part in parts]),
            torch.cat([part.loc for part in parts]),
            torch.cat([part.scale for part in parts]),
            event_shape=parts[0].event_shape,
        )

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
        between = (self.loc - self._centre.flatten()).square()
        variance = self._weights @ (within + between)
        return variance.reshape(self.event_shape).expand(self._extended_shape())

    @property
    def is_full(self) -> bool:
        """Whether the covariances are full matrices, not diagonals."""
        return self.scale.ndim == 3

    def expand(self, batch_shape: _Shape, _instance: Any = None) -> GaussianMixture:  # noqa: ANN401
        """Returns the distribution of independent rows, which share the parameters."""
        new = copy.copy(self)
        new._batch_shape = Size(batch_shape)
        return new

    def config(self) -> dict[str, Any]:
        """Returns the configuration to save besides the tensors, ready for JSON."""
        return {"event_shape": list(self.event_shape)}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters by the names of the constructor's arguments."""
        return {"logits": self.logits, "loc": self.loc, "scale": self.scale}

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> GaussianMixture:
        """Builds the mixture from its :meth:`config` and :meth:`tensors`.

        Raises:
            TypeError: If a tensor is missing or unknown.
        """
        arguments: dict[str, Any] = {**tensors, **config}
        return cls(**arguments)

    def to(self, device: torch.device | str) -> GaussianMixture:
        """Returns the mixture with its parameters on a device.

        Example:
            >>> GaussianMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2)).to("cpu").loc.shape
            torch.Size([3, 2])
        """
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return type(self)(**tensors, event_shape=self.event_shape).expand(self.batch_shape)

    @torch.no_grad()
    def sample(self, sample_shape: _Shape = Size()) -> Tensor:  # noqa: B008
        """Draws z, with shape ``(*sample_shape, *batch, *event)``."""
        shape = self._extended_shape(size_of(sample_shape))
        count = math.prod(shape[: len(shape) - len(self.event_shape)])
        noise = self.loc.new_empty(count, self.loc.shape[1]).normal_()
        if not self.is_full:
            j = torch.multinomial(self._weights, max(1, count), replacement=True)[:count]
            return (self.loc[j] + self.scale[j] * noise).reshape(shape)
        if len(self.loc) == 1:
            return (self.loc + noise @ self.scale[0].mT).reshape(shape)
        # One block of noise per component, then a shuffle: the same distribution as labels drawn
        # one by one, with contiguous matrix products.
        labels = torch.multinomial(self._weights_on_cpu, max(1, count), replacement=True)[:count]
        blocks = noise.split(labels.bincount(minlength=len(self.loc)).tolist())
        components = zip(self.loc, blocks, self.scale, strict=True)
        z = torch.cat([mean + block @ factor.mT for mean, block, factor in components])
        return z[torch.randperm(count, device=z.device)].reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(z) in nats, with shape ``(*sample_shape, *batch)``."""
        z, lead = flattened(value, self.event_shape, self.loc.device)
        return self.log_joint(z).logsumexp(1).reshape(lead)

    def log_joint(self, z: Tensor) -> Tensor:
        """Returns log π_j N(z; μ_j, Σ_j) in nats for flat z, ``(N, D)``, with shape ``(N, K)``."""
        block = max(1, _BLOCK // max(1, z.numel()))
        squares = [self._squares(z, slice(j, j + block)) for j in range(0, len(self.loc), block)]
        constant = 0.5 * z.shape[1] * math.log(2 * math.pi)
        log_weight = self.logits.log_softmax(0) - self._log_det - constant
        return log_weight - 0.5 * torch.cat(squares, dim=1)

    def independent_latents(self) -> tuple[Tensor, Distribution]:
        """Latents that are independent of all others, such as collapsed ones.

        Returns:
            A mask of event shape, true for latents that have the same mean and variance in all
            components and no covariance with others; and independent Gaussians, expanded like
            the mixture, which are the distribution of these latents.

        Example:
            >>> GaussianMixture(torch.zeros(2), torch.eye(2), torch.ones(2, 2)).independent_latents()[0]
            tensor([False, False])
        """
        loc, sd = self.loc, self._standard_deviations
        apart = ((loc == loc[0]) & (sd == sd[0])).all(0)
        if self.is_full:
            off = (self.scale.tril(-1) != 0).any(0)
            apart &= ~(off.any(0) | off.any(1))
        shape = self._extended_shape()
        mean, sd = (t[0].reshape(self.event_shape).expand(shape) for t in (loc, sd))
        parts = Normal(mean, sd, validate_args=False)
        return apart.reshape(self.event_shape), Independent(parts, len(self.event_shape))

    def whiten(self, z: Tensor) -> Tensor:
        """Whitened latents u = S⁻¹ (z - m), both with shape ``(B, *event)``.

        m is the mean of the mixture and S Sᵀ = Σ_j π_j Σ_j the mean covariance of its components.
        In u the components are round on average, so that Langevin chains need no small steps for
        narrow directions.

        Example:
            >>> narrow = GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.tensor([[1, 1e-3]]))
            >>> narrow.whiten(narrow.sample((1000,))).std(0).round()
            tensor([1., 1.])
        """
        away = (z - self._centre).reshape(len(z), self.loc.shape[1])
        if not self.is_full:
            return (away / self._spread).reshape(z.shape)
        u: Tensor = torch.linalg.solve_triangular(self._spread, away.mT, upper=False).mT
        return u.reshape(z.shape)

    def unwhiten(self, u: Tensor) -> Tensor:
        """Returns z = m + S u, the inverse of :meth:`whiten`; differentiable."""
        flat = u.reshape(len(u), self.loc.shape[1])
        away = flat @ self._spread.mT if self.is_full else flat * self._spread
        return away.reshape(u.shape) + self._centre

    def _squares(self, z: Tensor, block: slice) -> Tensor:
        """Squared Mahalanobis distances to a block of components, ``(N, K')``."""
        away = z - self.loc[block, None]  # (K', N, D)
        if self.is_full:
            white = away @ self._whitening[block].to(away.dtype)
        else:
            white = away / self.scale[block, None]
        return white.square().sum(-1).mT

    def _check_values(self) -> None:
        scale, sd = self.scale, self._standard_deviations
        fits = torch.isfinite(self.loc).all() & torch.isfinite(scale).all() & (sd > 0).all()
        fits &= torch.isfinite(self.logits.logsumexp(0))  # some weights can be 0, but not all
        if not fits or (self.is_full and scale.triu(1).any()):
            raise ValueError(
                "A mixture takes finite parameters, with positive standard deviations, or lower "
                "triangular Cholesky factors of positive diagonal; got other values. Take "
                "torch.linalg.cholesky(covariance) as scale."
            )

    @_Derived
    def _weights(self) -> Tensor:
        return self.logits.softmax(0)

    @_Derived
    def _weights_on_cpu(self) -> Tensor:
        return self._weights.cpu()

    @_Derived
    def _centre(self) -> Tensor:
        """E[z], of event shape."""
        return (self._weights @ self.loc).reshape(self.event_shape)

    @_Derived
    def _spread(self) -> Tensor:
        """S of :meth:`whiten`: ``(D, D)``, or ``(D,)`` for diagonal covariances."""
        if not self.is_full:
            return (self._weights @ self.scale.square()).sqrt()
        factors = self._weights.sqrt()[:, None, None] * self.scale
        covariance = (factors @ factors.mT).sum(0)
        more = _ROUNDING * covariance.diagonal().diag()
        factor: Tensor = torch.linalg.cholesky(covariance + more)
        return factor

    @_Derived
    def _whitening(self) -> Tensor:
        """W with W Wᵀ = Σ⁻¹ for full covariances, so that (z - μ) W is N(0, I)."""
        eye = torch.eye(self.loc.shape[1], dtype=self.loc.dtype, device=self.loc.device)
        inverse: Tensor = torch.linalg.solve_triangular(
            self.scale, eye.expand_as(self.scale), upper=False
        )
        return inverse.mT

    @_Derived
    def _log_det(self) -> Tensor:
        """log |Σ_j|^½, with shape ``(K,)``."""
        return self._standard_deviations.log().sum(-1)

    @property
    def _standard_deviations(self) -> Tensor:
        """Standard deviations, or the diagonals of the factors, with shape ``(K, D)``."""
        return self.scale.diagonal(dim1=-2, dim2=-1) if self.is_full else self.scale
