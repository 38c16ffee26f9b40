"""Distributions as pytrees of their parameters, which states can hold, index and cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeAlias, TypeGuard, runtime_checkable

import torch
from torch import Size, Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    constraints,
)

from ncprior.utils.precision import HALF, at_least_float32
from ncprior.utils.require import (
    described,
    require_counts,
    require_flags,
    require_instance,
    require_shape,
)

Parameters: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""``{type name: {parameter name: tensor of shape (B, ...)}}``."""


class PointMass(Distribution):
    """Distribution with all its mass on one z, such as the codes of a VQ-VAE, or a replayed draw.

    A VAE may draw latents in another order than its prior, such as bottom-up. Then ``encode`` draws
    all of them with their log-densities, and the posterior of a group is a point mass on its z. Over
    many calls of ``encode`` these are draws of q(z | x), and the sum of ``log_q`` over the groups
    is log q(z | x).

    Arguments:
        z: The point, with shape ``(B, *event)``.
        log_q: Log-density in nats of the distribution from which z was drawn, with shape ``(B,)``;
            by default 0 for codes, the log-probability of a z that was not drawn, and NaN for real
            z, where a point has no density.
        validate_args: Changes nothing, as z and log_q are always validated.

    Raises:
        TypeError: If z or log_q is no tensor.
        ValueError: If log_q has another shape.

    Example:
        >>> q = PointMass(torch.tensor([[3, 5], [0, 2]]))
        >>> q.sample().tolist(), q.log_prob(torch.tensor([[3, 5], [0, 1]])).tolist()
        ([[3, 5], [0, 2]], [0.0, -inf])
        >>> q = Independent(Normal(torch.zeros(4, 2), 1.0), 1)
        >>> z = q.sample()
        >>> torch.equal(PointMass(z, q.log_prob(z)).log_prob(z), q.log_prob(z))
        True
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, z: Tensor, log_q: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        require_instance("z", z, Tensor, "Pass codes, or a draw with its log-density.")
        if validate_args is not None:
            require_flags(validate_args=validate_args)
        if log_q is None:
            known = 0.0 if isinstance(z, Tensor) and not z.is_floating_point() else math.nan
            log_q = torch.full(z.shape[:1], known, device=z.device)
        require_instance("log_q", log_q, Tensor, "Pass a log-density for each row of z.")
        if z.ndim < 1 or log_q.shape != z.shape[:1]:
            raise ValueError(
                f"log_q must have shape (B,), one log-density per row of z; got {described(log_q)} for "
                f"{described(z)}. Independent(q, n).log_prob sums over the axes of an event."
            )
        self.z, self.log_q = z, log_q
        super().__init__(z.shape[:1], z.shape[1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Whole numbers for codes; not known for other z."""
        if self.z.is_floating_point():
            raise NotImplementedError
        return constraints.independent(constraints.nonnegative_integer, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """The point itself."""
        return self.z

    def sample(self, sample_shape: Any = ()) -> Tensor:  # noqa: ANN401
        """Returns the point, repeated to shape ``(*sample_shape, B, *event)``."""
        shape = require_shape("sample_shape", sample_shape)
        return self.z.expand(*shape, *self.z.shape).clone()

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log_q in nats for the point, and -∞ for any other z, with shape ``(*, B)``."""
        require_instance("value", value, Tensor, "Pass z, with shape (*, B, *event).")
        if value.shape[max(0, value.ndim - self.z.ndim) :] != self.z.shape:
            raise ValueError(
                f"z must have the shape (*, B, *event) of the point, {described(self.z)}; got "
                f"{described(value)}."
            )
        is_other = value != self.z
        if self.event_shape:
            is_other = is_other.flatten(value.ndim - len(self.event_shape)).any(-1)
        return torch.where(is_other, -math.inf, self.log_q)


_PARAMETERS: dict[type[Distribution], tuple[str, ...]] = {
    Normal: ("loc", "scale"),
    Laplace: ("loc", "scale"),
    MultivariateNormal: ("loc", "scale_tril"),
    Bernoulli: ("logits",),
    Categorical: ("logits",),
    OneHotCategorical: ("logits",),
    PointMass: ("z", "log_q"),
}

_TYPES: dict[str, Any] = {cls.__name__: cls for cls in _PARAMETERS}


def parameters(distribution: Distribution) -> Parameters | None:
    """Returns the parameters of a distribution of a known type, in float32 or better, else None.

    Example:
        >>> sorted(parameters(Independent(Normal(torch.zeros(5, 2), 1.0), 1))["Normal"])
        ['loc', 'scale']
    """
    while type(distribution) is Independent:
        distribution = distribution.base_dist
    names = _PARAMETERS.get(type(distribution))
    if names is None:
        return None
    tensors = {name: at_least_float32(getattr(distribution, name)) for name in names}
    return {type(distribution).__name__: tensors}


def is_half(distribution: Distribution) -> bool:
    """Returns whether a parameter of a distribution is in half precision.

    Example:
        >>> is_half(Independent(Normal(torch.zeros(2).bfloat16(), 1.0), 1)), is_half(Normal(0.0, 1.0))
        (True, False)
    """
    while type(distribution) is Independent:
        distribution = distribution.base_dist
    tensors = (value for value in vars(distribution).values() if isinstance(value, Tensor))
    return any(t.dtype in HALF for t in tensors)


def is_parameters(tree: Any) -> bool:  # noqa: ANN401
    """Returns whether a pytree has the form of :func:`parameters`.

    Example:
        >>> is_parameters(parameters(Normal(0.0, 1.0))), is_parameters({"image": torch.zeros(2)})
        (True, False)
    """
    return isinstance(tree, Mapping) and len(tree) == 1 and next(iter(tree)) in _TYPES


def build(tree: Parameters) -> Distribution:
    """Returns the distribution with these parameters, of batch shape ``(B,)``.

    Example:
        >>> build({"Normal": {"loc": torch.zeros(5, 2), "scale": torch.ones(5, 2)}}).batch_shape
        torch.Size([5])
    """
    ((name, tensors),) = tree.items()
    distribution = _TYPES[name](**tensors, validate_args=False)  # validation synchronises a GPU
    return Independent(distribution, len(distribution.batch_shape) - 1, validate_args=False)


@contextmanager
def naming_bad_rows(k: int, q: Distribution | None) -> Iterator[None]:
    """Context in which an error of torch names the rows of x whose posterior is NaN or infinite.

    Arguments:
        k: The group.
        q: Its posterior.

    Raises:
        ValueError: Instead of torch's error, if a parameter of the posterior is not finite.

    Example:
        >>> q = Normal(torch.full((5,), torch.nan), 1.0, validate_args=False)
        >>> with naming_bad_rows(0, q):
        ...     raise RuntimeError("normal expects all elements of std >= 0.0")
        Traceback (most recent call last):
        ValueError: Group 0: q(z | x) is NaN or infinite in 5 of 5 rows. Look for NaN or infinity...
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        tree = parameters(q) if q is not None else None
        named = [it for tensors in (tree or {}).values() for it in tensors.items()]
        bad = [_is_bad(name, t).reshape(len(t), -1).any(1) for name, t in named if t.ndim > 0]
        count = int(torch.stack(bad).any(0).sum()) if bad else 0
        if count == 0:
            raise
        raise ValueError(
            f"Group {k}: q(z | x) is NaN or infinite in {count} of {len(bad[0])} rows. Look for NaN "
            f"or infinity in these rows of x, or in the encoder's weights."
        ) from error


def _is_bad(name: str, parameter: Tensor) -> Tensor:
    """Which numbers of a parameter make draws or densities fail: log q may be unknown, and a logit -∞."""
    if name == "log_q":
        return torch.zeros_like(parameter, dtype=torch.bool)
    bad = ~parameter.isfinite()
    return bad & ~parameter.isneginf() if name == "logits" else bad


def expand(prior: Sampleable, batch_size: int) -> Sampleable:
    """Returns B independent rows of a prior with an empty batch shape; B may be 0.

    Raises:
        TypeError: If the prior draws no z, or B is no whole number.

    Example:
        >>> expand(Normal(torch.tensor(0.0), 1.0), 5).sample().shape
        torch.Size([5])
    """
    if isinstance(prior, type) or not isinstance(prior, Sampleable):
        raise TypeError(f"prior must draw z; got {described(prior)}. Pass a distribution.")
    require_counts("[0, inf)", batch_size=batch_size)
    if not isinstance(prior, Distribution):
        return _Rows(prior, batch_size)
    tree = parameters(prior)
    if tree is None:
        try:
            rows: Distribution = prior.expand(Size((batch_size,)))
        except NotImplementedError:  # a distribution of the user's own
            rows = _DistributionRows(prior, batch_size)
        return rows
    ((name, tensors),) = tree.items()
    return build({name: {key: t.expand(batch_size, *t.shape) for key, t in tensors.items()}})


def num_categories_of(prior: Any) -> int | None:  # noqa: ANN401
    """Returns the number of values of a code under a prior, or ``None`` if it is unknown.

    A prior of your own has it as its attribute ``num_categories``.

    Example:
        >>> num_categories_of(Independent(Categorical(logits=torch.zeros(4, 4, 512)), 2))
        512
    """
    while prior is not None:
        if isinstance(count := getattr(prior, "num_categories", None), int):
            return count
        if isinstance(prior, Categorical | OneHotCategorical):
            return prior.logits.shape[-1]
        prior = getattr(prior, "prior" if isinstance(prior, _Rows) else "base_dist", None)
    return None


def is_expanded(prior: Sampleable) -> bool:
    """Returns whether :func:`expand` made these rows from a sampler without a density.

    Example:
        >>> is_expanded(expand(Normal(0.0, 1.0), 5))  # this one has a density
        False
    """
    return isinstance(prior, _Rows)


def is_point(q: Distribution) -> bool:
    """Returns whether a distribution is a point of real z, which has no density.

    Arguments:
        q: A posterior.

    Example:
        >>> is_point(PointMass(torch.zeros(4, 2))), is_point(PointMass(torch.zeros(4).long()))
        (True, False)
    """
    inner = q.base_dist if isinstance(q, Independent) else q
    return isinstance(inner, PointMass) and bool(inner.log_q.isnan().any())


def is_prior(value: object) -> TypeGuard[Sampleable]:
    """Returns whether an object draws z: an ``NCPrior``, which draws whole samples, does not.

    Example:
        >>> is_prior(Normal(0.0, 1.0)), is_prior(Normal), is_prior(None)
        (True, False, False)
    """
    draws = isinstance(value, Sampleable) and not isinstance(value, type)
    return draws and not hasattr(value, "group_losses")


class _Rows:
    """B independent rows of a sampler without a density."""

    def __init__(self, prior: Sampleable, batch_size: int) -> None:
        self.prior, self.batch_size = prior, batch_size

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        return self.prior.sample(Size((*sample_shape, self.batch_size)))


class _DistributionRows(Distribution):
    """B independent rows of a distribution without a method ``expand``."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, prior: Distribution, batch_size: int) -> None:
        super().__init__(Size((batch_size,)), prior.event_shape, validate_args=False)
        self.prior = prior

    @property
    def support(self) -> Any:  # noqa: ANN401
        return self.prior.support

    def sample(self, sample_shape: Any = ()) -> Tensor:  # noqa: ANN401
        return self.prior.sample(Size((*sample_shape, *self.batch_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.prior.log_prob(value)


@runtime_checkable
class Sampleable(Protocol):
    """Anything that draws samples; a torch ``Distribution`` is one.

    Example:
        >>> isinstance(Normal(0.0, 1.0), Sampleable)
        True
    """

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 (torch's own default)
        """Draws samples of shape ``(*sample_shape, B, *event)``."""
        ...
