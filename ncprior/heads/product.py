"""Products of ratio heads, for training in stages, and the operations on their factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.utils.require import require_instance, require_numbers


class ProductHead(nn.Module):
    """log r = Σ_s ℓ_s: the product of the ratios of several stages.

    Arguments:
        heads: The heads ℓ_s, first stage first; a product among them gives its factors.

    Raises:
        TypeError: If a head is no module.
        ValueError: If there is none.

    Example:
        >>> from ncprior.heads import MLPHead
        >>> ProductHead([MLPHead((2,)), MLPHead((2,))])(torch.randn(5, 4, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        remedy = "Pass a list of modules."
        require_instance("heads", heads, (list, tuple, nn.ModuleList), remedy)
        heads = [require_instance("A head", head, nn.Module, remedy) for head in heads]
        self.heads = nn.ModuleList(factor for head in heads for factor in factors(head))
        if not self.heads:
            raise ValueError("A product needs at least one head; got none. Pass the heads.")

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns log r(z, c) in nats, with shape ``(*, B)``."""
        return torch.stack([head(z, context) for head in self.heads]).sum(0)

    def rescale(self, slope: float, offset: float) -> None:
        """Replaces log r by slope · log r + offset, in place."""
        require_numbers(slope=slope, offset=offset)
        for s, head in enumerate(self.heads):
            rescale_head(head, slope, offset if s == 0 else 0.0)


def factors(head: nn.Module) -> list[nn.Module]:
    """Returns the factors of a product, first stage first; a list of one for any other head.

    Example:
        >>> from ncprior.heads import MLPHead
        >>> head = MLPHead((2,))
        >>> len(factors(ProductHead([head, head]))), len(factors(head))
        (2, 1)
    """
    return list(head.heads) if isinstance(head, ProductHead) else [head]


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
@torch.no_grad()
def fresh_head(head: nn.Module) -> nn.Module:
    """Returns an untrained head with the configuration and input scales of another.

    Arguments:
        head: A head whose ``config()`` returns the arguments of its constructor, or a product of
            such heads, whose first is used.

    Returns:
        The head, on the same device.

    Raises:
        TypeError: If the head has no method ``config``.
    """
    model = factors(head)[0]
    config: Any = getattr(model, "config", None)
    if config is None:
        raise TypeError(
            f"A further stage needs a new head like the one before; {type(model).__name__} has no "
            f"config() of its constructor's arguments. Give it one, or take a head of ncprior."
        )
    new: nn.Module = type(model)(**config())
    for name, buffer in model.named_buffers():
        new.get_buffer(name).copy_(buffer)
    left_out: Any = getattr(model, "left_out", None)
    if left_out is not None and (hidden := left_out()).any():
        new.leave_out(hidden)  # type: ignore[operator]
    first = next(model.parameters())
    return new.to(first.device, first.dtype)


def rescale_head(head: nn.Module, slope: float, offset: float) -> None:
    """Replaces log r of a head by slope · log r + offset, in place.

    Arguments:
        head: A head with a method ``rescale(slope, offset)``.
        slope: The factor.
        offset: The offset, in nats.

    Raises:
        TypeError: If the head has no such method.
    """
    rescale: Any = getattr(head, "rescale", None)
    if rescale is None:
        raise TypeError(
            f"A calibrated log r is a·log r + b; {type(head).__name__} has no rescale(a, b) that "
            f"makes it so in place. Give it one, or take a head of ncprior."
        )
    rescale(slope, offset)
