"""How heads are called in inference: in a precision, compiled, in blocks that stay in cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Size, Tensor

from ncprior.precision import at_precision

__all__ = ["InBlocks", "Whole"]

_CACHE = 2**19  # features of a block per thread: 2 MiB, as much as a core's cache holds


class Whole:
    """Any head, called as it is.

    Arguments:
        head: The head.
        context: The context, with shape ``(B, ...)``, or ``None``.
        precision: Of the factors of products, see :func:`ncprior.precision.at_precision`.

    Attributes:
        compiled: Whether it is compiled, where gradients are not asked for.

    Example:
        >>> from ncprior.heads import MLPHead
        >>> Whole(MLPHead((2,)), None, torch.bfloat16)(torch.randn(5, 4, 2)).dtype
        torch.float32
    """

    def __init__(self, head: Any, context: Tensor | None, precision: torch.dtype) -> None:  # noqa: ANN401
        self.head, self.context, self.precision = head, context, precision

    compiled = False

    def __call__(self, z: Tensor) -> Tensor:
        compiled = self.compiled and not torch.is_grad_enabled()
        return self.whole(z, _compile(self.head) if compiled else self.head)

    def whole(self, z: Tensor, head: Callable[..., Tensor]) -> Tensor:
        """log r of all z in one call."""
        with at_precision(z.device.type, self.precision):
            log_r = head(z, self.context)
        return log_r if log_r.dtype == torch.float64 else log_r.float()


class InBlocks(Whole):
    """A head of this package, with its context embedded once, given a block of z at a time.

    Example:
        >>> from ncprior.heads import ConvHead
        >>> with torch.no_grad():
        ...     InBlocks(ConvHead((2, 4, 4)), None, torch.float32)(torch.randn(5, 3, 2, 4, 4)).shape
        torch.Size([5, 3])
    """

    embedded: Tensor | float | None = None
    least = 1  # z per context that what is done once pays for

    def __call__(self, z: Tensor) -> Tensor:
        lead = z.shape[: z.ndim - len(self.head.event_shape)]
        if torch.is_grad_enabled() or lead[:-1].numel() < self.least:
            return self.whole(z, self.head)
        self.head.check(z, self.context)
        z = z.reshape(-1, *z.shape[len(lead) - 1 :])
        log_r = z.new_empty(z.shape[:2], dtype=self.head.out.weight.dtype)
        if self.embedded is None:
            with at_precision(z.device.type, torch.float32):
                self.embedded = self.prepare()
        size = self._block_size(*log_r.shape)
        for part, rows in _blocks(log_r.shape, size):
            log_r[part, rows] = self.block(z[part, rows], self._embedded(rows), size)
        return log_r.reshape(lead)

    def _embedded(self, rows: slice) -> Any:  # noqa: ANN401
        """The embedded context of some rows, or what is added to all of them."""
        c = self.embedded
        return c[rows] if isinstance(c, Tensor) and self.context is not None else c

    def prepare(self) -> Tensor | float:
        """Embeds the context; and whatever else is done once."""
        embedded: Tensor | float = self.head.context(self.context)
        return embedded

    def block(self, z: Tensor, embedded: Tensor | float, size: Size) -> Tensor:
        """log r of a block, (n, b)."""
        log_r = self.head.log_r
        # A last block or a single point is not worth a compilation of its own.
        if self.compiled and z.shape[:2] == size and size[0] > 1:
            log_r = _compile(log_r)
        with at_precision(z.device.type, self.precision):
            log_r_block: Tensor = log_r(z, embedded)
        return log_r_block

    def _block_size(self, count: int, rows: int) -> Size:
        weight = self.head.stem.weight
        if weight.device.type != "cpu":
            return Size((count, rows))
        places = self.head.event_shape[1:] if weight.ndim == 4 else ()
        features = max(weight.shape[:2]) * Size(places).numel()
        most = max(1, _CACHE * torch.get_num_threads() // features)
        return Size((min(count, max(1, most // max(1, rows))), min(max(1, rows), most)))


def _blocks(shape: Size, size: Size) -> Iterator[tuple[slice, slice]]:
    """Yields the blocks (part, rows) that make up a tensor of this shape."""
    for first in range(0, shape[0], size[0]):
        for row in range(0, shape[1], size[1]):
            yield slice(first, first + size[0]), slice(row, row + size[1])


class _Compiler:
    """``torch.compile``, until it fails: a machine may have no compiler of C++."""

    works = True

    def __call__(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if not self.works:
            return function
        compiled = torch.compile(function)  # compiles nothing yet, and nothing twice

        def call(*inputs: Tensor) -> Tensor:
            try:
                return compiled(*inputs)
            except Exception as error:  # noqa: BLE001 (whatever a compiler may raise)
                result = function(*inputs)  # if it fails too, the head is at fault
                self.works = False
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"Heads are used as they are, not compiled: {reason}", stacklevel=2)
                return result

        return call


_compile = _Compiler()
