r"""Other base priors for a frozen VAE: NCP on a closer base has less to correct.

    source = rebase(source, fit_mixture(latents_of(source, x)))

A base is anything that draws z_k: a fitted mixture (here), a VampPrior (:mod:`ncprior.vamp`), a
normalizing flow (:mod:`ncprior.adapters.flows`), flow matching (:mod:`ncprior.flow_matching`), the
training encodings themselves, a tempered prior. Decoder and posterior stay the wrapped source's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_map_only

from ncprior.batches import in_order
from ncprior.distributions import expand, parameters
from ncprior.mixture_fit import fit_gaussian, fit_mixture
from ncprior.mixtures import GaussianMixture
from ncprior.source import Group, LatentSource, Sampleable, device_of, num_rows, posterior_of

__all__ = [
    "Base",
    "Empirical",
    "GaussianMixture",
    "NoPrior",
    "Rebased",
    "fit_gaussian",
    "fit_mixture",
    "latents_of",
    "rebase",
    "stored_numbers",
]

Base: TypeAlias = "Sampleable | Callable[[int, Group], Sampleable]"


class NoPrior:
    """Stands for the prior of a model that has none, and refuses to be drawn from.

    Arguments:
        reason: Why there is none, as one sentence.
        event_shape: Shape of z without batch, where it is known.

    Example:
        >>> NoPrior("An AE has no prior.").sample()
        Traceback (most recent call last):
        ValueError: An AE has no prior. Fit one: rebase(source, fit_mixture(latents_of(source, x))).
    """

    def __init__(self, reason: str, event_shape: Sequence[int] | None = None) -> None:
        self.reason, self.event_shape = reason, event_shape

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Refuses.

        Raises:
            ValueError: Always, with the reason and the remedy.
        """
        raise ValueError(
            f"{self.reason} Fit one: rebase(source, fit_mixture(latents_of(source, x)))."
        )


class Empirical:
    """The empirical distribution of stored latents: rows of them, drawn with replacement.

    Of training encodings it is the reference that no other base can be closer than, and costs the
    most numbers. It has no density.

    Arguments:
        z: Latents, with shape ``(N, *event)``.

    Raises:
        ValueError: If there are none.

    Example:
        >>> base = Empirical(latents_of(source, x))
        >>> base.sample((7,)).shape
        torch.Size([7, 2])
    """

    def __init__(self, z: Tensor) -> None:
        if z.ndim < 1 or len(z) < 1:
            raise ValueError(
                f"The latents have shape (N, *event), with N at least 1; got {tuple(z.shape)}."
            )
        self.z, self.event_shape = z.detach(), z.shape[1:]

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws rows, with shape ``(*sample_shape, *event)``."""
        count = math.prod(sample_shape)
        rows = torch.randint(len(self.z), (count,), device=self.z.device)
        return self.z[rows].reshape(*sample_shape, *self.event_shape)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name."""
        return {"z": self.z}


