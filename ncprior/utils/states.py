"""States of modules: copies, and comparisons with the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def differences(own: Mapping[str, Any], saved: Mapping[str, Tensor], prefix: str = "") -> str:
    """Returns how saved tensors differ from those of a module, and ``""`` if they fit.

    They fit if names and shapes are equal, and dtypes equal or both of floating-point numbers that
    networks compute with.

    Arguments:
        own: The module's tensors by name; they may be on the meta device.
        saved: The saved tensors by name.
        prefix: Prefix of the names in the text.
    """
    common = sorted(own.keys() & saved.keys())
    found = {
        "missing": sorted(own.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(saved[name].shape)} for {tuple(own[name].shape)}"
            for name in common
            if saved[name].shape != own[name].shape
        ],
        "of another dtype": [
            f"{name} {saved[name].dtype} for {own[name].dtype}"
            for name in common
            if _kind(saved[name]) != _kind(own[name])
        ],
    }
    return "; ".join(
        f"{kind}: {', '.join(prefix + name for name in names)}"
        for kind, names in found.items()
        if names
    )


def faults(tensors: Mapping[str, Tensor], prefix: str = "") -> str:
    """Returns the faults in the values of a network or a base, and ``""`` if there are none.

    Floating-point numbers have one dtype and are finite; scales, which a name ending in ``scale``
    or ``sd`` marks, have positive diagonals. ``logits`` may be -infinity.
    """
    numbers = {n: t for n, t in sorted(tensors.items()) if t.is_floating_point() or t.is_complex()}
    dtypes = sorted({str(t.dtype) for t in numbers.values()})
    if len(dtypes) > 1 or any(t.dtype not in _FLOATS for t in numbers.values()):
        return f"of dtypes that do not fit together: {', '.join(dtypes)}"
    sound = {"finite": _is_finite, "positive": _is_scale}
    found = {
        kind: [n for n, t in numbers.items() if not is_sound(n, t)]
        for kind, is_sound in sound.items()
    }
    return "; ".join(
        f"not {kind}: {', '.join(prefix + name for name in names)}"
        for kind, names in found.items()
        if names
    )


def _is_finite(name: str, tensor: Tensor) -> bool:
    finite = torch.isfinite(tensor)
    return bool((finite | (tensor == -torch.inf) if name == "logits" else finite).all())


def _is_scale(name: str, tensor: Tensor) -> bool:
    if name.rpartition(".")[-1] not in ("scale", "sd"):
        return True
    square = tensor.ndim == 3 and tensor.shape[-1] == tensor.shape[-2]  # Cholesky factors
    return bool(((tensor.diagonal(dim1=-2, dim2=-1) if square else tensor) > 0).all())


def _kind(tensor: Tensor) -> str:
    return "floating" if tensor.dtype in _FLOATS else str(tensor.dtype)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's state without extra state, such as that of ``get_extra_state``."""
    return {n: value for n, value in module.state_dict().items() if isinstance(value, Tensor)}


def state_of(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Returns copies of everything that training could change in modules, by name.

    Arguments:
        modules: The modules by name.

    Returns:
        Parameters and buffers, with their gradients and ``requires_grad``, and training flags.
    """
    state: dict[str, Any] = {}
    for part, module in modules.items():
        for name, submodule in module.named_modules(prefix=part):
            state[f"{name}.training"] = submodule.training
        for name, tensor in (*module.named_parameters(part), *module.named_buffers(part)):
            state[name] = tensor.detach().clone()
            state[f"{name}.grad"] = None if tensor.grad is None else tensor.grad.clone()
            state[f"{name}.requires_grad"] = tensor.requires_grad
    return state
