"""Draws of distributions without a wait for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Independent, Normal


def normal_parameters(prior: Any) -> tuple[Tensor, Tensor] | None:  # noqa: ANN401
    """Returns the means and standard deviations of a normal distribution of one dtype, else None.

    Example:
        >>> normal_parameters(Independent(Normal(torch.zeros(2), 1.0), 1))
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    while type(prior) is Independent:
        prior = prior.base_dist
    if type(prior) is not Normal or prior.loc.dtype != prior.scale.dtype:
        return None
    return prior.loc, prior.scale


@torch.no_grad()
def drawn(distribution: Any, sample_shape: Size = Size()) -> Tensor:  # noqa: ANN401, B008
    """Returns draws, bit for bit those of ``distribution.sample``, without a wait for a GPU.

    ``Normal.sample`` of torch waits until it knows that all standard deviations are positive.

    Example:
        >>> drawn(Normal(torch.zeros(3), 1.0), torch.Size([5])).shape
        torch.Size([5, 3])
    """
    normal = normal_parameters(distribution)
    if normal is None:
        z: Tensor = distribution.sample(sample_shape)
        return z
    mean, sd = normal
    return mean.new_empty(sample_shape + mean.shape).normal_().mul_(sd).add_(mean)


def sample_and_log_prob(q: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Draws z with log q(z); some flow posteriors can evaluate log q at their own draws only.

    Example:
        >>> z, log_q = sample_and_log_prob(Normal(torch.zeros(5), 1.0))
        >>> z.shape, log_q.shape
        (torch.Size([5]), torch.Size([5]))
    """
    if hasattr(q, "sample_and_log_prob"):
        z, log_q = q.sample_and_log_prob()
        return z, log_q
    z = drawn(q)
    return z, q.log_prob(z)


def gumbel(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns draws -log e of Gumbel(0, 1), with e ~ Exp(1); always finite.

    An e that rounds to zero is replaced by one just below the resolution of the dtype.

    Arguments:
        like: A tensor with the dtype and the device of the draws.
        shape: Their shape.

    Example:
        >>> gumbel(torch.zeros(2), (3, 5)).shape
        torch.Size([3, 5])
    """
    e = like.new_empty(tuple(shape)).exponential_()
    return e.clamp_(min=torch.finfo(like.dtype).eps / 4).log_().neg_()
