"""Gaussian decoder noise for VAEs that were trained with squared error and have no p(x | z)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ncprior.bases.rebase import Rebased
from ncprior.data.batches import one_pass
from ncprior.data.checked import checked_batches
from ncprior.saving.identity import SIGMA
from ncprior.source import LatentSource, WrappedSource, device_of, require_source, sample_posterior
from ncprior.utils.precision import at_least_float32
from ncprior.utils.require import described, require_counts, require_instance, require_numbers
from ncprior.utils.visible import require_eval


class GaussianDecoder(WrappedSource):
    """Source with the likelihood p(x | z) = N(x̂, σ² I), x̂ the output of a source's decoder.

    Training with squared error is maximum likelihood with an unknown σ. All other methods and
    attributes are those of the wrapped source.

    Arguments:
        source: The VAE.
        sigma: σ, in units of x.
        origin: Origin of σ, shown by ``print``.

    Raises:
        ValueError: If σ is not positive and finite.
        TypeError: If an argument has the wrong type, or the source is wrapped by ``rebase``;
            reverse the order, as in ``rebase(GaussianDecoder(source, 0.1), base)``.

    Example:
        >>> state = source.advance(source.start(4), torch.zeros(4, 2))
        >>> GaussianDecoder(source, 0.1).likelihood(state)
        Independent(Normal(loc: torch.Size([4, 3]), scale: torch.Size([4, 3])), 1)
        >>> GaussianDecoder.fitted(source, torch.randn(100, 3)).num_groups
        1
    """

    def __init__(
        self, source: LatentSource[Any, Any], sigma: float, origin: str = "given"
    ) -> None:
        require_source(source)
        require_numbers("(0, inf)", sigma=sigma)
        require_instance("origin", origin, str, "Pass a short text.")
        if isinstance(source, Rebased):
            raise TypeError(
                "A GaussianDecoder around a rebased source would hide the base from saving. Use "
                "rebase(GaussianDecoder(source, sigma), base)."
            )
        super().__init__(source)
        self.sigma, self.origin = float(sigma), origin

    @classmethod
    @torch.no_grad()
    def fitted(
        cls,
        source: LatentSource[Any, Any],
        held_out: Any,  # noqa: ANN401
        batch_size: int = 256,
    ) -> GaussianDecoder:
        """Gaussian decoder with the maximum-likelihood σ of held-out data.

        σ² is the mean of (x - x̂)² over pixels, rows and z ~ q(z | x), which maximises
        E_q log N(x; x̂, σ² I).

        Arguments:
            source: The VAE.
            held_out: Data that the VAE was not trained on: a tensor or map-style dataset of x, a
                ``DataLoader``, or a list of batches. If a batch is a tuple such as (image, label)
                or a mapping, x is its first item.
            batch_size: Rows per batch, where batches are made here.

        Returns:
            The source with the likelihood of that σ.

        Raises:
            ValueError: If the decoder does not return x̂ of the shape of x, the residuals are all 0
                or not finite, the data has no rows or NaN, or the VAE is in training mode.
            TypeError: If an argument has the wrong type.
        """
        require_source(source)
        require_counts(batch_size=batch_size)
        require_eval(source, source.module)
        device, total, count, rows = device_of(source), 0.0, 0, 0
        for batch in checked_batches(one_pass(held_out, batch_size), device):
            x, x_hat = source.observed(batch), source.decode(sample_posterior(source, batch)[1])
            if not isinstance(x_hat, Tensor) or x_hat.shape != x.shape:
                raise ValueError(
                    f"Residuals need x and the decoder's mean of one shape; got {described(x)} and "
                    f"{described(x_hat)}. Pass data as the decoder returns them."
                )
            require_range(x, x_hat)
            x = x.to(x_hat) if x.dtype == torch.bool else x
            total += float((x - x_hat).cpu().double().square().sum())
            count, rows = count + x.numel(), rows + len(x)
        if not 0 < total < math.inf:
            raise ValueError(
                f"The residuals x - x̂ must be finite and not all 0; got a sum of squares of {total}. "
                f"Look for NaN in the decoder's weights, or for a decoder that returns x itself."
            )
        return cls(source, math.sqrt(total / count), f"fitted on {rows} held-out rows")

    def likelihood(self, state: Any) -> Distribution:  # noqa: ANN401
        """Likelihood p(x | z) = N(x̂, σ² I).

        Arguments:
            state: State of the source after all groups.

        Returns:
            The distribution of x, with batch shape ``(B,)`` and event shape that of x.
        """
        mean = at_least_float32(self.source.decode(state))
        normal = Normal(mean, torch.full_like(mean, self.sigma), validate_args=False)
        return Independent(normal, mean.ndim - 1, validate_args=False)

    def __repr__(self) -> str:
        kind = type(self.source).__name__
        return f"GaussianDecoder({kind}, decoder noise of one σ = {self.sigma:.4g}, {self.origin})"

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the wrapped source, and σ."""
        return {**super().facts(), SIGMA: self.sigma}


def require_range(x: Tensor, x_hat: Tensor) -> None:
    """Validates that images are not in 0 to 255 where those of the decoder are in 0 to 1.

    Raises:
        ValueError: If they are. Pass them as the VAE was trained.
    """
    whole = not x.is_floating_point() and x.dtype != torch.bool
    if whole and x.max() > 1 >= x_hat.max():
        raise ValueError(
            f"Data must have the range of images decoded by the VAE, at most 1; got whole numbers "
            f"up to {int(x.max())}. Pass them as the VAE was trained, such as x / 255."
        )


def gaussian_decoder_of(source: LatentSource[Any, Any]) -> GaussianDecoder | None:
    """Returns the ``GaussianDecoder`` in a stack of wrapped sources, or ``None``."""
    while isinstance(source, WrappedSource):
        if isinstance(source, GaussianDecoder):
            return source
        source = source.source
    return None
