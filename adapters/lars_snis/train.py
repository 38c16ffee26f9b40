"""Training of the MNIST VAEs of LARS and SNIS, on binary images that are drawn anew in every epoch.

train_vae(vae, images, epochs=150)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ncprior.adapters.lars_snis.priors import LARSPrior
from ncprior.adapters.lars_snis.vae import EIMVAE, ConvEIMVAE
from ncprior.utils.require import (
    floats_of_batch,
    require_counts,
    require_instance,
    require_numbers,
)


class Binarised:
    """Shuffled batches of binary images, drawn anew from grey ones at every pass.

    Arguments:
        images: Grey images in [0, 1], with shape ``(N, ...)``: a pixel's probability of being 1.
        batch_size: Rows per batch; the last, smaller batch is left out.

    Raises:
        ValueError: If there is not one full batch.

    Example:
        >>> batches = Binarised(torch.rand(100, 1, 28, 28), batch_size=30)
        >>> [len(x) for x in batches]
        [30, 30, 30]
    """

    def __init__(self, images: Tensor, batch_size: int) -> None:
        images = floats_of_batch("Binarised", images, "Divide bytes by 255.", (0, 1))
        require_counts(f"[1, {len(images)}]", batch_size=batch_size)
        self.images, self.batch_size = images, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Yields binary images, ``(batch_size, ...)``."""
        rows = torch.randperm(len(self.images)).to(self.images.device)
        for batch in rows[: len(rows) - len(rows) % self.batch_size].split(self.batch_size):
            yield torch.bernoulli(self.images[batch])


def train_vae(
    vae: EIMVAE | ConvEIMVAE,
    images: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    progress: bool = True,
) -> None:
    """Trains a VAE together with its prior on the ELBO of binary images, drawn anew every epoch.

    Adam with a cosine schedule; the VAE ends up in evaluation mode, and LARS's normaliser
    estimated.

    Arguments:
        vae: The VAE, with any prior.
        images: Grey images in [0, 1], with shape ``(N, 1, 28, 28)``.
        epochs: Passes over the images.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        progress: Whether to show a progress bar.

    Raises:
        FloatingPointError: If the ELBO is not finite.
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.

    Example:
        >>> images = torch.rand(64, 1, 28, 28)
        >>> vae = EIMVAE(images.mean(0), LARSPrior())
        >>> train_vae(vae, images, epochs=2, batch_size=32, progress=False)
        >>> vae.training, bool(vae.prior.normaliser > 0)
        (False, True)
    """
    from ncprior.utils.optimise import train

    require_instance("vae", vae, (EIMVAE, ConvEIMVAE), "Make one: EIMVAE(images.mean(0)).")
    require_counts(epochs=epochs, batch_size=batch_size)
    require_numbers("(0, inf)", learning_rate=learning_rate)
    images = floats_of_batch("train_vae", images, "Divide bytes by 255.", (0, 1)).to(vae.mean)

    def negative_elbo(rows: Tensor) -> Tensor:
        loss = vae.negative_elbo(torch.bernoulli(images[rows])).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The negative ELBO is {loss.item()}. Take a smaller learning_rate, or look for "
                f"NaN in the images."
            )
        return loss

    batch_size = min(batch_size, len(images))
    train(
        *(vae, negative_elbo, len(images)),
        steps=epochs * (len(images) // batch_size),
        batch_size=batch_size,
        learning_rate=learning_rate,
        name="VAE" if vae.prior is None else f"VAE + {type(vae.prior).__name__}",
        progress=progress,
    )
    if isinstance(vae.prior, LARSPrior):
        vae.prior.estimate_normaliser()
