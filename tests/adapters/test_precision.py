"""Models in float64, whose latents and x no adapter rounds to float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tvae_standin
from torch import Tensor

from ncprior.adapters import hvae, lars_snis, rae
from ncprior.adapters.tvae import TVAESource
from ncprior.bases import fit_gaussian, latents_of, rebase
from ncprior.source import sample_posterior
from ncprior.testing import check_source


def tvae() -> tuple[Any, Tensor]:
    model = tvae_standin.fitted()
    model.decoder.double()
    source = TVAESource(model, tvae_standin.Encoder(6, (8,), 4).double().eval())
    return source, source.rows(tvae_standin.table())[:5]


def autoencoder_kl() -> tuple[Any, Tensor]:
    diffusers = pytest.importorskip("diffusers")
    from ncprior.adapters.diffusers import DiffusersSource

    model = diffusers.AutoencoderKL(latent_channels=2, norm_num_groups=4, block_out_channels=(8,))
    source, x = DiffusersSource(model.double().eval()), 2 * torch.rand(8, 3, 4, 4) - 1
    return rebase(source, fit_gaussian(latents_of(source, x), covariance="diagonal")), x


BINARY = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()

MEAN = torch.full((1, 28, 28), 0.3)

SOURCES: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "hvae": lambda: (
        hvae.HVAESource(hvae.HVAE(num_groups=2, width=8, hidden=8).double().eval()),
        BINARY,
    ),
    "rae, VAE": lambda: (
        rae.RAESource(rae.VAE("mnist", width=0.05).double().eval()),
        torch.rand(5, 1, 32, 32),
    ),
    "lars": lambda: (lars_snis.EIMSource(lars_snis.EIMVAE(MEAN).double().eval()), BINARY),
    "lars, two groups": lambda: (
        lars_snis.ConvEIMSource(lars_snis.ConvEIMVAE(MEAN).double().eval()),
        BINARY,
    ),
    "tvae": tvae,
    "diffusers": autoencoder_kl,
}


@pytest.mark.parametrize("name", SOURCES)
def test_float64_is_kept(name: str) -> None:
    source, x = SOURCES[name]()
    check_source(source, x)
    latents, state = sample_posterior(source, x)
    assert {v.dtype for v in (*latents, source.decode(state))} == {torch.float64}
