"""What the loops of this folder train on: a small VAE of 8×8 digits. Put your own in its place."""

import torch
from torch import Tensor

from ncprior import LatentSource
from ncprior.demo import VAE, digits, split
from ncprior.utils import train


def source_and_data(seed: int) -> tuple[LatentSource, Tensor, Tensor]:
    """The frozen VAE as a source, the training images and the held-out images.

    Every process that calls this with one seed gets the same VAE and the same data.
    """
    torch.manual_seed(seed)
    data, held_out = split(digits(), 300, seed)
    vae = VAE(8, latents=6, counts=16)

    def loss(rows: Tensor) -> Tensor:
        return vae.negative_elbo(data.images[rows]).mean()

    train(vae, loss, len(data.images), steps=500, batch_size=128, learning_rate=2e-3, name="VAE")
    return vae.source(), data.images, held_out.images
