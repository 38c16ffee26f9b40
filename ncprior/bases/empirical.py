"""Empirical distribution of latents, placeholder of a missing prior, and size of a base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Size, Tensor
from torch.distributions import Distribution

from ncprior.bases.checks import size_of
from ncprior.bases.mixture import GaussianMixture
from ncprior.distributions import Sampleable, parameters
from ncprior.utils.require import described, numbers, require_instance, require_shape


class NoPrior:
    """Placeholder for the prior of a model without one, such as an autoencoder; sampling raises.

    Arguments:
        reason: Why the model has no prior, as one sentence.
        event_shape: Shape of z without batch, or ``None`` if unknown.
        remedy: Code that fits a prior, for the message.

    Example:
        >>> NoPrior("An AE has no prior.").sample()
        Traceback (most recent call last):
        ValueError: An AE has no prior. Fit one: rebase(source, fit_mixture(latents_of(source, x))).
    """

    def __init__(
        self,
        reason: str,
        event_shape: Sequence[int] | None = None,
        *,
        remedy: str = "rebase(source, fit_mixture(latents_of(source, x)))",
    ) -> None:
        require_instance("reason", reason, str, "Pass a sentence.")
        require_instance("remedy", remedy, str, "Pass a line of code.")
        self.reason, self.remedy = reason, remedy
        self.event_shape = (
            None if event_shape is None else Size(require_shape("event_shape", event_shape))
        )

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Raises an error with the reason and the remedy.

        Raises:
            ValueError: Always; fit a base, such as a Gaussian mixture, and put it on the source.
        """
        raise ValueError(f"{self.reason} Fit one: {self.remedy}.")


class Empirical:
    """Empirical distribution of stored latents: draws rows of them with replacement.

    On encodings of the training data it is the closest base to the aggregate posterior, and stores
    the most numbers. It has no density.

    Arguments:
        z: Latents, with shape ``(N, *event)``: real numbers or codes, as a tensor, an array or a
            list. They are not copied: what is written into a tensor later is drawn.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If there are no latents, or some are not finite.

    Example:
        >>> from ncprior.bases import latents_of
        >>> base = Empirical(latents_of(source, x))
        >>> base.sample((7,)).shape
        torch.Size([7, 2])
    """

    def __init__(self, z: Tensor | ArrayLike) -> None:
        self.z = numbers("z", z).detach()
        if self.z.dtype == torch.float64 and not isinstance(z, Tensor):
            self.z = self.z.to(torch.get_default_dtype())  # as arrays and lists are by default
        self.event_shape = self.z.shape[1:]

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws rows, with shape ``(*sample_shape, *event)``."""
        size = size_of(sample_shape)
        rows = torch.randint(len(self.z), (size.numel(),), device=self.z.device)
        return self.z[rows].reshape(size + self.event_shape)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name."""
        return {"z": self.z}


def stored_numbers(base: Sampleable) -> int:
    """Number of floating-point numbers that a base stores: its cost, to compare with its quality.

    Cholesky factors count by their lower triangles. Integer and boolean tensors, such as masks and
    permutations of a flow, do not count.

    Arguments:
        base: A base of this package, or a distribution that :mod:`ncprior.distributions`
            supports.

    Returns:
        The number of floating-point numbers.

    Raises:
        TypeError: If the base does not expose its tensors; give it a method ``tensors()``.

    Example:
        >>> from ncprior.bases import fit_gaussian
        >>> stored_numbers(fit_gaussian(torch.randn(50, 2)))  # a weight, a mean and a triangle
        6
    """
    if isinstance(base, GaussianMixture) and base.is_full:
        k, d = base.loc.shape
        return k * (1 + d + d * (d + 1) // 2)
    if hasattr(base, "tensors") and not isinstance(base, type):
        tensors = base.tensors()
    else:
        known = parameters(base) if isinstance(base, Distribution) else None
        if known is None:
            raise TypeError(
                f"Cannot count the numbers that the base stores; got {described(base)}. Give it a "
                f"method tensors(), which returns its tensors by name."
            )
        (tensors,) = known.values()
    return sum(t.numel() for t in tensors.values() if t.is_floating_point())
