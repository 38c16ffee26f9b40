"""A walk through a source, with checks of every output: shapes, dtypes and distributions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

from ncprior.distributions import Sampleable
from ncprior.source import Group, LatentSource, posterior_of
from ncprior.utils.trees import Tree

Source: TypeAlias = LatentSource[Any, Any]

Start: TypeAlias = tuple[int, Tree, Tree]  # batch size, encoding and condition

HALF = (torch.float16, torch.bfloat16)


class Walk(NamedTuple):
    start: Start
    states: list[Tree]  # K + 1: in front of every group, and the last
    groups: list[Group]
    latents: list[Tensor]
    x: Tensor


def walk_and_check(source: Source, start: Start, latents: Sequence[Tensor] = ()) -> Walk:
    """Visits all groups with given latents or draws of the posterior, and checks every output."""
    count, mode = start[0], torch.is_grad_enabled()
    states, groups, drawn = [source.start(*start)], [], []
    for k in range(source.num_groups):
        check_first_axis(states[-1], count, f"The state in front of group {k}")
        groups.append(source.group(states[-1]))
        kind = type(groups[-1]).__name__
        require(isinstance(groups[-1], Group), f"group must return a Group; got a {kind}.")
        drawn.append(latents[k] if latents else posterior_of(groups[-1]).sample())
        _check_group(groups[-1], drawn[-1], count, f"Group {k}")
        states.append(source.advance(states[-1], drawn[-1]))
    check_first_axis(states[-1], count, "The last state")
    x = source.decode(states[-1])
    kind = type(x).__name__
    require(isinstance(x, Tensor), f"decode(state) must return one tensor; got a {kind}.")
    check_first_axis(x, count, "decode(state)")
    require(
        torch.is_grad_enabled() == mode,
        "The source has turned gradients on or off. It must leave that to its callers.",
    )
    return Walk(start, states, groups, drawn, x)


def _check_group(group: Group, z: Tensor, count: int, name: str) -> None:
    check_first_axis(group.context, count, f"{name}: the context")
    _check_dtype(group.context, f"{name}: the context")
    p, q = group.prior, group.posterior
    if isinstance(p, Distribution) and isinstance(q, Distribution):
        require(
            len(p.event_shape) != len(q.event_shape) or p.event_shape == q.event_shape,
            f"{name}: the prior's event shape is {tuple(p.event_shape)} and the posterior's "
            f"{tuple(q.event_shape)}. Is the group the state's own?",
        )
    _check_distribution(group.prior, z, f"{name}: the prior")
    drawn = group.prior.sample().dtype
    require(
        drawn.is_floating_point == z.dtype.is_floating_point,
        f"{name}: prior and posterior must both draw numbers or both draw codes; got {drawn} from the "
        f"prior and {z.dtype} from the posterior. A base of real numbers does not fit codes.",
    )
    if group.posterior is not None:
        _check_distribution(group.posterior, z, f"{name}: the posterior")


def check_first_axis(tree: Tree, count: int, name: str) -> None:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            problem = "" if leaf.shape[:1] == (count,) else f"shape {tuple(leaf.shape)}"
        else:
            plain = leaf is None or isinstance(leaf, bool | int | float | str)
            problem = "" if plain else f"a {type(leaf).__name__}"
        require(
            not problem,
            f"{name} must be a pytree of tensors whose first axis is the batch of {count} rows; "
            f"got {problem}. Expand what rows share; keep parameters instead of distributions.",
        )


def _check_dtype(tensor: Tensor | None, name: str) -> None:
    require(
        tensor is None or tensor.dtype not in HALF,
        f"{name} must be in float32 or better, or integers; got half precision. Make it .float().",
    )


def _check_distribution(p: Sampleable, z: Tensor, name: str) -> None:
    kind = type(p).__name__
    require(isinstance(p, Sampleable), f"{name} must have a method sample; got a {kind}.")
    sample, shape = p.sample(Size((2,))), (2, *z.shape)
    _check_dtype(sample, name)
    got = tuple(sample.shape)
    require(
        got == shape, f"{name}.sample((2,)) must have shape (2, B, *event), {shape}; got {got}."
    )
    if isinstance(p, Distribution):
        require(
            (p.batch_shape, p.event_shape) == (z.shape[:1], z.shape[1:]),
            f"{name} must have batch shape {tuple(z.shape[:1])} and event shape "
            f"{tuple(z.shape[1:])}; got {tuple(p.batch_shape)} and {tuple(p.event_shape)}. "
            f"Independent turns batch axes into event axes.",
        )
        try:
            with suppress(NotImplementedError):  # the density need not be known
                p.log_prob(z)
        except ValueError as error:
            raise AssertionError(
                f"{name} raises an error for a draw of the posterior. Make distributions with "
                f"validate_args=False, which synchronises no GPU either. {error}"
            ) from error


def require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
