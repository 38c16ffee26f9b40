"""Heads for every group of a source, made from one batch of data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.heads.checks import naming_parts
from ncprior.heads.inputs import with_head_inputs
from ncprior.heads.make import make_head, require_options
from ncprior.source import Group, LatentSource, device_of, num_rows, posterior_of, visit
from ncprior.utils.batches import own_batch
from ncprior.utils.errors import naming_group
from ncprior.utils.require import described


def probe_heads(
    source: LatentSource[Any, Any],
    x: Any,  # noqa: ANN401
    **options: Any,  # noqa: ANN401
) -> list[nn.Module]:
    """Returns one new head per group, made for the shapes and scales of one batch.

    Arguments:
        source: The VAE.
        x: One batch, as the user's loader yields it; some tens of rows or more.
        options: Arguments of :func:`ncprior.heads.make_head`.

    Raises:
        TypeError: If x is no batch, or the decoder does not return one tensor with one row per row
            of x.
        ValueError: If x has no rows, or the posterior of a row is not finite.

    Warns:
        UserWarning: If reconstructions of a row are no closer to it than to other rows, or are not
            finite; or if one row is to give the scales of a context.
    """
    return _heads(source, x, options, stacklevel=8)


def more_heads(source: LatentSource[Any, Any], x: Any, **options: Any) -> list[nn.Module]:  # noqa: ANN401
    """Returns heads as :func:`probe_heads` does, for a source whose decoder was probed before."""
    return _heads(source, x, options, stacklevel=None)


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
@torch.no_grad()
def _heads(
    source: LatentSource[Any, Any],
    x: Any,  # noqa: ANN401
    options: dict[str, Any],
    *,
    stacklevel: int | None,
) -> list[nn.Module]:
    require_options(**options)
    heads: list[nn.Module] = []

    def make(k: int, group: Group) -> Tensor:
        z = posterior_of(group).sample()
        with naming_group(k):
            heads.append(make_head(with_head_inputs(source, k, group, z), **options))
        return z

    _probe(source, x, make, stacklevel=stacklevel)
    return heads


@torch.no_grad()
def probe_source(source: LatentSource[Any, Any], x: Any, *, stacklevel: int | None = 6) -> None:  # noqa: ANN401
    """Tries the parts of a source on one batch, with the errors and warnings of `probe_heads`.

    Arguments:
        source: The VAE.
        x: The batch.
        stacklevel: Of warnings about decoded x; ``None`` does not decode.
    """
    _probe(source, x, lambda k, group: posterior_of(group).sample(), stacklevel=stacklevel)


def _probe(
    source: LatentSource[Any, Any],
    x: Any,  # noqa: ANN401
    choose: Callable[[int, Group], Tensor],
    *,
    stacklevel: int | None,
) -> None:
    """Visits all groups; then decodes, with warnings at this stacklevel, unless it is ``None``."""
    x = own_batch(x, device_of(source))
    with naming_parts(source):
        encoding = source.encode(x)
        rows = num_rows(encoding)
        if rows == 0:
            raise ValueError(
                "x must have 1 or more rows; got an encoding of none. Pass more data."
            )
        latents, state = visit(source, source.start(rows, encoding), choose)
        _require_finite(latents)
        if stacklevel is None:
            return
        x_hat = source.decode(state)
    if not isinstance(x_hat, Tensor) or x_hat.shape[:1] != (rows,):
        raise TypeError(
            f"The decoder must return the mean of p(x | z) as one tensor of {rows} rows; got "
            f"{described(x_hat)}."
        )
    if warn_if_not_finite(x_hat, "The decoder", stacklevel):
        _warn_if_blurred(x_hat, _observed(source, x), stacklevel)


def _observed(source: LatentSource[Any, Any], x: Any) -> Any:  # noqa: ANN401
    """The x that the decoder returns; ``None`` of named columns, such as counts, which are noisy."""
    first = x[0] if isinstance(x, tuple | list) else x
    try:
        return source.observed(x) if isinstance(first, Tensor) else None
    except TypeError:  # complex numbers, say
        return None


def _require_finite(latents: tuple[Tensor, ...]) -> None:
    for k, z in enumerate(latents):
        bad = ~z.isfinite().reshape(len(z), -1).all(1)
        if bad.any():
            raise ValueError(
                f"Group {k}: z drawn from q(z | x) is NaN or infinite in {int(bad.sum())} of {len(z)} "
                f"rows. x has NaN or infinity there, or the encoder's weights do."
            )


def warn_if_not_finite(x: Tensor, whose: str, stacklevel: int) -> bool:
    """Returns whether decoded x are finite, with a warning if they are not; waits for a GPU.

    Arguments:
        x: Decoded means, with shape ``(B, ...)``.
        whose: The decoder's name in the warning.
        stacklevel: The frame that the warning names, counted from here as 1.

    Raises:
        TypeError: If x is no tensor.

    Warns:
        UserWarning: If a value is NaN or infinite.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{whose} must return the mean of p(x | z) as one tensor; got {described(x)}. Wrap it in a "
            f"function that returns the tensor."
        )
    finite = torch.isfinite(x).reshape(len(x), -1).all(1)
    if finite.all():
        return True
    warnings.warn(
        f"{whose} has returned NaN or infinity in {int((~finite).sum())} of {len(x)} rows. Look for "
        f"an overflow, as of half precision, in the decoder.",
        stacklevel=stacklevel,
    )
    return False


def _warn_if_blurred(x_hat: Tensor, x: Any, stacklevel: int) -> None:  # noqa: ANN401
    """Warns if the posterior is so wide that z does not identify the row that it came from."""
    if x_hat.dtype == torch.long:
        return  # numbers of tokens have no distances
    if not isinstance(x, Tensor) or len(x) < 8 or x[0].numel() != x_hat[0].numel():
        return
    distance = torch.cdist(_standardised(x_hat), _standardised(x.to(x_hat.device)))
    own = distance.diagonal()
    others = (distance.sum(1) - own) / (len(x) - 1)
    if (own < others).float().mean() < 0.9:
        warnings.warn(
            "Reconstructions of a row are no closer to it than to other rows. Is the posterior's "
            "scale a standard deviation (from a log-variance, (0.5 * log_var).exp())? Does "
            "advance or decode leave something out, or group mix up its inputs? Compare with the "
            "model's own forward pass.",
            stacklevel=stacklevel,
        )


def _standardised(x: Tensor) -> Tensor:
    """Rows of mean 0 and standard deviation 1 over all: data in [0, 255] is like data in [0, 1]."""
    x = x.reshape(len(x), -1).float()
    return (x - x.mean()) / x.std().clamp_min(1e-12)
