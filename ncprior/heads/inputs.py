"""Inputs of the ratio heads: z, or features of z computed by the source.

The decoder may turn many latents into a feature map. A convolutional head on that map learns much
faster than an MLP on z, and log r(z) is still a function of z alone:

    source = SingleGroup(prior, posterior, vae.decode, module=vae, features=vae.decoder[:2])
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from ncprior.distributions import Sampleable
from ncprior.source import Group, LatentSource, posterior_of, require_source
from ncprior.utils.require import require_counts, require_instance

_ONE = Size()


def head_input(source: LatentSource[Any, Any], k: int, z: Tensor) -> Tensor:
    """Returns the input of ratio head k.

    Gradients go through the VAE only if z requires them.

    Arguments:
        source: The VAE, whose ``features(k, z)`` is evaluated.
        k: The group, from 0.
        z: Latents, with shape ``(*, B, *event)``.

    Returns:
        Features of z, with shape ``(*, B, ...)``; by default z itself.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no such group.

    Example:
        >>> z = torch.randn(5, 4, 2)
        >>> head_input(source, 0, z) is z
        True
    """
    require_source(source)
    require_counts(f"[0, {source.num_groups - 1}]", k=k)
    require_instance("z", z, Tensor, "Pass latents of group k as a tensor.")
    with nullcontext() if z.requires_grad else torch.no_grad():
        return source.features(k, z)


def with_head_inputs(source: LatentSource[Any, Any], k: int, group: Group, z: Tensor) -> Group:
    """Returns a group whose prior and posterior draw inputs of head k, for making the head.

    Arguments:
        source: The VAE.
        k: The group, from 0.
        group: The group, with a posterior.
        z: A draw of the posterior.
    """
    if head_input(source, k, z) is z:
        return group
    posterior: Any = _HeadInput(source, k, posterior_of(group))
    return group._replace(prior=_HeadInput(source, k, group.prior), posterior=posterior)


class _HeadInput(NamedTuple):
    """Distribution of the input of head k under a distribution of z_k."""

    source: LatentSource[Any, Any]
    k: int
    distribution: Sampleable

    def sample(self, sample_shape: Size = _ONE) -> Tensor:
        return head_input(self.source, self.k, self.distribution.sample(sample_shape))
