"""Mixed precision: products in bfloat16, sums and log-densities in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def at_precision(device_type: str, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Context with products in bfloat16, or in the precision of the tensors.

    Arguments:
        device_type: Type of the device, such as ``"cpu"``.
        precision: ``torch.bfloat16`` for autocast; any other dtype turns autocast off.

    Returns:
        A context manager.

    Example:
        >>> with at_precision("cpu", torch.bfloat16):
        ...     (torch.eye(2) @ torch.eye(2)).dtype
        torch.bfloat16
    """
    if precision == torch.bfloat16:
        return torch.autocast(device_type, torch.bfloat16)
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def check_precision(precision: torch.dtype) -> None:
    """Validates a precision.

    Raises:
        ValueError: If the precision is neither ``torch.float32`` nor ``torch.bfloat16``.
    """
    if precision not in (torch.float32, torch.bfloat16):
        raise ValueError(f"precision must be torch.float32 or torch.bfloat16; got {precision}.")


def input_like(module: nn.Module) -> Tensor:
    """Returns the first floating-point parameter of a module, whose device and dtype inputs take.

    Example:
        >>> x = torch.zeros(1, dtype=torch.float64)
        >>> x.to(input_like(nn.Linear(1, 1))).dtype
        torch.float32
    """
    floats = (p for p in module.parameters() if p.is_floating_point())
    return next(floats, torch.empty(0))


def in_full(linear: nn.Linear, h: Tensor) -> Tensor:
    """Applies a linear layer in its own precision, also under autocast, for outputs in nats."""
    if not torch.is_autocast_enabled(h.device.type):
        return linear(h)  # type: ignore[no-any-return]
    with torch.autocast(h.device.type, enabled=False):
        return linear(h.to(linear.weight.dtype))  # type: ignore[no-any-return]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns a tensor, converted to float32 if its precision is lower."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
