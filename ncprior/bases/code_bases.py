"""Bases for all groups of codes of a source, each given the codes of the groups before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ncprior.bases.code_network import CodeNetwork, fit_code_network
from ncprior.bases.codes import CodeFrequencies, fit_code_frequencies
from ncprior.bases.rebase import without_bases
from ncprior.data.stream import one_pass
from ncprior.distributions import num_categories_of
from ncprior.source import LatentSource, device_of, num_rows, require_source, sample_posterior
from ncprior.utils.require import require_choice

_BATCH = 500  # rows

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
    it; frequencies do not.

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
    codes = codes_of(source, data)
    counts = categories_of(source, codes)
    if kind == "frequencies":
        pairs = zip(codes, counts, strict=True)
        return [fit_code_frequencies(z, num_categories=count) for z, count in pairs]
    return [
        fit_code_network(z, context=context_of(source, codes[:k]), num_categories=count, **options)
        for k, (z, count) in enumerate(zip(codes, counts, strict=True))
    ]


def codes_of(source: LatentSource[Any, Any], data: Any) -> list[Tensor]:  # noqa: ANN401
    """Returns the codes of data, one tensor ``(N, *event)`` per group."""
    batches = [sample_posterior(source, x)[0] for x in one_pass(data, _BATCH, device_of(source))]
    if not batches:
        raise ValueError("The data have no rows. Pass one row of x or more.")
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def categories_of(source: LatentSource[Any, Any], codes: list[Tensor]) -> list[int | None]:
    """Returns the numbers of values of the codes of every group, as far as the source tells."""
    below = without_bases(source)
    state, counts = below.start(1), []
    for z in codes:
        counts.append(num_categories_of(below.group(state).prior))
        state = below.advance(state, z[:1])
    return counts


def context_of(
    source: LatentSource[Any, Any], before: list[Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """Returns the contexts of a group as a function of row numbers; ``None`` if it has none.

    Arguments:
        source: The VAE.
        before: The codes of the groups in front of it, with shape ``(N, *event)``.
    """
    if not before or _context(source, before, torch.arange(1)) is None:
        return None
    return partial(_context, source, before)


@torch.no_grad()
def _context(source: LatentSource[Any, Any], before: list[Tensor], rows: Tensor) -> Any:  # noqa: ANN401
    chosen = [z[rows.to(z.device)] for z in before]
    state = source.start(num_rows(chosen))
    for z in chosen:
        state = source.advance(state, z)
    return source.group(state).context
