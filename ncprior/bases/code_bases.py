"""Bases for all groups of codes of a source, each given its context."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ncprior.bases.code_network import CodeNetwork, fit_code_network
from ncprior.bases.codes import CodeFrequencies, fit_code_frequencies
from ncprior.bases.groups import group_data
from ncprior.bases.rebase import without_bases
from ncprior.data.batches import first_batch
from ncprior.distributions import num_categories_of
from ncprior.source import (
    Group,
    LatentSource,
    device_of,
    num_rows,
    posterior_of,
    require_source,
    visit,
)
from ncprior.utils.batches import own_batch
from ncprior.utils.require import require_choice

_KINDS = ("network", "frequencies")


def fit_code_bases(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    *,
    kind: str = "network",
    **options: Any,  # noqa: ANN401
) -> list[CodeNetwork | CodeFrequencies]:
    """Bases for all groups of codes of a VAE, such as the two grids of a VQ-VAE-2.

    The network of a group sees the group's context, a function of the codes of the groups before
    it and of the condition; frequencies do not.

    Arguments:
        source: The VAE; the latents of all its groups are codes.
        data: Training data, as for :func:`ncprior.bases.latents_of`.
        kind: ``"network"``, see :func:`fit_code_network`, or ``"frequencies"``, see
            :func:`fit_code_frequencies`.
        options: Further arguments of :func:`fit_code_network`.

    Returns:
        One base per group, for :func:`ncprior.bases.rebase`.

    Raises:
        TypeError: If latents are no codes, or an argument has the wrong type.
        ValueError: If there is no such kind, or an argument is out of range.

    Example:
        >>> from ncprior.adapters.vq import VQSource
        >>> digits = VQSource(lambda x: x, lambda z: z.float(), num_categories=10)
        >>> bases = fit_code_bases(digits, torch.randint(10, (99, 4)), kind="frequencies")
        >>> [base.event_shape for base in bases]
        [torch.Size([4])]
    """
    require_source(source)
    require_choice("kind", kind, _KINDS)
    if kind == "frequencies" and options:
        raise TypeError(f"Frequencies have no options; got {', '.join(sorted(options))}.")
    groups = group_data(source, data)
    counts = _categories_of(source, data)
    pairs = zip(groups, counts, strict=True)
    if kind == "frequencies":
        return [fit_code_frequencies(z, num_categories=count) for (z, _, _), count in pairs]
    return [
        fit_code_network(z, context=context, num_categories=count, **options)
        for (z, context, _), count in pairs
    ]


def _categories_of(source: LatentSource[Any, Any], data: Any) -> list[int | None]:  # noqa: ANN401
    """Returns the numbers of values of the codes of every group, as far as they are known."""
    below, counts = without_bases(source), []
    encoding = below.encode(own_batch(first_batch(data, 1), device_of(source)))

    def of_posterior(_k: int, group: Group) -> Tensor:
        counts.append(num_categories_of(group.prior))
        return posterior_of(group).sample()

    visit(below, below.start(num_rows(encoding), encoding), of_posterior)
    return counts
