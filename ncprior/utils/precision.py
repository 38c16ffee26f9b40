"""Mixed precision: products in bfloat16, sums and log-densities in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.utils.require import require_choice, require_instance

HALF = (torch.float16, torch.bfloat16)


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
    require_instance("device_type", device_type, str, _REMEDY)
    require_instance("precision", precision, torch.dtype, "Pass torch.float32 or torch.bfloat16.")
    _device("device_type", device_type)
    if precision == torch.bfloat16:
        return torch.autocast(device_type, torch.bfloat16)
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def fast_precision(device: torch.device | str) -> torch.dtype:
    """Precision in which matrix products of heads are fastest on a device.

    It is bfloat16 on a CPU with instructions for it, and float32 elsewhere: a CPU without them is
    tens of times slower in bfloat16, and a GPU spends most of a training step on starting kernels.

    Arguments:
        device: The device, or its name.

    Returns:
        ``torch.bfloat16`` or ``torch.float32``.

    Raises:
        TypeError: If the device is neither a device nor a name.
        ValueError: If torch knows no such device.

    Example:
        >>> fast_precision("cuda")
        torch.float32
    """
    require_instance("device", device, (torch.device, str), _REMEDY)
    on_cpu = _device("device", device).type == "cpu"
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # from torch 2.5
    return torch.bfloat16 if on_cpu and has_bfloat16() else torch.float32


_REMEDY = 'Pass the type of a device, such as "cpu".'


def _device(name: str, value: torch.device | str) -> torch.device:
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name} must be a device of torch; {_REMEDY} {error}") from error


def check_precision(precision: torch.dtype) -> None:
    """Validates a precision.

    Raises:
        ValueError: If the precision is neither ``torch.float32`` nor ``torch.bfloat16``.
    """
    require_choice("precision", precision, (torch.float32, torch.bfloat16))


def input_like(*modules: nn.Module | None) -> Tensor:
    """Returns a parameter whose device and dtype are those of a module's input.

    It is the first floating-point parameter of the first of the modules that has one; codes of 8
    bits are none.

    Arguments:
        modules: The modules, ``None`` for one that a model lacks.

    Example:
        >>> x = torch.zeros(1, dtype=torch.float64)
        >>> x.to(input_like(nn.Linear(1, 1))).dtype
        torch.float32
    """
    parameters = (p for module in modules if module is not None for p in module.parameters())
    floats = (p for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(floats, torch.empty(0))


def in_full(linear: nn.Linear, h: Tensor) -> Tensor:
    """Applies a linear layer in its own precision, at least float32, for outputs in nats."""
    if linear.weight.dtype not in HALF and not torch.is_autocast_enabled(h.device.type):
        return linear(h)  # type: ignore[no-any-return]
    weight = at_least_float32(linear.weight)
    bias = None if linear.bias is None else at_least_float32(linear.bias)
    with torch.autocast(h.device.type, enabled=False):
        return nn.functional.linear(h.to(weight.dtype), weight, bias)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns a tensor, converted to float32 if its precision is lower."""
    return tensor.float() if tensor.dtype in HALF else tensor


def in_float64(tensor: Tensor) -> Tensor:
    """Returns a tensor in float64, on the CPU if its device (MPS) has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def floating_dtype(*modules: object) -> torch.dtype | None:
    """Returns the floating-point dtype of modules, or ``None`` if they have none or several.

    Weights in 8 bits and integers do not count: no input has their dtype.

    Example:
        >>> floating_dtype(nn.Linear(1, 1)), floating_dtype(nn.Linear(1, 1), nn.Linear(1, 1).half())
        (torch.float32, None)
    """
    parameters = (p for m in modules if isinstance(m, nn.Module) for p in m.parameters())
    dtypes = {p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1}
    return dtypes.pop() if len(dtypes) == 1 else None