def stored_numbers(base: Sampleable) -> int:
    """Counts the numbers that a base stores: a fair price to set beside its quality.

    Of Cholesky factors these are the lower triangles; masks and orders of a flow are none.

    Arguments:
        base: A base of this package, or a distribution that :mod:`ncprior.distributions` knows.

    Returns:
        The number of floating-point numbers.

    Raises:
        TypeError: If there is no telling what the base stores.

    Example:
        >>> stored_numbers(fit_gaussian(torch.randn(50, 2)))  # a weight, a mean and a triangle
        6
    """
    if isinstance(base, GaussianMixture) and base.is_full:
        k, d = base.loc.shape
        return k * (1 + d + d * (d + 1) // 2)
    if hasattr(base, "tensors"):
        tensors = base.tensors()
    else:
        known = parameters(base) if isinstance(base, Distribution) else None
        if known is None:
            raise TypeError(
                f"There is no telling what a {type(base).__name__} stores. Give it a method "
                f"tensors(), which returns its tensors by name."
            )
        (tensors,) = known.values()
    return sum(t.numel() for t in tensors.values() if t.is_floating_point())


def rebase(source: LatentSource[Any, Any], base: Base) -> Rebased:
    """Wraps a source with another base prior.

    Arguments:
        source: The VAE.
        base: ``base(k, group)`` gives the new prior of group k from ``group.prior`` and
            ``group.context``. With one group of latents it may be the prior itself, of empty batch
            shape: a ``Distribution``, or anything with ``sample(sample_shape)``.

    Returns:
        A source: the same VAE with that prior.

    Raises:
        ValueError: If one prior is given for several groups.
        TypeError: If the base can neither be sampled nor called.

    Example:
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


class Rebased:
    """A source with another base prior, made by :func:`rebase`.

    Whatever else the wrapped source can do, such as ``likelihood``, is asked of it.

    Attributes:
        source: The wrapped source.
        prior: The prior itself, where one was given, else ``None``.
        module: The VAE, where the wrapped source tells it, else ``None``.

    Example:
        >>> closer = Rebased(source, fit_gaussian(latents_of(source, x)))
        >>> closer.module is source.module, type(closer.prior).__name__
        (True, 'GaussianMixture')
    """

    def __init__(self, source: LatentSource[Any, Any], base: Base) -> None:
        prior, function = (base, None) if isinstance(base, Sampleable) else (None, base)
        if prior is None and not callable(function):
            raise TypeError(
                f"A base is a prior with a method `sample`, or base(k, group) that makes one; "
                f"got {type(base).__name__}."
            )
        if prior is not None and source.num_groups > 1:
            raise ValueError(
                f"One prior is given for the {source.num_groups} groups of the source. "
                f"Pass base(k, group), which makes the prior of group k."
            )
        self.source = source
        self.module = getattr(source, "module", None)
        self.prior: Sampleable | None = prior
        self._base: Any = function

    class State(NamedTuple):
        """The wrapped source's state, and the number of the group that it stands in front of."""

        walk: Any
        k: int

    @property
    def num_groups(self) -> int:
        """K, the number of latent groups."""
        return self.source.num_groups

    def encode(self, x: Any) -> Any:  # noqa: ANN401
        """Encodes one batch, as the wrapped source does."""
        return self.source.encode(x)

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> State:  # noqa: ANN401
        """Makes the state in front of the first group."""
        return self.State(self.source.start(batch_size, encoding, condition), 0)

    def group(self, state: State) -> Group:
        """Shows the group, with the new prior."""
        group = self.source.group(state.walk)
        prior = self._new_prior(state, group)
        given = prior if self.prior is None else self.prior
        self._check_event(state.k, given, group.posterior)
        return group._replace(prior=prior)

    def advance(self, state: State, z: Tensor) -> State:
        """Takes z_k, with shape ``(B, *event)``."""
        return self.State(self.source.advance(state.walk, z), state.k + 1)

    def decode(self, state: State) -> Tensor:
        """Returns the decoder's mean."""
        return self.source.decode(state.walk)

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z), where the wrapped source knows it."""
        return self.__getattr__("likelihood")(state.walk)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Asks the wrapped source for what else it can do."""
        if name.startswith("__") or "source" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.source, name)

    def _new_prior(self, state: State, group: Group) -> Sampleable:
        if self.prior is not None:
            return expand(self.prior, num_rows(state.walk))
        prior: Sampleable = self._base(state.k, group)
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


@torch.no_grad()
def latents_of(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    *,
    k: int = 0,
    of: str = "samples",
    batch_size: int = 1000,
) -> Tensor:
    """Encodes data, for a base to be fitted to.

    Arguments:
        source: The VAE.
        data: A tensor or map-style dataset of x, a ``DataLoader``, or a list of batches.
        k: The group whose latents are wanted, from 0.
        of: ``"samples"``, one z_k ~ q(z_k | z_<k, x) per row, which is what the heads will see; or
            ``"means"`` of q, which is what RAE fits its mixture to.
        batch_size: Rows per batch, where batches are made here.

    Returns:
        The latents, with shape ``(N, *event)``.

    Raises:
        ValueError: If there is no such group, or ``of`` is none of the two.

    Example:
        >>> latents_of(source, x).shape
        torch.Size([4, 2])
    """
    if not 0 <= k < source.num_groups or of not in ("samples", "means"):
        raise ValueError(
            f"k must be from 0 to {source.num_groups - 1}, and of 'samples' or 'means'; "
            f"got {k} and {of!r}."
        )
    device, latents = device_of(source), []
    for batch in in_order(data, batch_size):
        batch = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
        encoding = source.encode(batch)
        state = source.start(num_rows(encoding), encoding)
        for _ in range(k):
            state = source.advance(state, _take(posterior_of(source.group(state)), of))
        latents.append(_take(posterior_of(source.group(state)), of))
    return torch.cat(latents)


def _take(q: Distribution, of: str) -> Tensor:
    return q.sample() if of == "samples" else q.mean
