"""Checks of heads and of their results, with messages that name the group."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ncprior.source import LatentSource
from ncprior.utils.require import described, require_instance
from ncprior.utils.visible import naming_devices


def as_heads(heads: Any, num_groups: int) -> nn.ModuleList:  # noqa: ANN401
    """Returns the heads of a prior as a ``ModuleList``.

    Arguments:
        heads: One head per group; for a single group, the head itself.
        num_groups: The number of groups.

    Raises:
        TypeError: If a head is no module.
        ValueError: If the number of heads is not the number of groups, or two share a parameter.
    """
    remedy = "Pass one nn.Module per group, as NCPrior.for_source makes them."
    if isinstance(heads, nn.ModuleList):
        listed = heads
    else:
        one = isinstance(heads, nn.Module | type) or getattr(heads, "ndim", None) == 0
        one = one or not hasattr(heads, "__iter__")
        each = [heads] if one else list(heads)
        listed = nn.ModuleList([require_instance("A head", h, nn.Module, remedy) for h in each])
    if len(listed) != num_groups:
        raise ValueError(
            f"One ratio head per latent group: the source has {num_groups} groups, "
            f"got {len(listed)} heads."
        )
    _require_apart(listed)
    return listed


def _require_apart(heads: nn.ModuleList) -> None:
    """Validates that no two heads share a parameter: each keeps its own best weights."""
    owners: dict[int, int] = {}
    for k, head in enumerate(heads):
        for name, p in head.named_parameters():
            if p.requires_grad and owners.setdefault(id(p), k) != k:
                raise ValueError(
                    f"Every group needs a ratio head of its own; heads {owners[id(p)]} and {k} share the "
                    f"parameter {name}. Give each group a copy, copy.deepcopy(head)."
                )


def require_one_per_group(latents: Any, num_groups: int) -> None:  # noqa: ANN401
    """Validates the number of latents in a list.

    Raises:
        TypeError: If it is no list or tuple.
        ValueError: If there is not one latent per group.
    """
    require_instance("latents", latents, (list, tuple), "Pass one z per group, [z].")
    if len(latents) != num_groups:
        raise ValueError(f"The source has {num_groups} groups; got {len(latents)} latents.")


def naming_parts(
    source: LatentSource[Any, Any], heads: nn.Module | None = None
) -> AbstractContextManager[None]:
    """Context in which an error of torch names the devices of base, VAE and heads if they differ."""
    vae = {"source": source} if source.module is None else {"VAE": source.module}
    return naming_devices(base=source.shared_prior(), **vae, heads=heads)


def require_steady(k: int, head: nn.Module) -> None:
    """Validates that dropout and batch statistics of a head are off.

    Raises:
        ValueError: If they are on: the head is in training mode. Call ``prior.eval()``.
    """
    if noise := noise_of(head):
        raise ValueError(
            f"Head {k} is in training mode and has {noise}, so that log r(z) would not be one function "
            f"of z. Call prior.eval() first, and prior.train() to train on."
        )


def noise_of(network: nn.Module) -> str:
    """Returns the class of a module that makes a network in training mode random, or an empty text.

    Example:
        >>> noise_of(nn.Dropout(0.1)), noise_of(nn.Dropout(0.1).eval())
        ('Dropout', '')
    """
    for module in network.modules():
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0)
        noisy = isinstance(module, (_BatchNorm, nn.RReLU)) or (
            isinstance(rate, float) and rate > 0
        )
        if noisy and module.training:
            return type(module).__name__
    return ""


def checked_log_r(k: int, log_r: Any, z: Tensor, lead: int | None) -> Tensor:  # noqa: ANN401
    """Returns the result of head k after a check of its shape.

    Arguments:
        k: The group.
        log_r: The result.
        z: Its input, with shape ``(*, B, ...)``.
        lead: Number of axes ``(*, B)``, if it is known.

    Raises:
        TypeError: If it is no tensor of real numbers.
        ValueError: If its shape is not ``(*, B)``.
    """
    if not isinstance(log_r, Tensor) or not log_r.is_floating_point():
        raise TypeError(
            f"Head {k} must return log r, a tensor of floats with shape (*, B); got "
            f"{described(log_r)}."
        )
    axes = log_r.ndim if lead is None else lead
    if axes == 0 or log_r.shape != z.shape[:axes]:
        asked = "" if lead is None else f", here {tuple(z.shape[:lead])}"
        raise ValueError(
            f"Head {k} must map z of shape (*, B, *event) to log r of shape (*, B){asked}; got "
            f"{tuple(log_r.shape)} from an input of shape {tuple(z.shape)}. A last axis of size 1 "
            f"goes away with .squeeze(-1)."
        )
    return log_r


def require_finite_groups(name: str, values: Tensor, where: str) -> None:
    """Validates values per group, with shape ``(*, K)``; waits for a GPU.

    Arguments:
        name: The name of the values in the message.
        values: The values.
        where: Where NaN may come from, besides the weights of the head.

    Raises:
        FloatingPointError: If a value is not finite; the message names the group.
    """
    wrong = ~torch.isfinite(values).reshape(-1, values.shape[-1]).all(0)
    if wrong.any():
        raise FloatingPointError(
            f"Group {int(wrong.nonzero()[0])}: {name} is not finite. Look for NaN or infinity in "
            f"{where}, or in the weights of the head."
        )
