"""Values measured in every group along walks through the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncprior.bases.mixture import GaussianMixture
from ncprior.distributions import Sampleable
from ncprior.heads.checks import naming_parts
from ncprior.heads.product import factors
from ncprior.prior import NCPrior
from ncprior.samplers.target import supports_langevin
from ncprior.source import Group, device_of, num_rows, posterior_of, visit
from ncprior.utils.batches import to_device
from ncprior.utils.draws import drawn


class GroupKind(NamedTuple):
    """Properties of a group that decide its samplers, as in :class:`GroupReport`."""

    has_context: bool
    has_gradient: bool
    num_components: int
    num_factors: int
    variance: float

    @classmethod
    def of(cls, group: Group, head: nn.Module) -> GroupKind:
        """Returns the properties of a group and its head."""
        prior = group.prior
        components = len(prior.logits) if isinstance(prior, GaussianMixture) else 1
        return cls(
            group.context is not None,
            supports_langevin(prior),
            components,
            len(factors(head)),
            _variance(prior),
        )


def _variance(prior: Sampleable) -> float:
    """Mean variance of the latents under the prior, in squared units of z; 1 if it does not know it."""
    try:
        variance = getattr(prior, "variance", None)
    except NotImplementedError:
        return 1.0
    if not isinstance(variance, Tensor) or not variance.isfinite().all():
        return 1.0
    return variance.float().mean().item() or 1.0


@torch.no_grad()
def group_kinds(prior: NCPrior, x: Any) -> list[GroupKind]:  # noqa: ANN401
    """Properties of all groups of a prior that decide their samplers.

    Arguments:
        prior: The prior.
        x: A batch of data, as the loader yields it.
    """
    encoding, kinds = prior.source.encode(to_device(x, device_of(prior.source))), []

    def look(k: int, group: Group) -> Tensor:
        kinds.append(GroupKind.of(group, prior.heads[k]))
        return posterior_of(group).sample()

    visit(prior.source, prior.source.start(num_rows(encoding), encoding), look)
    return kinds


@contextmanager
def evaluating(prior: NCPrior) -> Iterator[None]:
    """Context with the heads in evaluation mode; their own modes are restored at the end.

    Errors of torch name the devices of base, VAE and heads if they differ.
    """
    modes = [(module, module.training) for module in prior.modules()]
    prior.eval()
    try:
        with naming_parts(prior.source, prior.heads):
            yield
    finally:
        for module, training in modes:
            module.training = training


def walk_posterior(
    prior: NCPrior,
    encoding: Any,  # noqa: ANN401
    measure: Callable[[NCPrior, int, Group, Tensor], Tensor],
    shape: tuple[int, ...] = (),
) -> Tensor:
    """Values measured in every group whose head is in use, at z_k ~ q under z_<k ~ q.

    Arguments:
        prior: The prior.
        encoding: A batch of data, encoded by the source.
        measure: Maps the prior, k, the group and z_k ~ q to values of shape ``(*shape, B)``.
        shape: The leading shape of the values.

    Returns:
        The values in float64 on the CPU, with shape ``(K, *shape, B)``; NaN if a head is off.

    Raises:
        FloatingPointError: If a value is not finite; the message names the group.
    """
    num_groups, batch_size = prior.source.num_groups, num_rows(encoding)
    measured = torch.full((num_groups, *shape, batch_size), math.nan, dtype=torch.float64)

    def choose(k: int, group: Group) -> Tensor:
        z = drawn(posterior_of(group))
        if prior.is_on(k):
            measured[k] = measure(prior, k, group, z).cpu()  # the one synchronisation of a group
            if not torch.isfinite(measured[k]).all():
                raise FloatingPointError(
                    f"Group {k}: log r is not finite. Look for NaN or infinity in the head's "
                    f"weights, the data, the prior or the context."
                )
        return z

    visit(prior.source, prior.source.start(batch_size, encoding), choose)
    return measured


def scaled_log_r(prior: NCPrior, k: int, z: Tensor, group: Group) -> Tensor:
    """Returns α log r_k(z) in nats, with shape ``(*, B)``."""
    return prior.strength * prior.log_r(k, z, group.context)
