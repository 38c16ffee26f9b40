r"""A pretrained VAE as groups of latents that are visited in order.

A VAE with K groups of latents factorises its prior and its posterior as

.. math::
    p(z) = \prod_k p(z_k | z_{<k}), \qquad q(z | x) = \prod_k q(z_k | z_{<k}, x).

A :class:`LatentSource` visits the groups one after the other: ``start`` returns a first state,
``group`` the distributions p(z_k | z_<k) and, given an x, q(z_k | z_<k, x), ``advance`` the next
state given z_k, and ``decode`` the mean of p(x | z) from the last state. A state is a value: it can
be copied, indexed by rows, cached and compared.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from ncprior.distributions import Sampleable, naming_bad_rows
from ncprior.utils.batches import data_of, own_batch, tensors_of
from ncprior.utils.draws import drawn
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.random_state import seeded
from ncprior.utils.require import (
    described,
    require_callable,
    require_counts,
    require_finite,
    require_instance,
)
from ncprior.utils.visible import require_eval, visible_tensors

E = TypeVar("E")
S = TypeVar("S")


class Group(NamedTuple):
    """Prior, posterior and context of z_k, given z_<k and, in training, x; batch shape ``(B,)``.

    Attributes:
        prior: p(z_k | z_<k), a torch ``Distribution`` wherever the density is known.
        posterior: q(z_k | z_<k, x), or ``None`` without an x.
        context: c(z_<k), the second input of the ratio head: a function of z_<k and of a condition,
            with shape ``(B, ...)``, or ``None``.

    Example:
        >>> group = Group(prior=Independent(Normal(torch.zeros(5, 2), 1.0), 1))
        >>> group.prior.sample().shape
        torch.Size([5, 2])
    """

    prior: Sampleable
    posterior: Distribution | None = None
    context: Tensor | None = None


class LatentSource(Protocol[E, S]):
    """A pretrained VAE as groups of latents that are visited in order; the base class of sources.

    A subclass must define ``num_groups``, ``encode``, ``start``, ``group``, ``advance`` and
    ``decode``. Other members have defaults.

    Encodings, states and conditions are pytrees of tensors whose first axis is the batch. ``start``
    and ``advance`` return new states; ``group`` and ``decode`` are pure functions of a state, may be
    called any number of times, and draw nothing. A source never disables gradients and never
    detaches; its callers do. :func:`ncprior.testing.check_source` tests an implementation.

    Attributes:
        num_groups: K, the number of latent groups.
        module: The VAE or ``None``, for the fingerprint and the check that it is in evaluation mode.

    Example:
        >>> state = source.start(4)                    # no x: a walk along the prior
        >>> for k in range(source.num_groups):         # the loop that :func:`visit` runs
        ...     state = source.advance(state, source.group(state).prior.sample())
        >>> source.decode(state).shape
        torch.Size([4, 3])
    """

    num_groups: int
    module: nn.Module | None = None

    @abstractmethod
    def encode(self, x: Any) -> E:  # noqa: ANN401 (whatever a loader yields)
        """Encodes one batch, as the user's loader yields it, for a walk along the posterior."""

    @abstractmethod
    def start(self, batch_size: int, encoding: E | None = None, condition: Any = None) -> S:  # noqa: ANN401
        """Returns the state before the first group."""

    @abstractmethod
    def group(self, state: S) -> Group:
        """Returns prior, posterior and context of the next group."""

    @abstractmethod
    def advance(self, state: S, z: Tensor) -> S:
        """Returns the state after the group, given its latents z_k of shape ``(B, *event)``."""

    @abstractmethod
    def decode(self, state: S) -> Tensor:
        """Returns the mean of p(x | z), one tensor of shape ``(B, ...)``."""

    def likelihood(self, state: S) -> Distribution:
        """Returns p(x | z), for draws of x, :mod:`ncprior.evaluation` and VAEBM; by default raises.

        Raises:
            ValueError: By default.
        """
        raise ValueError(
            f"{type(self).__name__} does not know p(x | z). Give it a method likelihood(state); or, if "
            f"the decoder was trained by squared error, use GaussianDecoder.fitted(source, held_out)."
        )

    def observed(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Returns the x of a batch as p(x | z) has it: by default the batch, or its first item.

        Raises:
            TypeError: If there is no tensor x; a ValueError, if it has no rows.
        """
        return data_of(batch)

    def features(self, k: int, z: Tensor) -> Tensor:
        """Returns the input of ratio head k: by default z_k itself.

        Arguments:
            k: The group, from 0.
            z: Latents, with shape ``(*, B, *event)``.

        Returns:
            A function of z_k alone, with shape ``(*, B, ...)``.
        """
        return z

    def fingerprint(self) -> str | None:
        """Returns :func:`~ncprior.utils.module_fingerprint` of ``module``, ``None`` without one."""
        return None if self.module is None else module_fingerprint(self.module)

    def facts(self) -> dict[str, Any]:
        """Returns numbers and texts, besides the weights, on which encodings, draws or p(x | z) depend.

        Checkpoints and jobs of samples compare them, by name, also in lists and dicts, as JSON has
        them. The default is none.
        """
        return {}

    def shared_prior(self) -> Sampleable | None:
        """Returns p(z) of a single group where all rows share it, with an empty batch shape.

        It identifies the base prior when a prior is saved. The default is ``None``.
        """
        return None


def require_source(source: object) -> None:
    """Raises an error for an object whose class is not derived from :class:`LatentSource`.

    Raises:
        TypeError: If it is not derived from it.

    Example:
        >>> require_source(torch.nn.Linear(1, 1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: A source is a subclass of ncprior.LatentSource; got an object of type Linear...
    """
    if LatentSource not in type(source).__mro__:
        raise TypeError(
            f"A source is a subclass of ncprior.LatentSource; got {described(source)}. Subclass it, "
            f"wrap a VAE in SingleGroup(prior, posterior, decoder), or pass prior.source."
        )


class WrappedSource(LatentSource[Any, Any]):
    """A source that delegates to another; a subclass overrides the members that differ.

    Arguments:
        source: The wrapped source.

    Example:
        >>> class Doubled(WrappedSource):
        ...     def decode(self, state):
        ...         return 2 * self.source.decode(state)
        >>> (latents, state) = sample_posterior(Doubled(source), x)
        >>> torch.equal(Doubled(source).decode(state), 2 * source.decode(state))
        True
    """

    def __init__(self, source: LatentSource[Any, Any]) -> None:
        require_source(source)
        self.source = source
        self.num_groups, self.module = source.num_groups, source.module

    def encode(self, x: Any) -> Any:  # noqa: ANN401
        """Returns the encoding of the wrapped source."""
        return self.source.encode(x)

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> Any:  # noqa: ANN401
        """Returns the first state of the wrapped source."""
        return self.source.start(batch_size, encoding, condition)

    def group(self, state: Any) -> Group:  # noqa: ANN401
        """Returns the group of the wrapped source."""
        return self.source.group(state)

    def advance(self, state: Any, z: Tensor) -> Any:  # noqa: ANN401
        """Returns the next state of the wrapped source."""
        return self.source.advance(state, z)

    def decode(self, state: Any) -> Tensor:  # noqa: ANN401
        """Returns the mean of p(x | z) of the wrapped source."""
        return self.source.decode(state)

    def likelihood(self, state: Any) -> Distribution:  # noqa: ANN401
        """Returns p(x | z) of the wrapped source."""
        return self.source.likelihood(state)

    def observed(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Returns the x of a batch of the wrapped source."""
        return self.source.observed(batch)

    def features(self, k: int, z: Tensor) -> Tensor:
        """Returns the input of ratio head k of the wrapped source."""
        return self.source.features(k, z)

    def fingerprint(self) -> str | None:
        """Returns the fingerprint of the wrapped source."""
        return self.source.fingerprint()

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the wrapped source."""
        return self.source.facts()

    def shared_prior(self) -> Sampleable | None:
        """Returns the shared prior of the wrapped source."""
        return self.source.shared_prior()


def visit(
    source: LatentSource[E, S], state: S, choose: Callable[[int, Group], Tensor]
) -> tuple[tuple[Tensor, ...], S]:
    """Walks through all groups; training and sampling differ only in the choice of z_k.

    Arguments:
        source: The VAE.
        state: The state before the first group, as ``source.start`` returns it.
        choose: ``choose(k, group)`` returns z_k, with shape ``(B, *event)``.

    Returns:
        The latents, one z_k per group, and the state behind them, for ``source.decode``.

    Example:
        >>> latents, state = visit(source, source.start(4), lambda k, group: group.prior.sample())
        >>> source.decode(state).shape
        torch.Size([4, 3])
    """
    require_source(source)
    require_callable("choose", choose, "Pass choose(k, group), which returns z.")
    latents = []
    for k in range(source.num_groups):
        group = source.group(state)
        with naming_bad_rows(k, group.posterior):
            z = choose(k, group)
        require_instance("choose(k, group)", z, Tensor, "Return z, with shape (B, *event).")
        state = source.advance(state, z)
        latents.append(z)
    return tuple(latents), state


@torch.no_grad()
def sample_posterior(source: LatentSource[E, S], x: Any) -> tuple[tuple[Tensor, ...], S]:  # noqa: ANN401
    """Draws z_k ~ q(z_k | z_<k, x) for one batch of x.

    Over random x these are draws of the aggregate posterior q(z) = E_x q(z | x).

    Arguments:
        source: The VAE.
        x: One batch, as the user's loader yields it.

    Returns:
        The latents, one ``(B, *event)`` per group, and the state behind them, to decode.

    Example:
        >>> latents, state = sample_posterior(source, x)
        >>> [z.shape for z in latents], source.decode(state).shape
        ([torch.Size([4, 2])], torch.Size([4, 3]))
    """
    require_source(source)
    encoding = source.encode(own_batch(x, device_of(source)))
    state = source.start(num_rows(encoding), encoding)
    latents, state = visit(source, state, lambda k, group: posterior_of(group).sample())
    for k, z in enumerate(latents):
        require_finite(f"Group {k}: z drawn from q(z | x)", z)
    return latents, state


def posterior_of(group: Group) -> Distribution:
    """Returns the group's posterior, or raises an error if the source returned none.

    Raises:
        ValueError: If the group has no posterior.

    Example:
        >>> q = Independent(Normal(torch.zeros(5, 2), 1.0), 1)
        >>> posterior_of(Group(prior=q, posterior=q)) is q
        True
    """
    require_instance("group", group, Group, "Pass source.group(state).")
    if group.posterior is None:
        raise ValueError(
            "The walk started from an encoding, yet its group has no posterior: "
            "LatentSource.group must return q(z_k | z_<k, x) there."
        )
    return group.posterior


def num_rows(tree: Any) -> int:  # noqa: ANN401
    """Returns the number of rows of a pytree of tensors whose first axis is the batch.

    Example:
        >>> num_rows({"loc": torch.zeros(5, 2), "scale": (torch.ones(5), None)})
        5
    """
    rows = [len(tensor) for tensor in tensors_of(tree) if tensor.ndim > 0]
    if not rows:
        raise ValueError(f"The batch must be the first axis of tensors; got {described(tree)}.")
    return rows[0]


@torch.no_grad()
def device_of(source: LatentSource[Any, Any]) -> torch.device:
    """Returns the device of the latents of a source: of its base, of its ``module``, or of a draw.

    Example:
        >>> device_of(source)
        device(type='cpu')
    """
    require_source(source)
    base, module = source.shared_prior(), source.module
    weights = module.parameters() if isinstance(module, nn.Module) else ()
    device = next((p.device for p in weights), None)
    if device is not None and not isinstance(base, Distribution):
        return device  # without a draw of the base, which may cost a walk
    try:
        with seeded(0):  # the generators stay as they are
            if not isinstance(base, Distribution):
                base = source.group(source.start(1)).prior
            return base.sample().device
    except (AttributeError, TypeError, ValueError):  # it needs a condition, or has no prior
        return device or next((t.device for t in visible_tensors(source)), torch.device("cpu"))


def contrastive_pairs(
    source: LatentSource[Any, Any],
    x: Any,  # noqa: ANN401
    num_draws: int = 1,
) -> Iterator[tuple[Tensor, Group]]:
    """Yields, for each group, the posterior and prior draws of z_k that its head classifies.

    Arguments:
        source: The VAE.
        x: One batch, as the user's loader yields it.
        num_draws: Draws of z_k per row, from posterior and prior each; z_<k of the next groups is
            the first draw from the posterior.

    Returns:
        Draws of the posterior and of the prior, both given the same z_<k ~ q(z_<k | x), with shape
        ``(2, num_draws, B, *event)``, and the group.

    Example:
        >>> [z.shape for z, group in contrastive_pairs(source, x)]
        [torch.Size([2, 1, 4, 2])]
    """
    require_source(source)
    require_counts(num_draws=num_draws)
    require_eval(source, source.module)
    count = Size((num_draws,))
    with torch.no_grad():
        encoding = source.encode(x)
        state = source.start(num_rows(encoding), encoding)
    for k in range(source.num_groups):
        with torch.no_grad():
            group = source.group(state)
            with naming_bad_rows(k, group.posterior):
                z_q = drawn(posterior_of(group), count)
            z = torch.stack([z_q, drawn(group.prior, count).to(z_q.dtype)])
            if k + 1 < source.num_groups:
                state = source.advance(state, z_q[0])
        yield z, group
