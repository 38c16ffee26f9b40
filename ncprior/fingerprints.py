"""Fingerprints of base priors: was a head trained against this one?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform
from torch.distributions.utils import lazy_property

__all__ = ["base_fingerprint"]


def base_fingerprint(base: object) -> str | None:
    """Returns ``"<type>:<SHA-256>"`` over a base distribution's types, shapes and float32 values.

    Only what the distribution was made with counts, and not what it derives from that.

    Arguments:
        base: A prior; its parameters, those of distributions and transforms inside it included,
            are found as attributes.

    Returns:
        The fingerprint, or ``None`` for what is no ``Distribution``.

    Example:
        >>> normal = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> base_fingerprint(normal).split(":")[0]
        'Independent'
    """
    if not isinstance(base, Distribution):
        return None
    digest = hashlib.sha256()
    for name, value in _parts(base, "base"):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"{type(base).__name__}:{digest.hexdigest()}"


def _parts(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors and numbers that a distribution was made with, sorted by name."""
    if isinstance(value, Tensor | int | float):
        yield name, torch.as_tensor(value)
    elif isinstance(value, nn.Module):
        for key, tensor in sorted(value.state_dict().items()):
            yield f"{name}.{key}", tensor
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _parts(item, f"{name}.{i}")
    elif isinstance(value, Distribution | Transform):
        name = f"{name}.{type(value).__name__}"
        yield f"{name}{tuple(getattr(value, 'event_shape', ()))}", torch.empty(0)
        for key, item in sorted(vars(value).items()):
            derived = isinstance(getattr(type(value), key, None), lazy_property)
            cached = key.startswith("_") and not isinstance(item, Tensor | Distribution)
            if not (derived or cached):
                yield from _parts(item, f"{name}.{key}")
