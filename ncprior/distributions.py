"""Distributions as pytrees of their parameters, which states can hold, index and cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

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
)

from ncprior.utils.require import described, require_counts

Parameters: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""``{type name: {parameter name: tensor of shape (B, ...)}}``."""

_PARAMETERS: dict[type[Distribution], tuple[str, ...]] = {
    Normal: ("loc", "scale"),
    Laplace: ("loc", "scale"),
    MultivariateNormal: ("loc", "scale_tril"),
    Bernoulli: ("logits",),
    Categorical: ("logits",),
    OneHotCategorical: ("logits",),
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
    tensors = {name: getattr(distribution, name) for name in names}
    half = (torch.float16, torch.bfloat16)
    tensors = {name: t.float() if t.dtype in half else t for name, t in tensors.items()}
    return {type(distribution).__name__: tensors}


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
        tensors = [t for tensors in (tree or {}).values() for t in tensors.values()]
        bad = [~torch.isfinite(t).reshape(len(t), -1).all(1) for t in tensors if t.ndim > 0]
        count = int(torch.stack(bad).any(0).sum()) if bad else 0
        if count == 0:
            raise
        raise ValueError(
            f"Group {k}: q(z | x) is NaN or infinite in {count} of {len(bad[0])} rows. Look for NaN "
            f"or infinity in these rows of x, or in the encoder's weights."
        ) from error


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
        rows: Distribution = prior.expand(Size((batch_size,)))
        return rows
    ((name, tensors),) = tree.items()
    return build({name: {key: t.expand(batch_size, *t.shape) for key, t in tensors.items()}})


def is_expanded(prior: Sampleable) -> bool:
    """Returns whether :func:`expand` made these rows from a sampler without a density.

    Example:
        >>> is_expanded(expand(Normal(0.0, 1.0), 5))  # this one has a density
        False
    """
    return isinstance(prior, _Rows)


def is_prior(value: object) -> TypeGuard[Sampleable]:
    """Returns whether an object draws z: an ``NCPrior``, which draws whole samples, does not.

    Example:
        >>> is_prior(Normal(0.0, 1.0)), is_prior(Normal), is_prior(None)
        (True, False, False)
    """
    draws = isinstance(value, Sampleable) and not isinstance(value, type)
    return draws and not hasattr(value, "log_ratio")


class _Rows:
    """B independent rows of a sampler without a density."""

    def __init__(self, prior: Sampleable, batch_size: int) -> None:
        self.prior, self.batch_size = prior, batch_size

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        return self.prior.sample(Size((*sample_shape, self.batch_size)))


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
