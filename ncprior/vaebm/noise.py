r"""Map from noise to (z, x): the reparametrisation in which a VAE is a standard Gaussian.

Where p(z_k | z_<k) and p(x | z) are normal, group by group

.. math::
    z_k = \mu_k(z_{<k}) + \sigma_k(z_{<k}) \, \varepsilon_k, \qquad
    x = \mu_x(z) + \sigma_x(z) \, \varepsilon_x, \qquad \varepsilon \sim N(0, I).

The map is one to one and its Jacobian determinant is the product of all σ, so that the density of
ε is N(0, I) for any μ and σ. Three cases have no such noise:

* For a group with another density, such as a flow, chains move in z_k itself. For a mixture of
  Gaussians they move in u_k, with z_k = m + S u_k, m the mean of the mixture and S Sᵀ the mean
  covariance of its components, so that no direction is narrow
  (:meth:`ncprior.bases.GaussianMixture.whiten`).
* For a decoder whose distribution is not normal, such as a Bernoulli, x is its mean, without ε_x.
* A group that is discrete, bounded or can only be sampled raises a ``TypeError``.

All terms of the target besides N(0, I) form one log-weight: log r_k of the heads, log p(z_k) of
groups in z_k or u_k, and the additional terms of the published code of VAEBM (see
:class:`NoiseMap`).

References:
    | VAEBM: A Symbiosis between Variational Autoencoders and Energy-based Models
    | (Xiao, Kreis, Kautz & Vahdat, ICLR 2021)
    | NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport
    | (Hoffman et al., 2019)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, Normal

from ncprior.bases.mixture import GaussianMixture
from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.samplers.target import name_of, supports_langevin
from ncprior.source import Group, LatentSource, visit
from ncprior.utils.draws import drawn
from ncprior.utils.precision import at_least_float32, at_precision
from ncprior.utils.random_state import seeded
from ncprior.utils.require import described, require_finite
from ncprior.utils.visible import require_eval

LangevinTarget = Literal["exact", "official"]


class Walked(NamedTuple):
    """Noise, latents and image of one walk through the groups.

    Attributes:
        noise: ε_k of every group, each ``(B, *event)``, or z_k or u_k for groups that are not
            normal; for a normal decoder, ε_x is the last one.
        latents: z_k of every group, each ``(B, *event)``.
        mean: The decoder's mean, with shape ``(B, ...)``.
        x: The mean plus the decoder's noise; the mean itself if the decoder has no noise.
        log_weight: Log-ratio of the target's density to N(0, I) over all noise, without the energy
            and up to a constant, in nats, with shape ``(B,)``.
    """

    noise: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    mean: Tensor
    x: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class NoiseMap:
    """Map from noise to (z, x) of a VAE, with the log-weight of Π r_k p_k.

    Arguments:
        source: The VAE, with ``likelihood``.
        prior: The NCP prior whose heads reweight the groups, or ``None``.
        condition: Condition of the source, such as labels, or ``None``.
        official: Whether -log p(z) - log p(x | z) stands in for ½|ε|², as in VAEBM's published
            code. That target omits the Jacobian, and so has the additional factors Π 1/σ_k(z_<k)
            and Π 1/σ_x(z). If the decoder's distribution has an attribute ``drawn_scale``, x is
            drawn with that scale and evaluated with the distribution's own scale, which VAEBM
            bounds from below.
        precision: Precision of products from given noise: ``torch.bfloat16`` applies to heads and
            VAE, ``torch.float32`` to heads alone, with the caller's autocast for the VAE. Noise, z
            and log-weights are in float32 or better.
    """

    source: LatentSource[Any, Any]
    prior: NCPrior | None = None
    condition: Any = None
    official: bool = False
    precision: torch.dtype = torch.float32

    def draw(self, batch_size: int, sampler: Sampler | None = None) -> Walked:
        """Draws noise with z and x: from the VAE, or from NCP if a sampler is given."""

        def pick(k: int, group: Group) -> Tensor:
            _require_density(k, group)
            if self.prior is None or sampler is None:
                z = drawn(group.prior)
            else:
                z = self.prior.draw(k, group, sampler).z
            return _to_noise(group.prior, z)

        return self._walk(batch_size, pick, torch.randn_like)

    def __call__(self, noise: tuple[Tensor, ...]) -> Walked:
        """Maps given noise to z and x, differentiably.

        Raises:
            ValueError: If the noise is not one tensor per group and, for a normal decoder, one
                more.
        """
        needed = self.source.num_groups
        if len(noise) in (needed, needed + 1):
            low = self.precision == torch.bfloat16  # else the caller's own autocast holds
            with at_precision(noise[0].device.type, self.precision) if low else nullcontext():
                walked = self._walk(len(noise[0]), lambda k, _: noise[k], lambda _: noise[-1])
            needed = len(walked.noise)
        if len(noise) != needed:
            raise ValueError(
                f"This model needs {needed} tensors of noise, one per group and one for a decoder "
                f"with noise; got {len(noise)}. Pass those of draw_noise or of other chains."
            )
        return walked

    def _walk(
        self,
        batch_size: int,
        pick: Callable[[int, Group], Tensor],
        pick_x: Callable[[Tensor], Tensor],
    ) -> Walked:
        noise, log_weights = [], []

        def choose(k: int, group: Group) -> Tensor:
            u = pick(k, group)
            _require_event(k, group, u)
            z, log_weight = self._latents(k, group, u)
            noise.append(u)
            log_weights.append(log_weight)
            return z

        start = self.source.start(batch_size, condition=self.condition)
        latents, state = visit(self.source, start, choose)
        likelihood = self.source.likelihood(state)
        normal = normal_of(likelihood)
        if normal is None:
            x = mean = at_least_float32(_mean(likelihood, self.source, state))
        else:
            mean = at_least_float32(normal.loc)
            u = pick_x(mean)
            if u.shape != mean.shape:
                raise ValueError(
                    f"The last part of noise is that of the decoder, with shape {tuple(mean.shape)}; "
                    f"got {tuple(u.shape)}. Pass the noise of draw_noise or of other chains."
                )
            x, log_weight = self._image(normal, u)
            noise.append(u)
            log_weights.append(log_weight)
        return Walked(tuple(noise), latents, mean, x, torch.stack(log_weights).sum(0))

    def _latents(self, k: int, group: Group, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z_k at noise u, with its log-weight."""
        normal, log_weight = normal_of(group.prior), torch.zeros(len(u), device=u.device)
        with at_precision(u.device.type, torch.float32):  # also for a VAE in bfloat16
            z = _from_noise(group.prior, u)
            if normal is None:
                log_p = group.prior.log_prob(z)  # type: ignore[attr-defined]
                log_weight = log_weight + log_p + 0.5 * _sum(u.square())
            elif self.official:
                log_weight = log_weight - _sum(normal.scale.log().expand_as(u))
        if self.prior is not None and self.prior.is_on(k):
            log_r = self.prior.log_r(k, z, group.context, precision=self.precision)
            log_weight = log_weight + self.prior.strength * log_r
        return z, log_weight

    def _image(self, normal: Normal, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x at noise u, with its log-weight."""
        if not self.official:
            return normal.loc + normal.scale * u, torch.zeros(len(u), device=u.device)
        drawn = getattr(normal, "drawn_scale", normal.scale)
        log_ratio = -0.5 * (drawn / normal.scale * u).square() - normal.scale.log()
        return normal.loc + drawn * u, _sum(log_ratio + 0.5 * u.square())


def shapes_of(noise: Any) -> list[Size]:  # noqa: ANN401
    """Returns the shapes of the parts of noise, after a check of their types, rows and values.

    Raises:
        TypeError: If the noise is not a list of tensors of floats.
        ValueError: If the parts have different numbers of rows or no rows, or a value is NaN or
            infinite.
    """
    is_list = isinstance(noise, tuple | list) or (isinstance(noise, Tensor) and noise.ndim > 0)
    parts: list[Any] = list(noise) if is_list else [None]
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        raise TypeError(
            f"noise must be a list of tensors of floats; got {described(noise)}. Pass that of "
            f"draw_noise or of other chains."
        )
    shapes: list[Size] = [part.shape for part in parts]
    if len({shape[:1] for shape in shapes}) != 1 or shapes[0][:1] in ((), (0,)):
        raise ValueError(
            f"noise must be tensors with the same 1 or more rows; got the shapes "
            f"{[tuple(shape) for shape in shapes]}. Pass that of draw_noise or of other chains."
        )
    for k, part in enumerate(parts):
        require_finite(f"noise[{k}]", part)
    return shapes


def _to_noise(prior: object, z: Tensor) -> Tensor:
    """Returns ε_k of z_k for a normal prior, u_k for a mixture, else z_k itself."""
    normal = normal_of(prior)
    if normal is not None:
        return (z - normal.loc) / normal.scale
    return prior.whiten(z) if isinstance(prior, GaussianMixture) else z


def _from_noise(prior: object, u: Tensor) -> Tensor:
    """Returns z_k of ε_k or u_k, the inverse of :func:`_to_noise`."""
    normal = normal_of(prior)
    if normal is not None:
        return normal.loc + normal.scale * u
    return prior.unwhiten(u) if isinstance(prior, GaussianMixture) else u


def normal_of(distribution: object) -> Normal | None:
    """Returns the normal inside ``Independent``; ``None`` for any other distribution."""
    while type(distribution) is Independent:
        distribution = distribution.base_dist
    return distribution if isinstance(distribution, Normal) else None


def _mean(
    likelihood: Distribution,
    source: LatentSource[Any, Any],
    state: Any,  # noqa: ANN401
) -> Tensor:
    """Mean of p(x | z); from ``source.decode``, at twice the cost, if there is no other."""
    try:
        mean = likelihood.mean
    except (AttributeError, NotImplementedError):
        mean = source.decode(state)
    if not isinstance(mean, Tensor):
        raise TypeError(
            f"likelihood(state) must return p(x | z), a distribution; got {described(likelihood)}. "
            f"From the mean x̂ of x make Independent(Normal(x̂, σ), x̂.ndim - 1)."
        )
    return mean


@torch.no_grad()
def described_noise(source: LatentSource[Any, Any]) -> str:
    """Describes a decoder's noise after one walk, which validates the groups."""
    require_eval(source, source.module)
    try:
        source.start(1)
    except ValueError:
        return "that of p(x | z), under a condition"
    with seeded(0):
        walked = NoiseMap(source).draw(1)
    if len(walked.noise) > source.num_groups:
        return "location and scale of p(x | z)"
    return "none, as p(x | z) is not normal: x is its mean"


def _require_density(k: int, group: Group) -> None:
    if not supports_langevin(group.prior):
        kind = (
            "is discrete or bounded" if isinstance(group.prior, Distribution) else "has no density"
        )
        raise TypeError(
            f"Group {k}: VAEBM uses Langevin dynamics, which needs a density on all of R^n; "
            f"the prior {name_of(group.prior)} {kind}. Put a base with a density on the source: "
            f"rebase(source, base)."
        )


def _require_event(k: int, group: Group, u: Tensor) -> None:
    event = getattr(group.prior, "event_shape", u.shape[1:])
    if u.shape[1:] != event:
        raise ValueError(
            f"The noise of group {k} must have shape (B, *event) with the event {tuple(event)}; got "
            f"{tuple(u.shape)}. Pass that of draw_noise or of other chains."
        )


def _sum(u: Tensor) -> Tensor:
    """Sum over all axes but the first, in float32 or better."""
    return at_least_float32(u).reshape(len(u), -1).sum(1)
