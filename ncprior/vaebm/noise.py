r"""The map from noise to (z, x), in whose coordinates a VAE is a unit Gaussian.

Where p(z_k | z_<k) and p(x | z) are normal, group by group

.. math::
    z_k = \mu_k(z_{<k}) + \sigma_k(z_{<k}) \, \varepsilon_k, \qquad
    x = \mu_x(z) + \sigma_x(z) \, \varepsilon_x, \qquad \varepsilon \sim N(0, I).

The map is one to one and its Jacobian is the product of all σ, so that p(z, x) pulled back to ε is
N(0, I), whatever μ and σ do. Three cases have no such noise:

* a group of another density, such as a flow, is walked in z_k itself, a mixture of Gaussians in
  u_k of z_k = m + S u_k, with m its mean and S Sᵀ the mean covariance of its components, so that no
  direction is narrow (:meth:`ncprior.bases.GaussianMixture.whiten`);
* a decoder whose law is not normal, such as a Bernoulli, gives its mean as x, without ε_x;
* a group that is discrete, bounded or can only be sampled cannot be walked in, and is refused.

Everything that is not N(0, I) is in one log-weight: log r_k of the heads, log p(z_k) of groups
walked in z_k or u_k, and what the published code of VAEBM adds (see :class:`NoiseMap`).

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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ncprior.bases.mixture import GaussianMixture
from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.samplers.langevin import name_of, supports_langevin
from ncprior.source import Group, LatentSource, visit
from ncprior.utils.precision import at_least_float32, at_precision


class Walked(NamedTuple):
    """One walk from noise to an image.

    Attributes:
        noise: ε_k of every group, each ``(B, *event)``, or z_k or u_k where the group is walked in
            those; and, of a normal decoder, ε_x as the last.
        latents: z_k of every group, each ``(B, *event)``.
        mean: The decoder's mean, with shape ``(B, ...)``.
        x: The mean with the decoder's noise on it; the mean itself where there is none.
        log_weight: Log-density of the walk's target over N(0, I) of all noise, without the energy
            and up to a constant, in nats, with shape ``(B,)``.
    """

    noise: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    mean: Tensor
    x: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class NoiseMap:
    """Walks a VAE from noise to (z, x), with the log-weight of Π r_k p_k on the way.

    Arguments:
        source: The VAE, with ``likelihood``.
        prior: The ratio heads that reweigh its groups, or ``None``.
        condition: What the source needs when there is no x, or ``None``.
        official: Whether -log p(z) - log p(x | z) stands in for ½|ε|², as in VAEBM's published
            code. It forgets the Jacobian: the target gets the factors Π 1/σ_k(z_<k) and
            Π 1/σ_x(z). And where a decoder's law tells a ``drawn_scale``, x is drawn with that and
            judged by the law's own scale, which VAEBM bounds from below.
        precision: Of products on walks from given noise, of heads and, if it is
            ``torch.bfloat16``, of the VAE, which else is as it is called; noise, z and log-weights
            are in float32 or better.
    """

    source: LatentSource[Any, Any]
    prior: NCPrior | None = None
    condition: Any = None
    official: bool = False
    precision: torch.dtype = torch.float32

    def draw(self, batch_size: int, sampler: Sampler | None = None) -> Walked:
        """Walks from fresh noise: of the VAE, or of the heads' own sampler if one is given."""

        def pick(k: int, group: Group) -> Tensor:
            if self.prior is None or sampler is None:
                z = group.prior.sample()
            else:
                z = self.prior.draw(k, group, sampler).z
            return _to_noise(group.prior, z)

        return self._walk(batch_size, pick, torch.randn_like)

    def __call__(self, noise: tuple[Tensor, ...]) -> Walked:
        """Walks from given noise, differentiably.

        Raises:
            ValueError: If it is not the noise of every group and, where there is any, the decoder.
        """
        needed = self.source.num_groups
        if len(noise) in (needed, needed + 1):
            low = self.precision == torch.bfloat16  # else the caller's own autocast holds
            with at_precision(noise[0].device.type, self.precision) if low else nullcontext():
                walked = self._walk(len(noise[0]), lambda k, _: noise[k], lambda _: noise[-1])
            needed = len(walked.noise)
        if len(noise) != needed:
            raise ValueError(
                f"This walk needs {needed} parts of noise, one per group and one for a decoder "
                f"with noise; got {len(noise)}. Take those of draw_noise or of other chains."
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
            _require_density(k, group)
            u = pick(k, group)
            z, log_weight = self._latents(k, group, u)
            noise.append(u)
            log_weights.append(log_weight)
            return z

        start = self.source.start(batch_size, condition=self.condition)
        latents, state = visit(self.source, start, choose)
        law = self.source.likelihood(state)
        normal = normal_of(law)
        if normal is None:
            x = mean = at_least_float32(_mean(law, self.source, state))
        else:
            mean = at_least_float32(normal.loc)
            u = pick_x(mean)
            x, log_weight = self._image(normal, u)
            noise.append(u)
            log_weights.append(log_weight)
        return Walked(tuple(noise), latents, mean, x, torch.stack(log_weights).sum(0))

    def _latents(self, k: int, group: Group, u: Tensor) -> tuple[Tensor, Tensor]:
        """z_k at noise u, and its log-weight."""
        normal, log_weight = normal_of(group.prior), torch.zeros(len(u), device=u.device)
        with at_precision(u.device.type, torch.float32):  # whatever the VAE's products are in
            z = _from_noise(group.prior, u)
            if normal is None:
                log_weight = log_weight + group.prior.log_prob(z) + 0.5 * _sum(u.square())  # type: ignore[attr-defined]
            elif self.official:
                log_weight = log_weight - _sum(normal.scale.log().expand_as(u))
        if self.prior is not None and self.prior.is_on(k):
            log_r = self.prior.log_r(k, z, group.context, precision=self.precision)
            log_weight = log_weight + self.prior.strength * log_r
        return z, log_weight

    def _image(self, normal: Normal, u: Tensor) -> tuple[Tensor, Tensor]:
        """x at noise u, and its log-weight."""
        if not self.official:
            return normal.loc + normal.scale * u, torch.zeros(len(u), device=u.device)
        drawn = getattr(normal, "drawn_scale", normal.scale)
        log_ratio = -0.5 * (drawn / normal.scale * u).square() - normal.scale.log()
        return normal.loc + drawn * u, _sum(log_ratio + 0.5 * u.square())


def _to_noise(prior: object, z: Tensor) -> Tensor:
    """ε_k of z_k; u_k of a mixture; else z_k itself."""
    normal = normal_of(prior)
    if normal is not None:
        return (z - normal.loc) / normal.scale
    return prior.whiten(z) if isinstance(prior, GaussianMixture) else z


def _from_noise(prior: object, u: Tensor) -> Tensor:
    """z_k of ε_k or u_k: the inverse of :func:`_to_noise`."""
    normal = normal_of(prior)
    if normal is not None:
        return normal.loc + normal.scale * u
    return prior.unwhiten(u) if isinstance(prior, GaussianMixture) else u


def normal_of(law: object) -> Normal | None:
    """Returns the normal whose location and scale make a law of noise; ``None`` if it is none."""
    while type(law) is Independent:
        law = law.base_dist
    return law if isinstance(law, Normal) else None


def _mean(law: Distribution, source: LatentSource[Any, Any], state: Any) -> Tensor:  # noqa: ANN401
    """The mean of p(x | z): the law's own, or else what the source decodes, at twice the price."""
    try:
        return law.mean
    except (AttributeError, NotImplementedError):
        return source.decode(state)


def _require_density(k: int, group: Group) -> None:
    if not supports_langevin(group.prior):
        kind = "is discrete or bounded" if isinstance(group.prior, Distribution) else "has none"
        raise TypeError(
            f"Group {k}: VAEBM walks by Langevin dynamics, which needs a density on all of R^n; "
            f"the prior {name_of(group.prior)} {kind}. Put a base with one on the source: "
            f"rebase(source, base)."
        )


def _sum(u: Tensor) -> Tensor:
    """The sum over all axes but the first, in float32 or better."""
    return at_least_float32(u).reshape(len(u), -1).sum(1)
