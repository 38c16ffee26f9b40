"""Checks of one group of a source: shapes and dtypes, and the set on which its latents live."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

from ncprior.distributions import Sampleable, parameters
from ncprior.source import Group
from ncprior.utils.precision import HALF
from ncprior.utils.supports import DISCRETE, SIMPLEX, SPHERE, is_outside, support_of
from ncprior.utils.trees import Tree, same


def check_group(group: Group, z: Tensor, count: int, name: str) -> None:
    check_first_axis(group.context, count, f"{name}: the context")
    is_tensor = group.context is None or isinstance(group.context, Tensor)
    require(is_tensor, f"{name}: the context must be one tensor of shape (B, ...), or None.")
    check_dtype(group.context, f"{name}: the context")
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
    _check_support(group, z, name)


def _check_support(group: Group, z: Tensor, name: str) -> None:
    """Checks that prior and posterior draw latents of one set."""
    p, q = group.prior, group.posterior
    where = support_of(p)
    shown = where if q is None else support_of(q)
    surfaces = {shown, where} & {DISCRETE, SIMPLEX, SPHERE}
    require(
        not surfaces or shown == where,
        f"{name}: the posterior draws latents {shown or 'in all of R^n'}, and the prior "
        f"{where or 'in all of R^n'}: no draw of one is a draw of the other, and log r has no finite "
        f"value. Give both one support.",
    )


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


def check_dtype(tensor: Tensor | None, name: str) -> None:
    require(
        tensor is None or tensor.dtype not in HALF,
        f"{name} must be in float32 or better, or integers; got half precision. Make it .float().",
    )


def _check_distribution(p: Sampleable, z: Tensor, name: str) -> None:
    require_type(p, Sampleable, f"{name} must have a method sample")
    sample, shape = p.sample(Size((2,))), (2, *z.shape)
    check_dtype(sample, name)
    is_right, rule = sample.shape == shape, f"{name}.sample((2,)) must have shape (2, B, *event)"
    require(is_right, f"{rule}, {shape}; got {tuple(sample.shape)}.")
    if isinstance(p, Distribution):
        require(
            (p.batch_shape, p.event_shape) == (z.shape[:1], z.shape[1:]),
            f"{name} must have batch shape {tuple(z.shape[:1])} and event shape "
            f"{tuple(z.shape[1:])}; got {tuple(p.batch_shape)} and {tuple(p.event_shape)}. "
            f"Independent turns batch axes into event axes.",
        )
        own = not is_outside(p, sample).any()
        require(own, f"{name} draws latents that its support does not contain.")
        require(
            not is_outside(p, z).any(),
            f"{name}: draws of the posterior are outside of its support, which is "
            f"{support_of(p) or 'real'}. Give prior and posterior one support; a relaxation of codes, "
            f"such as a Gumbel-softmax, is for the training of a VAE alone.",
        )
        try:
            with suppress(NotImplementedError):  # the density need not be known
                p.log_prob(z)
        except ValueError as error:
            raise AssertionError(
                f"{name} raises an error for a draw of the posterior. Make distributions with "
                f"validate_args=False, which synchronises no GPU either. {error}"
            ) from error


def draws_of(group: Group) -> list[Tensor | None]:
    """Draws of prior and posterior under one seed, and the context."""
    torch.manual_seed(0)
    distributions = (group.prior, group.posterior)
    return [*(None if d is None else d.sample() for d in distributions), group.context]


def tensors(group: Group, z: Tensor) -> Tree:
    """Context, and parameters or log-densities of prior and posterior where they are known."""
    tensors: list[Tree] = [group.context]
    for p in (group.prior, group.posterior):
        if isinstance(p, Distribution):
            with suppress(NotImplementedError):
                tensors.append(parameters(p) or p.log_prob(z))
    return tensors


def require_same(a: Tree, b: Tree, rule: str, tolerance: float = 0.0) -> None:
    require(same(a, b, tolerance), rule)


def require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def require_type(value: object, kind: type, rule: str) -> None:
    require(isinstance(value, kind), f"{rule}; got a {type(value).__name__}.")
