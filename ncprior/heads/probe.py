"""Heads for every group of a source, made from one batch of data."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.heads.inputs import with_head_inputs
from ncprior.heads.make import make_head
from ncprior.source import Group, LatentSource, num_rows, posterior_of, require_source, visit
from ncprior.utils.errors import naming_group


@torch.no_grad()
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
        TypeError: If the decoder does not return one tensor with one row per row of x.

    Warns:
        UserWarning: If reconstructions of a row are no closer to it than to other rows.
    """
    require_source(source)
    encoding = source.encode(x)
    rows, heads = num_rows(encoding), []

    def make(k: int, group: Group) -> Tensor:
        z = posterior_of(group).sample()
        with naming_group(k):
            heads.append(make_head(with_head_inputs(source, k, group, z), **options))
        return z

    _, state = visit(source, source.start(rows, encoding), make)
    x_hat = source.decode(state)
    if not isinstance(x_hat, Tensor) or len(x_hat) != rows:
        got = f"{tuple(x_hat.shape)}" if isinstance(x_hat, Tensor) else type(x_hat).__name__
        raise TypeError(
            f"The decoder must return the mean of p(x | z) as one tensor of {rows} rows; got {got}."
        )
    _warn_if_blurred(x_hat, x[0] if isinstance(x, tuple | list) else x)
    return heads


def _warn_if_blurred(x_hat: Tensor, x: Any) -> None:  # noqa: ANN401
    """Warns if the posterior is so wide that z does not identify the row that it came from."""
    if not isinstance(x, Tensor) or len(x) < 8 or x[0].numel() != x_hat[0].numel():
        return
    distance = torch.cdist(x_hat.flatten(1).float(), x.flatten(1).to(x_hat.device, torch.float32))
    own = distance.diagonal()
    others = (distance.sum(1) - own) / (len(x) - 1)
    if (own < others).float().mean() < 0.9:
        warnings.warn(
            "Reconstructions of a row are no closer to it than to other rows. Is the posterior's "
            "scale a standard deviation (from a log-variance, (0.5 * log_var).exp())? Does "
            "advance or decode leave something out, or group mix up its inputs? Compare with the "
            "model's own forward pass.",
            stacklevel=5,
        )
