"""Gradients of one module: enabled, checked, zeroed, averaged over the ranks and clipped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ncprior.utils.distributed import (
    average_over_ranks,
    from_rank,
    num_ranks,
)


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Context with gradients, also inside ``torch.no_grad`` and ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def without_gradients(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context in which parameters, among these tensors, require no gradients.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with without_gradients(layer.parameters()):
        ...     layer(torch.zeros(2)).requires_grad
        False
    """
    frozen = [t for t in tensors if t.requires_grad and t.is_leaf]
    for t in frozen:
        t.requires_grad_(False)
    try:
        yield
    finally:
        for t in frozen:
            t.requires_grad_(True)


def leaves(loss: Tensor) -> list[Tensor]:
    """Returns the tensors that a backward pass of a loss has gradients for, such as parameters.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> leaves((3 * w).sum())[0] is w
        True
    """
    found, ahead = [], [loss.grad_fn]
    seen: set[Any] = set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            ahead += [following for following, _ in node.next_functions]
    return found


@contextmanager
def gradients_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context after which tensors have the gradients that they had before.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> with gradients_kept([w]):
        ...     w.sum().backward()
        >>> w.grad is None
        True
    """
    before = [(t, t.grad) for t in tensors]
    for t, _ in before:
        t.grad = None  # else it would be added to
    try:
        yield
    finally:
        for t, gradient in before:
            t.grad = gradient


def require_grad_mode(what: str) -> None:
    """Validates that gradients can be taken here.

    Arguments:
        what: The function that takes them, for the message.

    Raises:
        RuntimeError: Inside ``torch.inference_mode``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} takes gradients, which torch.inference_mode forbids. Call it outside, or "
            f"under torch.no_grad instead."
        )


def check_parameters(
    optimizer: torch.optim.Optimizer, module: nn.Module, whose: str, remedy: str
) -> None:
    """Validates that an optimizer holds only parameters of the trained module.

    Arguments:
        optimizer: The optimizer.
        module: The trained module.
        whose: The module's name in the message, as a possessive.
        remedy: The parameters to make the optimizer from.

    Raises:
        ValueError: If the optimizer holds any other parameter.
    """
    own = {id(p) for p in module.parameters()}
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"The optimizer holds parameters that are not {whose}; the VAE stays frozen. "
            f"Make it from {remedy}."
        )


def require_whole_steps(optimizer: torch.optim.Optimizer) -> None:
    """Validates that an optimizer of Accelerate neither accumulates nor scales gradients.

    Arguments:
        optimizer: The optimizer; those of torch always pass.

    Raises:
        ValueError: If it leaves steps out, or its gradients are scaled, as in half precision.
    """
    steps = getattr(getattr(optimizer, "gradient_state", None), "num_steps", 1)
    if steps > 1:
        raise ValueError(
            f"Every batch is a step of its own; got an optimizer that accumulates gradients over "
            f"{steps} batches. Pass gradient_accumulation_steps=1, and larger batches."
        )
    if getattr(optimizer, "scaler", None) is not None:
        raise ValueError(
            "Gradients are checked and clipped in nats; got an optimizer that scales them, as for "
            "mixed_precision='fp16'. Pass mixed_precision='no', and precision=torch.bfloat16 "
            "to the trainer."
        )


def share_weights(module: nn.Module) -> None:
    """Copies the weights of rank 0 to all ranks; does nothing without a process group."""
    for tensor in module.state_dict().values():
        from_rank(0, tensor)


def zero_gradients(module: nn.Module) -> None:
    """Sets every gradient to zero, and allocates the gradients that do not exist yet.

    Gradients that the backward pass allocates lie between activations in memory, so that the
    allocator cannot reuse the memory of these activations for the next group.
    """
    for p in module.parameters():
        if p.grad is not None:
            p.grad.zero_()
        elif p.requires_grad:
            p.grad = torch.zeros_like(p)


def reduce_and_clip(
    module: nn.Module, max_norm: float, *, rows: int, shared: bool = True
) -> Tensor:
    """Averages a module's gradients over the ranks, if they share it, and clips them.

    Arguments:
        module: The module.
        max_norm: Largest norm of the gradient.
        rows: Number of rows of this rank, over which its gradient is a mean.
        shared: Whether the ranks share the module.

    Returns:
        The norm before clipping.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if num_ranks() > 1 and gradients and shared:
        flat = average_over_ranks(torch.cat([g.flatten() for g in gradients]), rows)
        for gradient, mean in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))
    return clip_grad_norm_(module.parameters(), max_norm)
