"""What ratio heads see of z: z itself, or features of it that a source knows.

Of many latents the decoder may make a feature map. A convolutional head on that map learns what a
perceptron on z hardly does, and log r(z) stays a function of z alone:

    source = SingleGroup(prior, posterior, vae.decode, module=vae, features=vae.decoder[:2])
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from ncprior.distributions import Sampleable
from ncprior.source import Group, LatentSource, posterior_of

_ONE = Size()


def head_input(source: LatentSource[Any, Any], k: int, z: Tensor) -> Tensor:
    """Returns what head k sees of z_k.

    The VAE gets no gradient: of features there is one with respect to z alone, where z asks for it.

    Arguments:
        source: The VAE; its method ``features(k, z)``, if it has one, tells.
        k: The group, from 0.
        z: Latents, with shape ``(*, B, *event)``.

    Returns:
        Features of z, with shape ``(*, B, ...)``; z itself without any.

    Example:
        >>> z = torch.randn(5, 4, 2)
        >>> head_input(source, 0, z) is z
        True
    """
    with nullcontext() if z.requires_grad else torch.no_grad():
        return source.features(k, z)


def with_head_inputs(source: LatentSource[Any, Any], k: int, group: Group, z: Tensor) -> Group:
    """Returns a group whose laws draw what head k sees, for heads to be made by.

    Arguments:
        source: The VAE.
        k: The group, from 0.
        group: The group, with a posterior.
        z: A draw of it.
    """
    if head_input(source, k, z) is z:
        return group
    posterior: Any = _Seen(source, k, posterior_of(group))
    return group._replace(prior=_Seen(source, k, group.prior), posterior=posterior)


class _Seen(NamedTuple):
    """A law of z_k, drawn from as head k sees it."""

    source: LatentSource[Any, Any]
    k: int
    law: Sampleable

    def sample(self, sample_shape: Size = _ONE) -> Tensor:
        return head_input(self.source, self.k, self.law.sample(sample_shape))
