"""Scores of distributions: gradients of log-densities with respect to z."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ncprior.utils.draws import normal_parameters


def score(distribution: Any, z: Tensor) -> Tensor:  # noqa: ANN401
    """Returns ∇ log p(z), of the shape of z; in closed form for normal distributions.

    Arguments:
        distribution: A distribution on R^n of batch shape ``(B,)``, with ``log_prob``.
        z: Latents, with shape ``(*, B, *event)``.

    Raises:
        TypeError: If there is no log-density, or its gradient is cut.

    Example:
        >>> from torch.distributions import Normal
        >>> score(Normal(torch.zeros(3), 2.0), torch.tensor([0.0, 1.0, 4.0]))
        tensor([ 0.0000, -0.2500, -1.0000])
    """
    normal = normal_parameters(distribution)
    if normal is not None:
        mean, sd = normal
        return (mean - z) / sd.square()
    if not z.is_floating_point() or not hasattr(distribution, "log_prob"):
        raise TypeError(_message(distribution))
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        try:
            log_p = distribution.log_prob(z)
        except NotImplementedError as error:
            raise TypeError(_message(distribution)) from error
        if not log_p.requires_grad:
            raise TypeError(_message(distribution))
        return torch.autograd.grad(log_p.sum(), z)[0]


def _message(distribution: Any) -> str:  # noqa: ANN401
    return (
        f"The score term needs log-densities of posterior and prior with a gradient in z; "
        f"{type(distribution).__name__} has none. Set score_weight=0."
    )
