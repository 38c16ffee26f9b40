"""Choice of the ratio head for a group of latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from ncprior.heads.networks import CategoricalHead, ConvHead, MLPHead
from ncprior.source import Group


def make_head(
    group: Group,
    *,
    kind: type[MLPHead | ConvHead] | None = None,
    **options: Any,  # noqa: ANN401
) -> nn.Module:
    """Returns a new head for a group of latents, with inputs standardised by one batch of draws.

    Codes get a :class:`CategoricalHead`, feature maps a :class:`ConvHead`, other latents an
    :class:`MLPHead`.

    Arguments:
        group: A probed group, of some tens of rows or more.
        kind: Class of the head for latents that are not codes, instead of the above; an
            :class:`MLPHead` on small maps costs a fraction of a :class:`ConvHead`.
        options: Further arguments of the head, such as ``width``, ``depth`` and ``dropout``.

    Returns:
        The head, on the device of the latents.

    Raises:
        ValueError: If the prior does not define the number of categories of the codes.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> from ncprior import Group
        >>> prior = Independent(Normal(torch.zeros(64, 20, 4, 4), 1.0), 3)
        >>> type(make_head(Group(prior), width=32)).__name__
        'ConvHead'
    """
    z = group.prior.sample()
    event_shape = tuple(z.shape[1:])
    context_shape = None if group.context is None else tuple(group.context.shape[1:])
    options["context_shape"] = context_shape
    if not z.is_floating_point():
        codes = CategoricalHead(event_shape, _num_categories(group), **options).to(z.device)
        codes.fit_scale(z, group.context)
        return codes
    if kind is None:
        kind = ConvHead if len(event_shape) == 3 else MLPHead
    head = kind(event_shape, **options).to(z.device)
    if group.posterior is not None:
        z = torch.cat([z, group.posterior.sample()])
    head.fit_scale(z, group.context)
    return head


def _num_categories(group: Group) -> int:
    distribution: Any = group.prior
    while isinstance(distribution, Distribution):
        if hasattr(distribution, "logits") and distribution.has_enumerate_support:
            return int(distribution.logits.shape[-1])
        distribution = getattr(distribution, "base_dist", None)
    raise ValueError(
        f"The prior {type(group.prior).__name__} does not define the number of categories. "
        f"Make the head yourself: CategoricalHead(event_shape, num_categories)."
    )
