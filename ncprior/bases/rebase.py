r"""Other base priors for a frozen VAE: NCP on a closer base has less to correct.

    source = rebase(source, fit_mixture(latents_of(source, x)))

A base is a distribution or sampler of z_k: a fitted mixture, a VampPrior, a normalizing flow, flow
matching, the training encodings themselves, or a tempered prior, see :mod:`ncprior.bases`. Decoder
and posterior remain those of the wrapped source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Size, Tensor
from torch.distributions import Distribution

from ncprior.distributions import Sampleable, expand, is_prior
from ncprior.source import Group, LatentSource, WrappedSource, num_rows
from ncprior.utils.random_state import seeded
from ncprior.utils.require import described
from ncprior.utils.supports import SIMPLEX, SPHERE, is_outside, shown_by, support_of

Base: TypeAlias = "Sampleable | Callable[[int, Group], Sampleable]"


def rebase(source: LatentSource[Any, Any], base: Base) -> Rebased:
    """Returns a source with another base prior.

    Arguments:
        source: The VAE.
        base: ``base(k, group)`` returns the new prior of group k from ``group.prior`` and
            ``group.context``. With one group of latents it can be the prior itself, with an empty
            batch shape: a ``Distribution``, or anything with ``sample(sample_shape)``.

            The networks behind a function are not identified when heads are saved: they load
            without an error on a function that has changed.

    Returns:
        The same VAE with that prior.

    Raises:
        ValueError: If one prior is given for several groups, it has a batch shape, or it leaves the
            set of the VAE's latents, such as a simplex, a sphere or codes.
        TypeError: If the base can neither be sampled nor called, or is a class.

    Example:
        >>> from ncprior.bases import fit_gaussian, latents_of
        >>> closer = rebase(source, fit_gaussian(latents_of(source, x)))
        >>> closer.group(closer.start(4)).prior.sample().shape
        torch.Size([4, 2])

        The same prior at temperature 0.7:

        >>> def tempered(k, group):
        ...     p = group.prior
        ...     return Independent(Normal(p.mean, 0.7 * p.stddev), len(p.event_shape))
        >>> colder = rebase(source, tempered)
    """
    return Rebased(source, base)


def without_bases(source: LatentSource[Any, Any]) -> LatentSource[Any, Any]:
    """Returns the VAE with its own prior: the source below all bases of :func:`rebase`."""
    while isinstance(source, Rebased):
        source = source.source
    return source


class Rebased(WrappedSource):
    """A source with another base prior, made by :func:`rebase`.

    Attributes:
        source: The wrapped source.
        prior: The prior itself if one was given, ``None`` if a function was.

    Example:
        >>> from ncprior.bases import fit_gaussian, latents_of
        >>> closer = Rebased(source, fit_gaussian(latents_of(source, x)))
        >>> closer.module is source.module, type(closer.prior).__name__
        (True, 'GaussianMixture')
    """

    def __init__(self, source: LatentSource[Any, Any], base: Base) -> None:
        super().__init__(source)
        prior: Sampleable | None = base if is_prior(base) else None
        function = base if prior is None else None
        if prior is None and (not callable(base) or isinstance(base, type | Sampleable)):
            raise TypeError(
                f"base must be a prior with a method sample(sample_shape), or a function base(k, "
                f"group) that makes one; got {described(base)}. Pass one of ncprior.bases."
            )
        if isinstance(prior, Distribution) and prior.batch_shape:
            raise ValueError(
                f"base must have an empty batch shape; got batch shape "
                f"{tuple(prior.batch_shape)}. Wrap it in Independent(base, {len(prior.batch_shape)})."
            )
        if prior is not None and source.num_groups > 1:
            raise ValueError(
                f"One prior is given for the {source.num_groups} groups of the source. "
                f"Pass base(k, group), which makes the prior of group k."
            )
        if prior is not None:
            _require_inside(source.shared_prior(), prior)
        self.prior: Sampleable | None = prior
        self._base: Any = function

    class State(NamedTuple):
        """The state of the wrapped source, and the index of its next group."""

        walk: Any
        k: int

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> State:  # noqa: ANN401
        """Returns the state in front of the first group."""
        return self.State(self.source.start(batch_size, encoding, condition), 0)

    def group(self, state: State) -> Group:
        """Returns the group of the wrapped source, with the new prior."""
        group = self.source.group(state.walk)
        prior = self._new_prior(state, group)
        given = prior if self.prior is None else self.prior
        self._check_event(state.k, given, group.posterior)
        return group._replace(prior=prior)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state behind z_k, which has shape ``(B, *event)``."""
        return self.State(self.source.advance(state.walk, z), state.k + 1)

    def decode(self, state: State) -> Tensor:
        """Returns the decoder's mean."""
        return self.source.decode(state.walk)

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z) of the wrapped source."""
        return self.source.likelihood(state.walk)

    def shared_prior(self) -> Sampleable | None:
        """Returns the prior itself if one was given, ``None`` if a function was."""
        return self.prior

    def _new_prior(self, state: State, group: Group) -> Sampleable:
        if self.prior is not None:
            return expand(self.prior, num_rows(state.walk))
        prior: Sampleable = self._base(state.k, group)
        if not is_prior(prior):
            raise TypeError(
                f"Group {state.k}: base(k, group) must return a prior with a method sample; got "
                f"{described(prior)}."
            )
        if isinstance(prior, Distribution) and not prior.batch_shape:
            return expand(prior, num_rows(state.walk))
        return prior

    @staticmethod
    def _check_event(k: int, prior: Sampleable, posterior: Distribution | None) -> None:
        event_shape = getattr(prior, "event_shape", None)
        if posterior is not None and event_shape not in (None, posterior.event_shape):
            raise ValueError(
                f"Group {k}: the base has latents of shape {tuple(event_shape)}, and "
                f"q(z | x) of {tuple(posterior.event_shape)}. Fit it on latents_of(source, x), "
                f"which keeps their shape."
            )


def _require_inside(own: Any, base: Sampleable) -> None:  # noqa: ANN401
    """Validates that a base draws on the simplex, the sphere, … of the VAE's own prior."""
    where = support_of(own) if is_prior(own) else ""
    if not where:
        return
    with seeded(0):
        z = base.sample(_PROBED)
    outside = isinstance(own, Distribution) and bool(is_outside(own, z).any())
    if outside or (where in (SIMPLEX, SPHERE) and shown_by(z) != where):
        raise ValueError(
            f"The latents of this VAE are {where}, and the base {type(base).__name__} draws others, "
            f"which the decoder has never seen. Take a base of the same set, such as "
            f"Empirical(latents_of(source, x)), or keep the VAE's own prior."
        )


_PROBED = Size((64,))
