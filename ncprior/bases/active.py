r"""Active latents of a VAE: those that its posterior uses.

A VAE may ignore some of its latents: there q(z_j | x) is the prior p(z_j) for every x. Such a
collapsed latent carries nothing and needs no correction, but a base or a head would have to learn
so, among the others. A latent is active if

.. math::
    E_x \, KL(q(z_j | x) \,\|\, p(z_j)) \ge 0.01 \text{ nats.}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ncprior.data.batches import one_pass
from ncprior.source import (
    Group,
    LatentSource,
    device_of,
    num_rows,
    posterior_of,
    require_source,
    visit,
)
from ncprior.utils.latent_kl import THRESHOLD, LatentKL
from ncprior.utils.random_state import seeded
from ncprior.utils.require import require_counts, require_numbers


def active_latents(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    *,
    threshold: float = THRESHOLD,
    batch_size: int = 1000,
) -> list[Tensor]:
    """Active latents of every group: those that the posterior uses.

    Arguments:
        source: The VAE.
        data: A tensor or map-style dataset of x, a ``DataLoader``, or a list of batches.
        threshold: The mean of KL(q(z_j | x) || p(z_j)), in nats, from which a latent is active. A
            latent is collapsed only if the mean plus three standard errors is below.
        batch_size: Rows per batch, where batches are made here.

    Returns:
        A mask of event shape per group, on the CPU. All latents are active where the divergence
        is not known, see :func:`kl_per_latent`, or there are fewer than 16 rows.

    Raises:
        TypeError: If the source is not a :class:`~ncprior.LatentSource`, or a number has the wrong
            type.
        ValueError: If an argument is out of range, or the data have no rows.

    Example:
        >>> active_latents(source, torch.randn(100, 3))
        [tensor([True, True])]
    """
    require_numbers("[0, inf)", threshold=threshold)
    return [kl.active(threshold) for kl in measure_kl(source, data, batch_size)]


def kl_per_latent(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    *,
    batch_size: int = 1000,
) -> list[Tensor]:
    """Mean over data of KL(q(z_j | x) || p(z_j)) in nats, for every latent of every group.

    The latents z_<k of groups before are drawn from the posterior.

    Arguments:
        source: The VAE.
        data: A tensor or map-style dataset of x, a ``DataLoader``, or a list of batches.
        batch_size: Rows per batch, where batches are made here.

    Returns:
        One tensor of event shape per group, in float64 on the CPU. NaN where q or p ties a latent
        to others (a Gaussian of full covariance, a flow, most latents of a mixture), where p has
        no density, and for codes.

    Raises:
        TypeError: If the source is not a :class:`~ncprior.LatentSource`, or a count is not a whole
            number.
        ValueError: If an argument is out of range, or the data have no rows.

    Example:
        >>> kl_per_latent(source, torch.randn(100, 3))[0].shape
        torch.Size([2])
    """
    return [kl.mean for kl in measure_kl(source, data, batch_size)]


@seeded(0)  # the draws of z_<k leave the generators as they are
@torch.no_grad()
def measure_kl(source: LatentSource[Any, Any], data: Any, batch_size: int) -> list[LatentKL]:  # noqa: ANN401
    """Returns the sums of the divergences of every group over data, see :func:`kl_per_latent`."""
    require_source(source)
    require_counts(batch_size=batch_size)
    found: dict[int, LatentKL] = {}

    def look(k: int, group: Group) -> Tensor:
        q = posterior_of(group)
        kl = LatentKL.of(q, group.prior)
        found[k] = found[k].merged(kl) if k in found else kl
        return q.sample()

    for batch in one_pass(data, batch_size, device_of(source)):
        encoding = source.encode(batch)
        visit(source, source.start(num_rows(encoding), encoding), look)
    if not found or found[0].rows == 0:
        raise ValueError("The data have no rows. Pass one row of x or more.")
    return [found[k] for k in range(source.num_groups)]
