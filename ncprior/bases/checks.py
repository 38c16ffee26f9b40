"""Checks that several bases share: of shapes and of latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor

from ncprior.heads.contexts import require_context
from ncprior.utils.gradients import require_grad_mode
from ncprior.utils.require import (
    described,
    floats,
    require_callable,
    require_counts,
    require_flags,
    require_numbers,
)


def size_of(shape: Any, name: str = "sample_shape") -> Size:  # noqa: ANN401
    """Returns the shape of draws, or another shape, as a ``Size``.

    Raises:
        TypeError: If it is not a sequence of whole numbers.
        ValueError: If one of them is negative.
    """
    values: Any = shape if isinstance(shape, tuple | list) else None
    try:
        size = Size(values)
    except TypeError as error:
        raise TypeError(
            f"{name} must be a tuple of whole numbers, such as (5,); got {described(shape)}."
        ) from error
    if min(size, default=0) < 0:
        raise ValueError(f"{name} must have no negative number; got {tuple(size)}.")
    return size


def flattened(z: Tensor, event_shape: Size, device: torch.device) -> tuple[Tensor, Size]:
    """Flattens latents of shape ``(*, *event)``, after a check of their type, device and shape.

    Returns:
        The flat latents, with shape ``(N, D)``, and the shape ``(*)`` in front of the event.

    Raises:
        TypeError: If z is not a dense tensor of real numbers.
        ValueError: If it is on another device, or its last axes are not those of an event.
    """
    is_dense = isinstance(z, Tensor) and z.layout is torch.strided
    if not is_dense or z.is_complex() or z.dtype == torch.bool:
        raise TypeError(f"z must be a tensor of real numbers; got {described(z)}.")
    if z.device != device:
        raise ValueError(f"z must be on {device}; got z on {z.device}. Pass z.to('{device}').")
    lead = z.shape[: max(0, z.ndim - len(event_shape))]
    if z.shape[len(lead) :] != event_shape:
        raise ValueError(
            f"z must have shape (*, *event) with event shape {tuple(event_shape)}; got "
            f"{tuple(z.shape)}."
        )
    return z.reshape(-1, event_shape.numel()), lead


def own_floats(name: str, value: Any) -> Tensor:  # noqa: ANN401
    """Returns a parameter as floats in memory of its own, laid out as it is after saving and loading.

    Products of transposed tensors, or of parts of others, can be rounded differently.

    Raises:
        TypeError: If it holds no real numbers.
    """
    with torch.inference_mode(False):  # its tensors cannot be saved for a gradient
        return floats(name, value).clone(memory_format=torch.contiguous_format)


def require_fit(
    name: str,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    patience: int | None,
    progress: bool,
) -> None:
    """Validates the arguments that all fits by descent share, and that gradients are possible.

    Arguments:
        name: Name of the fit, for the message.
        steps: Number of optimizer steps.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        patience: Evaluations without progress before it stops, or ``None``.
        progress: Whether to show a progress bar.

    Raises:
        RuntimeError: Inside ``torch.inference_mode``.
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.
    """
    require_counts(batch_size=batch_size)
    require_counts("[0, inf)", steps=steps)
    require_counts("[1, inf) or None", patience=patience)
    require_numbers("(0, inf)", learning_rate=learning_rate)
    require_flags(progress=progress)
    require_grad_mode(name)


def contexts_by_row(context: Any, rows: int) -> Callable[[Tensor], Tensor | None]:  # noqa: ANN401
    """Returns the contexts of rows as a function of their numbers.

    Arguments:
        context: Contexts of all rows, with shape ``(N, ...)``, such a function, or ``None``.
        rows: N.

    Raises:
        TypeError: If it is none of these.
        ValueError: If there are more or fewer rows.
    """
    if context is None:
        return lambda some: None
    if not isinstance(context, Tensor):
        require_callable("context", context, "Pass a tensor with one row for each row of latents.")
        return lambda some: context(some)
    require_context(context)
    if len(context) != rows:
        raise ValueError(
            f"context must have one row for each row of latents; got {len(context)} rows for {rows}."
        )
    return lambda some: context.to(some.device)[some]
