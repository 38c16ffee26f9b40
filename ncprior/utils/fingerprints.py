"""Fingerprints of modules and base priors, to check that heads are used with the right VAE."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform
from torch.distributions.utils import lazy_property


def module_fingerprint(module: nn.Module) -> str:
    """Returns the fingerprint ``"<dtype>:<SHA-256>"`` of a module.

    Arguments:
        module: The module. The names, shapes and values (in float32) of its parameters and
            buffers count, sorted by name.

    Returns:
        The fingerprint; its first part names the dtypes of the module, such as ``"float32"``.

    Example:
        >>> module_fingerprint(torch.nn.Linear(1, 1)).split(":")[0]
        'float32'
    """
    digest = hashlib.sha256()
    tensors = module.state_dict()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.to("cpu", torch.float32).contiguous().numpy().tobytes())
    dtypes = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
    return f"{'+'.join(sorted(dtypes)).replace('torch.', '') or 'none'}:{digest.hexdigest()}"


def base_fingerprint(base: object) -> str | None:
    """Returns the fingerprint ``"<type>:<SHA-256>"`` of a base's types, shapes and values.

    Values are in float32. Only constructor arguments of the distribution count, not attributes
    derived from them.

    Arguments:
        base: A prior. Its parameters are its attributes, including those of nested distributions
            and transforms.

    Returns:
        The fingerprint, or ``None`` if ``base`` is not a ``Distribution``.
    """
    if not isinstance(base, Distribution):
        return None
    digest = hashlib.sha256()
    for name, value in _named_tensors(base, "base"):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"{type(base).__name__}:{digest.hexdigest()}"


def _named_tensors(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors and numbers of a distribution's constructor arguments, sorted by name."""
    if isinstance(value, Tensor | int | float):
        yield name, torch.as_tensor(value)
    elif isinstance(value, nn.Module):
        for key, tensor in sorted(value.state_dict().items()):
            yield f"{name}.{key}", tensor
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _named_tensors(item, f"{name}.{i}")
    elif isinstance(value, Distribution | Transform):
        name = f"{name}.{type(value).__name__}"
        yield f"{name}{tuple(getattr(value, 'event_shape', ()))}", torch.empty(0)
        for key, item in sorted(vars(value).items()):
            derived = isinstance(getattr(type(value), key, None), lazy_property)
            cached = key.startswith("_") and not isinstance(item, Tensor | Distribution)
            if not (derived or cached):
                yield from _named_tensors(item, f"{name}.{key}")
