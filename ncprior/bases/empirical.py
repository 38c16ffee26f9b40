"""Bases made of stored latents, and the number of floats that a base stores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from ncprior.bases.mixture import GaussianMixture
from ncprior.distributions import Sampleable, parameters


class NoPrior:
    """Stands for the prior of a model that has none, and refuses to be drawn from.

    Arguments:
        reason: Why there is none, as one sentence.
        event_shape: Shape of z without batch, where it is known.

    Example:
        >>> NoPrior("An AE has no prior.").sample()
        Traceback (most recent call last):
        ValueError: An AE has no prior. Fit one: rebase(source, fit_mixture(latents_of(source, x))).
    """

    def __init__(self, reason: str, event_shape: Sequence[int] | None = None) -> None:
        self.reason, self.event_shape = reason, event_shape

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Refuses.

        Raises:
            ValueError: Always, with the reason and the remedy.
        """
        raise ValueError(
            f"{self.reason} Fit one: rebase(source, fit_mixture(latents_of(source, x)))."
        )


class Empirical:
    """The empirical distribution of stored latents: rows of them, drawn with replacement.

    Of training encodings it is the reference that no other base can be closer than, and costs the
    most numbers. It has no density.

    Arguments:
        z: Latents, with shape ``(N, *event)``.

    Raises:
        ValueError: If there are none.

    Example:
        >>> from ncprior.bases import latents_of
        >>> base = Empirical(latents_of(source, x))
        >>> base.sample((7,)).shape
        torch.Size([7, 2])
    """

    def __init__(self, z: Tensor) -> None:
        if z.ndim < 1 or len(z) < 1:
            raise ValueError(
                f"The latents have shape (N, *event), with N at least 1; got {tuple(z.shape)}."
            )
        self.z, self.event_shape = z.detach(), z.shape[1:]

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws rows, with shape ``(*sample_shape, *event)``."""
        count = math.prod(sample_shape)
        rows = torch.randint(len(self.z), (count,), device=self.z.device)
        return self.z[rows].reshape(*sample_shape, *self.event_shape)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name."""
        return {"z": self.z}


def stored_numbers(base: Sampleable) -> int:
    """Counts the numbers that a base stores: a fair price to set beside its quality.

    Of Cholesky factors these are the lower triangles; masks and orders of a flow are none.

    Arguments:
        base: A base of this package, or a distribution that :mod:`ncprior.distributions` knows.

    Returns:
        The number of floating-point numbers.

    Raises:
        TypeError: If there is no telling what the base stores.

    Example:
        >>> from ncprior.bases import fit_gaussian
        >>> stored_numbers(fit_gaussian(torch.randn(50, 2)))  # a weight, a mean and a triangle
        6
    """
    if isinstance(base, GaussianMixture) and base.is_full:
        k, d = base.loc.shape
        return k * (1 + d + d * (d + 1) // 2)
    if hasattr(base, "tensors"):
        tensors = base.tensors()
    else:
        known = parameters(base) if isinstance(base, Distribution) else None
        if known is None:
            raise TypeError(
                f"There is no telling what a {type(base).__name__} stores. Give it a method "
                f"tensors(), which returns its tensors by name."
            )
        (tensors,) = known.values()
    return sum(t.numel() for t in tensors.values() if t.is_floating_point())
