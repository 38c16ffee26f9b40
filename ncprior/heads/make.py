"""Choice of the ratio head for a group of latents."""

from __future__ import annotations

import math
import warnings
from inspect import signature
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, OneHotCategorical

from ncprior.distributions import Sampleable, num_categories_of
from ncprior.heads.codes import CategoricalHead
from ncprior.heads.networks import ConvHead, MLPHead, require_sizes
from ncprior.source import Group
from ncprior.utils.latent_kl import LatentKL
from ncprior.utils.require import described, require_instance


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
@torch.no_grad()
def make_head(
    group: Group,
    *,
    kind: type[MLPHead | ConvHead] | None = None,
    **options: Any,  # noqa: ANN401
) -> nn.Module:
    """Returns a new head for a group of latents, with inputs standardised by one batch of draws.

    Codes and one-hot vectors get a :class:`CategoricalHead`, feature maps larger than 4×4 a :class:`ConvHead`, all other
    latents an :class:`MLPHead`, which costs less on small maps. An MLPHead does not see collapsed
    latents, for which q(z_j | x) is about p(z_j): they would hide the others from it.

    Arguments:
        group: A probed group, of some tens of rows or more.
        kind: Class of the head for latents that are not codes, instead of the above.
        options: Further arguments of the head, such as ``width``, ``depth`` and ``dropout``.

    Returns:
        The head, on the device of the latents.

    Raises:
        TypeError: If the group or the kind has the wrong type, or there is no such option.
        ValueError: If the prior does not define the number of categories of the codes.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> from ncprior import Group
        >>> prior = Independent(Normal(torch.zeros(64, 20, 8, 8), 1.0), 3)
        >>> type(make_head(Group(prior), width=32)).__name__
        'ConvHead'
    """
    require_instance("group", group, Group, "Pass source.group(state).")
    require_options(kind=kind, **options)
    z = _draws(group.prior)
    event_shape = tuple(z.shape[1:])
    one_hot = _is_one_hot(group.prior)
    codes = one_hot or not z.is_floating_point()
    is_large_map = len(event_shape) == 3 and math.prod(event_shape[1:]) > _SMALL_MAP
    default = ConvHead if is_large_map else MLPHead
    chosen: type[nn.Module] = CategoricalHead if codes else kind or default
    known = signature(chosen).parameters.keys() - {
        "event_shape",
        "context_shape",
        "num_categories",
        "one_hot",
    }
    if wrong := options.keys() - known:
        raise TypeError(
            f"The options of a {chosen.__name__} are {', '.join(sorted(known))}; got "
            f"{', '.join(sorted(wrong))}."
        )
    if group.context is not None:
        options["context_shape"] = group.context.shape[1:]
    if codes:
        options |= {"num_categories": _num_categories(group), "one_hot": one_hot}
    head: Any = chosen(event_shape, **options).to(z.device)
    if group.posterior is not None and not codes:
        z = torch.cat([z, _draws(group.posterior)])
    if group.context is not None and len(group.context) == 1:
        warnings.warn(
            "One row does not show the scales of a context. Pass some tens of rows.", stacklevel=4
        )
    head.fit_scale(z, group.context)
    if isinstance(head, MLPHead) and isinstance(group.posterior, Distribution):  # no features of z
        active = LatentKL.of(group.posterior, group.prior).active()
        if active.any() and not active.all():
            head.leave_out(~active.to(z.device))
    made: nn.Module = head
    return made


def require_options(*, kind: Any = None, **options: Any) -> None:  # noqa: ANN401
    """Validates those options of :func:`make_head` that do not depend on the group."""
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, MLPHead | ConvHead)):
        raise TypeError(
            f"kind must be MLPHead, ConvHead or a class derived from one; got {described(kind)}."
        )
    require_sizes(**options)


def _draws(p: Sampleable) -> Tensor:
    """One draw per row; of few rows several, so that they show the scales of z."""
    z = p.sample()
    if len(z) == 0:
        raise ValueError("A head needs the scales of z: the group must have rows; got none.")
    if len(z) < _FEW:
        z = torch.cat([z, p.sample(Size((-(-_DRAWS // len(z)),))).flatten(0, 1)])
    return z


_SMALL_MAP = 16  # positions

_FEW = 8  # rows

_DRAWS = 64


def _is_one_hot(prior: Any) -> bool:  # noqa: ANN401
    while type(prior) is Independent:
        prior = prior.base_dist
    return isinstance(prior, OneHotCategorical)


def _num_categories(group: Group) -> int:
    if (count := num_categories_of(group.prior)) is None:
        raise ValueError(
            f"The prior {type(group.prior).__name__} does not define the number of categories. Give "
            f"it an attribute num_categories, or make the head yourself: "
            f"CategoricalHead(event_shape, num_categories)."
        )
    return count
