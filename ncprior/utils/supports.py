"""The set on which latents live: as a distribution declares it, or as its draws show it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    VonMises,
    constraints,
)

from ncprior.utils.random_state import seeded

# What `support_of` returns: words for "latents are ...", empty for all of R^n.
DISCRETE, SIMPLEX, SPHERE, ANGLES, BOUNDED = (
    "discrete",
    "on a simplex",
    "on a sphere",
    "angles",
    "bounded",
)

_FEW, _DRAWS = 8, Size((8,))  # rows that show a surface

_EXACT = 1e-5  # relative difference of norms, or sums, of draws in float32 that lie on a surface

_NEAR = 1e-3  # the same for draws that another distribution has made

_WHOLE = 2**20  # larger floats are whole numbers anyway

_OWN = ("torch", "ncprior")  # their distributions declare the right support


def support_of(p: Any) -> str:  # noqa: ANN401
    """Returns where the draws of a distribution or sampler live, in words; ``""`` for all of R^n.

    The declared support is believed where it is one of torch's bounded or discrete ones. A class
    that is not torch's is drawn from, too, as it may call a sphere real: the generators stay as
    they are.

    Example:
        >>> from torch.distributions import Beta, Dirichlet, Laplace
        >>> support_of(Laplace(0.0, 1.0)), support_of(Beta(2.0, 2.0)), support_of(Dirichlet(torch.ones(3)))
        ('', 'bounded', 'on a simplex')
    """
    declared = _declared(p)
    if declared is not None and declared.is_discrete:
        return DISCRETE
    if _is_circular(p):
        return ANGLES
    core = declared
    while hasattr(core, "base_constraint"):  # behind Independent and mixtures
        core = core.base_constraint
    if isinstance(core, _SIMPLEX):
        return SIMPLEX
    if isinstance(core, _BOUNDED):
        return BOUNDED
    if isinstance(p, Distribution) and _is_own(p):
        return ""
    with seeded(0):
        try:
            z = p.sample(_DRAWS)
        except ValueError:  # a prior that a model lacks
            return ""
    if isinstance(declared, constraints.Constraint) and not _is_everywhere(p, z):
        return BOUNDED
    return shown_by(z)


def shown_by(z: Tensor) -> str:
    """Returns the set on which draws lie as far as they show it: ``""`` if they do not.

    Arguments:
        z: Draws, with shape ``(*, event)``: the last axis of an event is a point.
    """
    rows = z.reshape(-1, z.shape[-1]) if z.ndim > 1 else z.reshape(-1, 1)
    if not z.is_floating_point():
        return DISCRETE
    if len(rows) < _FEW or not (rows.std(0) > _NEAR * rows.abs().amax()).any():
        return ""
    if (rows == rows.round()).all() and rows.abs().amax() < _WHOLE:
        return DISCRETE
    if rows.shape[1] < 2:
        return ""
    if (rows >= 0).all() and ((rows.sum(1) - 1).abs() < _NEAR).all():
        return SIMPLEX
    norm = rows.norm(dim=1)
    return SPHERE if ((norm - norm.mean()).abs() <= _EXACT * norm.mean()).all() else ""


def is_outside(p: Any, z: Tensor) -> Tensor:  # noqa: ANN401
    """Returns which latents are outside the support of a distribution, with shape ``(*, B)``.

    Arguments:
        p: The distribution, of batch shape ``(B,)``; a sampler without a density has no outside.
        z: Latents, with shape ``(*, B, *event)``.
    """
    lead = z.shape[: z.ndim - len(p.event_shape)] if isinstance(p, Distribution) else z.shape[:1]
    nowhere = torch.zeros(lead, dtype=torch.bool, device=z.device)
    if not isinstance(p, Distribution):
        return nowhere
    support = support_of(p)
    if support == SIMPLEX:  # torch's own check is too strict for a sum of many float32
        inside = (z >= 0).all(-1) & ((z.sum(-1) - 1).abs() < _NEAR)
    elif support == SPHERE:
        with seeded(0):
            radius = p.sample().norm(dim=-1)
        inside = (z.norm(dim=-1) - radius).abs() < _NEAR * radius
    else:
        declared = _declared(p)
        inside = ~nowhere if declared is None else declared.check(z)
    return ~inside.reshape(*lead, -1).all(-1)


def _declared(p: Any) -> Any:  # noqa: ANN401
    with suppress(AttributeError, NotImplementedError):
        return p.support
    return None


def _is_own(p: Any) -> bool:  # noqa: ANN401
    """Whether a distribution and all that is in it are of classes that declare a right support."""
    names = ("base_dist", "component_distribution", "prior")  # the last of rows of a user's class
    inner = [vars(p)[name] for name in names if name in vars(p)]
    parts = [p, *getattr(p, "transforms", ())]
    own = all(type(part).__module__.partition(".")[0] in _OWN for part in parts)
    return own and all(map(_is_own, inner))


def _is_everywhere(p: Any, z: Tensor) -> bool:  # noqa: ANN401
    """Whether a declared support has room in all directions, far from draws and near to them."""
    away = torch.linspace(-1.5, 1.0, max(1, z.shape[1:].numel()), dtype=z.dtype, device=z.device)
    away = away.reshape(z.shape[1:])
    return all(bool(_declared(p).check(z + size * away).all()) for size in (1e-2, 1e4, -1e4))


def _is_circular(p: Any) -> bool:  # noqa: ANN401
    """Whether z is an angle of a von Mises distribution, whose support torch calls real."""
    if isinstance(p, Independent):
        return _is_circular(p.base_dist)
    if isinstance(p, MixtureSameFamily):
        return _is_circular(p.component_distribution)
    return isinstance(p, VonMises)


_SIMPLEX = (type(constraints.simplex),)

_BOUNDED = tuple(
    type(constraint)
    for constraint in (
        constraints.unit_interval,
        constraints.half_open_interval(0, 1),
        constraints.greater_than(0),
        constraints.greater_than_eq(0),
        constraints.less_than(0),
        constraints.lower_triangular,
        constraints.lower_cholesky,
        constraints.corr_cholesky,
        constraints.symmetric,
        constraints.positive_definite,
    )
)
