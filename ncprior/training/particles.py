r"""Posterior of a VAE under a better prior, by importance resampling: the E step of EM.

The aggregate of q(z | x), on which heads are trained by default, is the best prior for samples that
look like decoded encodings. The best prior for likelihood is another one. Under a prior p'(z), the
posterior of x is p'(z | x) ∝ p(x | z) p'(z). The prior of highest likelihood is the aggregate of its
own posterior,

.. math::
    p'(z) = E_x [\, p'(z | x) \,].

EM iterates this equation: draws of p'(z | x) under the current prior (E step) are the posterior
samples on which the next heads or the next base are trained (M step). No step lowers the likelihood of
the data, apart from the errors of the training.

With S draws :math:`z^s \sim q(z | x)` and the weights

.. math::
    w_s \propto p(x | z^s) \prod_k
        \frac{p(z_k^s | z_{<k}^s) \, r_k(z_k^s, z_{<k}^s)^\alpha}{q(z_k^s | z_{<k}^s, x)},
    \qquad \sum_s w_s = 1,

p'(z | x) is approximated by the particles z^s with probabilities w_s; log Z cancels. For S → ∞ the
approximation is exact, for S = 1 it is q(z | x). In between, its error is about one part in ESS, the
effective sample size :math:`1 / \sum_s w_s^2`; such a step of EM goes a part of the way.

References:
    | Reweighted Wake-Sleep (Bornschein & Bengio, ICLR 2015)
    | Reinterpreting Importance-Weighted Autoencoders (Cremer, Morris & Duvenaud, 2017)
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ncprior.data.checked import log_prob_of_data
from ncprior.distributions import is_point
from ncprior.prior import NCPrior
from ncprior.saving.identity import heads_on, prior_facts
from ncprior.source import (
    Group,
    LatentSource,
    WrappedSource,
    device_of,
    num_rows,
    posterior_of,
    visit,
)
from ncprior.utils.batches import own_batch, tile_rows
from ncprior.utils.draws import gumbel, sample_and_log_prob
from ncprior.utils.precision import at_least_float32
from ncprior.utils.random_state import random_state
from ncprior.utils.require import require_counts, require_shape
from ncprior.utils.trees import same
from ncprior.utils.visible import require_eval


class Particles(Distribution):
    """Weighted particles as a distribution: z^s with probability w_s. It has no density.

    Arguments:
        z: Particles, with shape ``(B, S, *event)``.
        log_w: Logarithms of their weights, up to a constant, with shape ``(B, S)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, z: Tensor, log_w: Tensor) -> None:
        self.z, self.log_w = z, log_w
        super().__init__(z.shape[:1], z.shape[2:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the particles, with shape ``(B, *event)``."""
        w = self.log_w.softmax(1).reshape(*self.log_w.shape, *(1 for _ in self.event_shape))
        return (w * self.z).sum(1)

    def sample(self, sample_shape: Any = ()) -> Tensor:  # noqa: ANN401
        """Draws particles, with shape ``(*sample_shape, B, *event)``, without a wait for a GPU."""
        shape = require_shape("sample_shape", sample_shape)
        noise = gumbel(self.log_w, (*shape, *self.log_w.shape))
        chosen = (self.log_w + noise).argmax(-1)  # the Gumbel-max trick
        return self.z[torch.arange(len(self.z), device=chosen.device), chosen]

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises an error.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Resampled draws of q(z | x) have no density. Where one is needed, take the source that "
            "they are made of, resampled.source."
        )


class _Encoding(NamedTuple):
    inner: Any
    latents: tuple[Tensor, ...]  # (B, S, *event) per group
    log_w: Tensor  # (B, S); the largest of each row is 0


class _State(NamedTuple):
    inner: Any
    latents: tuple[Tensor, ...]  # of this and all later groups
    log_w: Tensor | None


class ResampledPosterior(WrappedSource):
    """A VAE with particles of p'(z | x), its posterior under a better prior, instead of q(z | x).

    It is used like any source, for the M step of EM: ``latents_of(resampled, data)`` are draws to fit
    a base to, and ``NCPrior(resampled, heads)`` is a prior whose heads are trained on them, by a loop of
    your own. ``fit(prior, data, settings=FitSettings(importance_samples=16))`` makes one for heads.

    Each ``encode`` draws anew, and costs S passes through the decoder.

    Arguments:
        prior: The current prior p'; it is copied, so that training its heads does not change the
            weights. Or a source, whose own prior is then p'. The source needs ``likelihood``, and
            densities of its priors and posteriors.
        num_samples: S, the draws of q(z | x) per row.
        chunk_size: Largest number of z that are decoded at once, if it is at least the rows of a
            batch.

    Raises:
        TypeError: If the prior is neither an NCPrior nor a source, or a count no whole number.
        ValueError: If a count is below 1.

    References:
        Bornschein & Bengio (2015), the wake-phase update of q.

    Example:
        >>> from ncprior.bases import fit_gaussian, latents_of, rebase
        >>> resampled = ResampledPosterior(prior, num_samples=8)
        >>> closer = rebase(source, fit_gaussian(latents_of(resampled, x)))
        >>> NCPrior.for_source(closer, x).nce_loss(x).shape
        torch.Size([1])
    """

    def __init__(
        self,
        prior: NCPrior | LatentSource[Any, Any],
        num_samples: int = 16,
        *,
        chunk_size: int = 4096,
    ) -> None:
        require_counts(num_samples=num_samples, chunk_size=chunk_size)
        super().__init__(prior.source if isinstance(prior, NCPrior) else prior)
        self.prior = _frozen(prior) if isinstance(prior, NCPrior) else None
        self.num_samples, self.chunk_size = int(num_samples), int(chunk_size)
        self._draws: bool | None = None  # whether the VAE's encode draws z; not known yet

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the VAE, the number of particles and the prior that weighs them."""
        weighs = None if self.prior is None else prior_facts(self.prior, None)
        own = {"num_samples": self.num_samples, "prior": weighs}
        return {**super().facts(), "ResampledPosterior": own}

    @torch.no_grad()
    def encode(self, x: Any) -> _Encoding:  # noqa: ANN401
        """Returns the encoding of the VAE, with particles and their weights.

        Raises:
            TypeError: If a prior or posterior has no density.
            ValueError: If the source has no likelihood.
            FloatingPointError: If all weights of a row are 0, or one is NaN or infinite.
        """
        require_eval(self.source, self.source.module)
        encoding = self._encode(x)
        rows, walks = num_rows(encoding), []
        at_once = max(1, self.chunk_size // max(1, rows))
        for some in torch.arange(self.num_samples).split(at_once):
            tiled = tile_rows(x, len(some))
            codes = self.source.encode(tiled) if self._draws else tile_rows(encoding, len(some))
            latents, log_w = self._walk(codes, tiled)
            walks.append([t.reshape(len(some), rows, *t.shape[1:]) for t in (*latents, log_w)])
        *particles, log_w = (torch.cat(t).transpose(0, 1) for t in zip(*walks, strict=True))
        most = log_w.amax(1, keepdim=True)
        if not torch.isfinite(most).all():  # one wait for S passes of the decoder
            raise FloatingPointError(
                "log p(x, z) - log q(z | x) or log r is NaN or infinite for some rows. Look for NaN or "
                "infinity in x, the VAE, its likelihood or the heads, and for q(z | x) of scale 0."
            )
        return _Encoding(encoding, tuple(z.contiguous() for z in particles), log_w - most)

    def ess(self, x: Any) -> Tensor:  # noqa: ANN401
        """Returns the effective sample size of new particles of each row, from 1 to S.

        Arguments:
            x: One batch, as the user's loader yields it.

        Returns:
            :math:`1 / \\sum_s w_s^2`, with shape ``(B,)``.

        Example:
            >>> ess = ResampledPosterior(prior, num_samples=8).ess(x)
            >>> ess.shape, bool((1 <= ess).all()), bool((ess <= 8).all())
            (torch.Size([4]), True, True)
        """
        return ess_of(self.encode(own_batch(x, device_of(self.source))).log_w)

    def start(
        self,
        batch_size: int,
        encoding: _Encoding | None = None,
        condition: Any = None,  # noqa: ANN401
    ) -> _State:
        """Returns the state before the first group."""
        if encoding is None:
            return _State(self.source.start(batch_size, None, condition), (), None)
        inner = self.source.start(batch_size, encoding.inner, condition)
        return _State(inner, encoding.latents, encoding.log_w)

    def group(self, state: _State) -> Group:
        """Returns the group of the VAE; its posterior are the particles that share z_<k."""
        group = self.source.group(state.inner)
        if state.log_w is None:
            return group
        return group._replace(posterior=Particles(state.latents[0], state.log_w))

    def advance(self, state: _State, z: Tensor) -> _State:
        """Returns the state after the group; particles with another z_k have weight 0 from there on."""
        inner, log_w = self.source.advance(state.inner, z), state.log_w
        if log_w is not None:
            equal = (state.latents[0] == z[:, None]).reshape(*log_w.shape, -1).all(2)
            log_w = log_w.masked_fill(~equal & equal.any(1, keepdim=True), -torch.inf)
        return _State(inner, state.latents[1:], log_w)

    def decode(self, state: _State) -> Tensor:
        """Returns the mean of p(x | z)."""
        return self.source.decode(state.inner)

    def likelihood(self, state: _State) -> Distribution:
        """Returns p(x | z)."""
        return self.source.likelihood(state.inner)

    def _encode(self, x: Any) -> Any:  # noqa: ANN401
        """Encodes a batch, and learns at the first one whether encoding draws at random."""
        if self._draws is not None:
            return self.source.encode(x)
        before = random_state()
        encoding = self.source.encode(x)
        self._draws = not same(random_state(), before)  # as a posterior that is drawn bottom-up
        return encoding

    def _walk(self, encoding: Any, x: Any) -> tuple[tuple[Tensor, ...], Tensor]:  # noqa: ANN401
        """Draws of q(z | x), and log p(x, z) + α log r - log q(z | x) in nats, one per row."""
        terms: list[Tensor] = []

        def weigh(k: int, group: Group) -> Tensor:
            z, log_p, log_q = _with_densities(k, group)
            terms.append(at_least_float32(log_p) - at_least_float32(log_q))
            if self.prior is not None and self.prior.is_on(k):
                log_r = self.prior.log_r(k, z[None], group.context)[0]
                terms.append(self.prior.strength * log_r)
            return z

        latents, state = visit(self.source, self.source.start(num_rows(encoding), encoding), weigh)
        terms.append(
            at_least_float32(
                log_prob_of_data(self.source.likelihood(state), self.source.observed(x))
            )
        )
        return latents, torch.stack(terms).sum(0)


def ess_of(log_w: Tensor) -> Tensor:
    """Returns the effective sample size of weights with shape ``(B, S)``, with shape ``(B,)``."""
    return 1 / log_w.softmax(1).square().sum(1)


def _frozen(prior: NCPrior) -> NCPrior:
    """Returns a copy of a prior in evaluation mode, on the same source."""
    copy = deepcopy(prior).eval().requires_grad_(False)
    copy.active = heads_on(prior)
    return copy


def _with_densities(k: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Draws z_k, with log p(z_k) and log q(z_k), after a check that both are known."""
    name, of = "prior", group.prior
    try:
        if not isinstance(group.prior, Distribution):
            raise NotImplementedError
        name, of = "posterior", posterior_of(group)
        if is_point(of):
            raise NotImplementedError("A point of real z has none.")
        z, log_q = sample_and_log_prob(of)
        name, of = "prior", group.prior
        return z, group.prior.log_prob(z), log_q
    except NotImplementedError as error:
        raise TypeError(
            f"Importance samples need log p(z) and log q(z | x); the {name} of group {k}, a "
            f"{type(of).__name__}, can only be sampled. Give it a density, or leave importance "
            f"samples out. {error}".rstrip()
        ) from error
