r"""Fast evaluation of heads in samplers: log r(·, c) for many z of one context, block by block.

The context is embedded once, and blocks fit in the cache of a core. The weights of an
:class:`~ncprior.heads.MLPHead` are folded as well: its residual stream h is read only through layer
normalisation, which is invariant to adding one number to all features. If the mean over features is
subtracted from every weight that writes to h, h is centred:

.. math::
    W_1 (\gamma \cdot \mathrm{LN}(h) + \beta) + b_1
      = (|h|^2 / W + \epsilon)^{-1/2} \, (W_1 \mathrm{diag}(\gamma)) \, h + (b_1 + W_1 \beta),

so that a block is two matrix products into preallocated buffers, a norm, a shift and an activation in
place. Results differ by rounding alone. In bfloat16, products have bfloat16 factors and accumulate in
float32; the stream, its norm and the layers outside the blocks remain in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor, nn
from torch.nn.functional import silu

from ncprior.heads.codes import CategoricalHead
from ncprior.heads.contexts import LARGEST, require_context
from ncprior.heads.inputs import head_input
from ncprior.heads.networks import ConvHead, MLPHead
from ncprior.heads.product import ProductHead, factors
from ncprior.heads.unmodified import is_unmodified
from ncprior.source import LatentSource
from ncprior.utils.precision import HALF, at_least_float32, at_precision, check_precision
from ncprior.utils.require import require_instance

_CACHE = 2**19  # features of a block per thread: two buffers of 2 MiB, as much as a core caches


_EMBEDDED = 2**24  # features of codes at a time

LogRatio: TypeAlias = Callable[[Tensor], Tensor]


class Whole:
    """A head of any class, called without change.

    Arguments:
        head: The head.
        context: The context, with shape ``(B, ...)``, or ``None``.
        precision: Precision of the factors of products, see :func:`ncprior.utils.at_precision`.
    """

    def __init__(self, head: Any, context: Tensor | None, precision: torch.dtype) -> None:  # noqa: ANN401
        self.head, self.context, self.precision = head, context, precision

    def __call__(self, z: Tensor) -> Tensor:
        with at_precision(z.device.type, self.precision):
            log_r: Tensor = self.head(z, self.context)
        return log_r if log_r.dtype == torch.float64 else log_r.float()


class InBlocks(Whole):
    """A head of this package, evaluated on one block of z at a time, with its context embedded once."""

    embedded: Tensor | float | None = None
    least = 1  # fewest z per context for which the preparation pays, in the first call
    was_called = False

    def __call__(self, z: Tensor) -> Tensor:
        lead = z.shape[: z.ndim - len(self.head.event_shape)]
        is_few = lead[:-1].numel() < (1 if self.was_called else self.least)
        self.was_called = True
        if torch.is_grad_enabled() or is_few:
            return super().__call__(z)
        self.head.check(z, self.context)
        z = z.reshape(lead[:-1].numel(), *z.shape[len(lead) - 1 :])
        dtype = torch.promote_types(self.head.out.weight.dtype, torch.float32)
        log_r = z.new_empty(z.shape[:2], dtype=dtype)
        if self.embedded is None:
            with at_precision(z.device.type, torch.float32):
                self.embedded = self.prepare()
        size = self._block_size(*log_r.shape)
        for part, rows in _blocks(log_r.shape, size):
            log_r[part, rows] = self.block(z[part, rows], self._embedded(rows))
        return log_r.reshape(lead)

    def _embedded(self, rows: slice) -> Any:  # noqa: ANN401
        """The embedded context of some rows, or the bias of all rows without a context."""
        c = self.embedded
        return c[rows] if isinstance(c, Tensor) and self.context is not None else c

    def prepare(self) -> Tensor | float:
        """Embeds the context, and prepares everything else that is done once."""
        embedded: Tensor | float = self.head.context(self.context)
        return embedded

    def block(self, z: Tensor, embedded: Tensor | float) -> Tensor:
        """log r of a block, (n, b)."""
        with at_precision(z.device.type, self.precision):
            log_r: Tensor = self.head.log_r(z, embedded)
        return log_r

    def _block_size(self, count: int, rows: int) -> Size:
        weight = next(self.head.stem.parameters())
        if weight.device.type != "cpu":
            return Size((count, rows))
        features = max(weight.shape)
        if weight.ndim == 4:
            places = Size(min(size, LARGEST) for size in self.head.event_shape[1:]).numel()
            features = len(weight) * places
        most = max(1, _CACHE * torch.get_num_threads() // features)
        return Size((min(count, max(1, most // max(1, rows))), min(max(1, rows), most)))


def _blocks(shape: Size, size: Size) -> Iterator[tuple[slice, slice]]:
    """Yields the blocks (part, rows) that make up a tensor of this shape."""
    for first in range(0, shape[0], size[0]):
        for row in range(0, shape[1], size[1]):
            yield slice(first, first + size[0]), slice(row, row + size[1])


def prepare_head(
    head: nn.Module,
    context: Tensor | None = None,
    *,
    precision: torch.dtype = torch.float32,
) -> LogRatio:
    """Returns log r(·, c) of a head, for many z of one context.

    Without gradients it is faster than the head, if the head is of a class of :mod:`ncprior.heads`
    (no subclass, no hooks, no dropout). The weights are read at the first evaluation.

    Arguments:
        head: A ratio head.
        context: The context, with shape ``(B, ...)``, or ``None``.
        precision: Precision of the factors in matrix products and convolutions, ``torch.float32``
            or ``torch.bfloat16``; sums are in float32 in either case.

    Returns:
        A function of z, with shape ``(*, B, *event)``, to log r(z, c) in nats, ``(*, B)``.

    Raises:
        TypeError: If the head is no module, or the context no tensor.
        ValueError: If the precision is neither of the two.

    Example:
        >>> head = MLPHead((2,), context_shape=(3,))
        >>> prepare_head(head, torch.randn(4, 3))(torch.randn(500, 4, 2)).shape
        torch.Size([500, 4])
    """
    require_instance("head", head, nn.Module, "Pass a ratio head, such as prior.heads[0].")
    require_context(context)
    check_precision(precision)
    plain = is_unmodified(head) and not _drops_out(head)
    if plain and type(head) is CategoricalHead:
        return _Embedded(head, prepare_head(head.head, context, precision=precision))
    if plain and type(head) is ProductHead:
        parts = [prepare_head(h, context, precision=precision) for h in factors(head)]
        return lambda z: torch.stack([part(z) for part in parts]).sum(0)
    half = any(p.dtype in HALF for p in head.parameters())
    kinds: dict[type[nn.Module], type[Whole]] = {
        MLPHead: InBlocks if half else _Folded,
        ConvHead: InBlocks,
    }
    kind = kinds.get(type(head), Whole) if plain else Whole
    return kind(head, context, precision)


def prepare_input_head(
    source: LatentSource[Any, Any],
    k: int,
    head: nn.Module,
    context: Tensor | None,
    *,
    precision: torch.dtype = torch.float32,
) -> LogRatio:
    """Returns log r_k(·, c) of a head on its input of a source, for many z of one context.

    Arguments:
        source: The VAE, whose features of z the head may see.
        k: The group.
        head: Its ratio head.
        context: The context, with shape ``(B, ...)``, or ``None``.
        precision: As for :func:`prepare_head`.

    Returns:
        A function of z, with shape ``(*, B, *event)``, to log r(z, c) in nats, ``(*, B)``.
    """
    c = None if context is None else at_least_float32(context)
    log_r = prepare_head(head, c, precision=precision)
    return lambda z: log_r(at_least_float32(head_input(source, k, z)))


class _Embedded:
    """A head of codes, which embeds only as many codes at a time as fit in little memory."""

    def __init__(self, head: CategoricalHead, inner: LogRatio) -> None:
        self.head, self.inner = head, inner
        self.features = head.embedding.embedding_dim * math.prod(head.grid)

    def __call__(self, z: Tensor) -> Tensor:
        lead = z.shape[: z.ndim - len(self.head.event_shape)]
        if len(lead) < 2:
            return self.inner(self.head.embed(z))
        each = lead[1:].numel() * self.features
        parts = z.split(max(1, _EMBEDDED // max(1, each)))
        return torch.cat([self.inner(self.head.embed(part)) for part in parts])


def _drops_out(head: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in head.modules())


class _Folded(InBlocks):
    """A residual MLP with centred weights and preallocated buffers."""

    least = 2

    def prepare(self) -> Tensor | float:
        head = self.head
        self.stem, bias = _centred(head.stem)
        self.layers = [self._fold(*block.layers) for block in head.blocks]
        self.buffers: _Buffers | None = None
        embedded = super().prepare()
        if isinstance(embedded, Tensor):
            embedded = embedded - embedded.mean(-1, keepdim=True)
        return (bias + embedded).reshape(-1, len(bias))

    def _fold(self, norm: Any, first: Any, *rest: Any) -> tuple[Any, ...]:  # noqa: ANN401
        second = rest[-1]
        w_1, b_1 = (first.weight * norm.weight).mT, first.bias + first.weight @ norm.bias
        w_2, b_2 = _centred(second)
        if self.precision == torch.bfloat16:
            w_1, b_1, w_2 = (t.contiguous().bfloat16() for t in (w_1, b_1, w_2))
        return norm.eps, w_1, b_1, w_2, b_2

    def block(self, z: Tensor, embedded: Tensor | float) -> Tensor:
        """log r of a block, (n, b)."""
        count = z.shape[:2].numel()
        if self.buffers is None or len(self.buffers.h) < count:
            self.buffers = _Buffers(count, self.stem, self.precision)
        head, buffers = self.head, self.buffers.rows(count)
        x, h, a, scale, out = buffers.x, buffers.h, buffers.a, buffers.scale, buffers.out
        torch.sub(z.reshape(len(x), -1), head.scale.mean.flatten(), out=x)
        torch.mm(x.div_(head.scale.sd.flatten()), self.stem, out=h)
        h.view(*z.shape[:2], -1).add_(embedded)
        step = _step_bfloat16 if self.precision == torch.bfloat16 else _step
        for eps, *layers in self.layers:
            _norm(h, eps, out=scale)
            step(buffers, *layers)
        torch.mul(h, _norm(h, head.norm.eps, out=scale), out=a)
        silu(torch.addcmul(head.norm.bias, a, head.norm.weight, out=a), inplace=True)
        torch.addmm(head.out.bias, a, head.out.weight.mT, out=out)
        return out.view(z.shape[:2])


class _Buffers:
    """Preallocated memory for the evaluation of a block of latents."""

    def __init__(self, size: int, weight: Tensor, precision: torch.dtype) -> None:
        inputs, width = weight.shape
        self.x = weight.new_empty(size, inputs)  # z, standardised
        self.h = weight.new_empty(size, width)  # the stream
        self.a = weight.new_empty(size, width)  # activations
        self.scale, self.out = weight.new_empty(size, 1), weight.new_empty(size, 1)
        self.low = weight.new_empty(size * (precision == torch.bfloat16), width, dtype=precision)
        self.low_2 = torch.empty_like(self.low)

    def rows(self, size: int) -> _Buffers:
        """The first rows of the buffers."""
        part = copy(self)
        for name, tensor in vars(self).items():
            setattr(part, name, tensor[:size])
        return part


def _step(buffers: _Buffers, w_1: Tensor, b_1: Tensor, w_2: Tensor, b_2: Tensor) -> None:
    """h += W₂ SiLU(W₁ LN(h) + b₁) + b₂."""
    h, a = buffers.h, buffers.a
    torch.addcmul(b_1, torch.mm(h, w_1, out=a), buffers.scale, out=a)
    h.addmm_(silu(a, inplace=True), w_2).add_(b_2)


def _step_bfloat16(buffers: _Buffers, w_1: Tensor, b_1: Tensor, w_2: Tensor, b_2: Tensor) -> None:
    """h += W₂ SiLU(W₁ LN(h) + b₁) + b₂, with products of bfloat16 factors."""
    h, a, low, low_2 = buffers.h, buffers.a, buffers.low, buffers.low_2
    low.copy_(torch.mul(h, buffers.scale, out=a))
    silu(torch.addmm(b_1, low, w_1, out=low_2), inplace=True)
    h.add_(a.copy_(torch.mm(low_2, w_2, out=low))).add_(b_2)


def _norm(h: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """Factor (|h|²/W + ε)^{-1/2} of layer normalisation, for centred rows."""
    torch.linalg.vector_norm(h, dim=-1, keepdim=True, out=out)
    return out.square_().div_(h.shape[-1]).add_(eps).rsqrt_()


def _centred(linear: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """A layer's weight (inputs, outputs) and bias, without the mean over its outputs."""
    w, b = linear.weight.mT, linear.bias
    return w - w.mean(-1, keepdim=True), b - b.mean()
