r"""Other base priors for a frozen VAE: NCP on a closer base has less to correct.

    source = rebase(source, fit_mixture(latents_of(source, x)))

A base is a distribution or sampler of z_k: a fitted mixture, a VampPrior, a normalizing flow, flow
matching, the training encodings themselves, or a tempered prior, see :mod:`ncprior.bases`. Decoder
and posterior remain those of the wrapped source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Size, Tensor
from torch.distributions import Distribution

from ncprior.distributions import Sampleable, expand, is_prior
from ncprior.source import Group, LatentSource, WrappedSource, num_rows
from ncprior.utils.random_state import seeded
from ncprior.utils.require import described
from ncprior.utils.supports import SIMPLEX, SPHERE, is_outside, shown_by, support_of

Base: TypeAlias = "Sampleable | Callable[[int, Group], Sampleable] | Sequence[Any]"


def rebase(source: LatentSource[Any, Any], base: Base) -> Rebased:
    """Returns a source with another base prior.

    Arguments:
        source: The VAE.
        base: ``base(k, group)`` returns the new prior of group k from ``group.prior`` and
            ``group.context``. Or a list with one base per group, or with one group the base itself:
            a prior with an empty batch shape, which is a ``Distribution`` or anything with
            ``sample(sample_shape)``; or a conditional prior, an object whose ``given(context)``
            returns the prior of B rows from ``group.context``, with shape ``(B, ...)``.

            The networks behind a function, and conditional priors of your own, are not identified
            when heads are saved: they load without an error on one that has changed.

    Returns:
        The same VAE with that prior.

    Raises:
        ValueError: If the number of priors is not that of the groups, one has a batch shape, or it
            leaves the set of the VAE's latents, such as a simplex, a sphere or codes.
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
        prior: The prior itself if one was given, ``None`` if it is a function, conditional or one
            of several.
        bases: The bases of all groups, or ``None`` if a function was given.

    Example:
        >>> from ncprior.bases import fit_gaussian, latents_of
        >>> closer = Rebased(source, fit_gaussian(latents_of(source, x)))
        >>> closer.module is source.module, type(closer.prior).__name__
        (True, 'GaussianMixture')
    """

    def __init__(self, source: LatentSource[Any, Any], base: Base) -> None:
        super().__init__(source)
        self.bases: tuple[Any, ...] | None = None
        self._base: Any = None
        if is_prior(base) or _is_conditional(base):
            self.bases = (_checked(base),)
        elif isinstance(base, list | tuple):
            self.bases = tuple(_checked(one) for one in base)
        elif callable(base) and not isinstance(base, type | Sampleable):
            self._base = base
        else:
            raise TypeError(
                f"base must be a prior with a method sample(sample_shape), a list of one for each "
                f"group, or a function base(k, group) that makes one; got {described(base)}. Pass "
                f"one of ncprior.bases."
            )
        if self.bases is not None and len(self.bases) != source.num_groups:
            raise ValueError(
                f"{len(self.bases)} priors are given for the {source.num_groups} groups of the "
                f"source. Pass one prior for each group in a list, or base(k, group), which makes the "
                f"prior of group k."
            )
        one = self.bases[0] if self.bases is not None and len(self.bases) == 1 else None
        self.prior: Sampleable | None = None if _is_conditional(one) else one
        if self.prior is not None:
            _require_inside(source.shared_prior(), self.prior)

    class State(NamedTuple):
        """The state of the wrapped source, and the index of its next group."""

        inner: Any
        k: int

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> State:  # noqa: ANN401
        """Returns the state in front of the first group."""
        return self.State(self.source.start(batch_size, encoding, condition), 0)

    def group(self, state: State) -> Group:
        """Returns the group of the wrapped source, with the new prior."""
        group = self.source.group(state.inner)
        prior = self._new_prior(state, group)
        given = prior if self.prior is None else self.prior
        self._check_event(state.k, given, group.posterior)
        return group._replace(prior=prior)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state behind z_k, which has shape ``(B, *event)``."""
        return self.State(self.source.advance(state.inner, z), state.k + 1)

    def decode(self, state: State) -> Tensor:
        """Returns the decoder's mean."""
        return self.source.decode(state.inner)

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z) of the wrapped source."""
        return self.source.likelihood(state.inner)

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the wrapped source, and those of the function that makes the base."""
        of_base: Any = getattr(self._base, "facts", dict)
        return {**super().facts(), **of_base()}

    def shared_prior(self) -> Sampleable | None:
        """Returns the prior itself if one was given for a single group, else ``None``."""
        return self.prior

    def _new_prior(self, state: State, group: Group) -> Sampleable:
        if self.bases is None:
            prior: Sampleable = self._base(state.k, group)
        else:
            base = self.bases[state.k]
            prior = _given(base, group) if _is_conditional(base) else base
        if not is_prior(prior):
            whose = "base(k, group)" if self.bases is None else "given(context)"
            raise TypeError(
                f"Group {state.k}: {whose} must return a prior with a method sample; got "
                f"{described(prior)}."
            )
        shared = self.bases is not None and prior is self.bases[state.k]
        if shared or (isinstance(prior, Distribution) and not prior.batch_shape):
            return expand(prior, num_rows(state.inner))
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


def _is_conditional(base: Any) -> bool:  # noqa: ANN401
    """Whether a base is a prior only given a context."""
    has = not isinstance(base, type) and callable(getattr(base, "given", None))
    return has and bool(getattr(base, "needs_context", True))


def _given(base: Any, group: Group) -> Any:  # noqa: ANN401
    """The prior of B rows, of a base that is conditional."""
    if getattr(base, "is_relative", False):
        return base.given(group.context, group.prior)
    return base.given(group.context)


def _checked(base: Any) -> Any:  # noqa: ANN401
    """Returns the base of one group after a check that it is a prior, for one row or conditional."""
    if not (is_prior(base) or _is_conditional(base)):
        raise TypeError(
            f"The base of a group must be a prior with a method sample(sample_shape), or have a "
            f"method given(context) that returns one; got {described(base)}. Pass one of "
            f"ncprior.bases."
        )
    if isinstance(base, Distribution) and base.batch_shape:
        raise ValueError(
            f"base must have an empty batch shape; got batch shape {tuple(base.batch_shape)}. Wrap "
            f"it in Independent(base, {len(base.batch_shape)})."
        )
    return base


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
