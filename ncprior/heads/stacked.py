"""Evaluation of heads of equal shape in several groups as one batched computation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ncprior.heads.networks import CategoricalHead, ConvHead, MLPHead, is_as_made
from ncprior.utils.precision import at_least_float32, at_precision

Contrast: TypeAlias = "tuple[Tensor, Tensor | None]"


def log_ratios(
    heads: Sequence[nn.Module],
    contrasts: Sequence[Contrast],
    *,
    precision: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Returns log r_k(z_k, c_k) of every group, with heads of one shape evaluated together.

    The activations of these heads are in memory at the same time. This is faster where launching a
    head takes longer than its arithmetic. Heads of other classes, changed heads, and heads whose
    shape is unique are evaluated one by one.

    Arguments:
        heads: One head per group.
        contrasts: z of shape ``(*, B, *event)`` and the context per group, as
            :func:`ncprior.source.contrastive_pairs` yields them.
        precision: Precision of the factors of matrix products, see :mod:`ncprior.heads`.

    Returns:
        log r in nats per group, each with shape ``(*, B)``; gradients reach every head's own
        parameters.
    """
    alike = defaultdict(list)
    for k, (head, contrast) in enumerate(zip(heads, contrasts, strict=True)):
        alike[_kind(head, contrast) or k].append(k)
    log_r: dict[int, Tensor] = {}
    with at_precision(contrasts[0][0].device.type, precision):
        for groups in alike.values():
            together = _together if len(groups) > 1 else _in_turn
            found = together([heads[k] for k in groups], [contrasts[k] for k in groups])
            log_r.update(zip(groups, found, strict=True))
    return [at_least_float32(log_r[k]) for k in range(len(heads))]


def _kind(head: nn.Module, contrast: Contrast) -> Any:  # noqa: ANN401
    """Key that is equal for heads that can be evaluated together; ``None`` for other classes."""
    if type(head) not in (MLPHead, ConvHead, CategoricalHead) or not is_as_made(head):
        return None
    z, c = contrast
    shapes = (z.shape, z.dtype, None if c is None else (c.shape, c.dtype))
    return (type(head), str(head.config()), head.training, *shapes)  # type: ignore[operator]


def _in_turn(heads: Sequence[nn.Module], contrasts: Sequence[Contrast]) -> list[Tensor]:
    return [
        head(at_least_float32(z), None if c is None else at_least_float32(c))
        for head, (z, c) in zip(heads, contrasts, strict=True)
    ]


def _together(heads: Sequence[nn.Module], contrasts: Sequence[Contrast]) -> Sequence[Tensor]:
    state = {
        name: torch.stack([tensors[name] for tensors in map(_tensors, heads)])
        for name in _tensors(heads[0])
    }
    z = torch.stack([at_least_float32(z) for z, _ in contrasts])
    contexts = [at_least_float32(c) for _, c in contrasts if c is not None]

    def one(tensors: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        log_r: Tensor = functional_call(heads[0], tensors, inputs)
        return log_r

    inputs = (z, torch.stack(contexts)) if contexts else (z,)
    return vmap(one, randomness="different")(state, *inputs).unbind()


def _tensors(head: nn.Module) -> dict[str, Tensor]:
    return {**dict(head.named_parameters()), **dict(head.named_buffers())}
