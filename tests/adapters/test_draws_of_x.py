"""Draws of p(x | z) by every adapter that has a likelihood."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import nvae_standin, vdvae_standin
from helpers.scvi_standin import SCVI

from ncprior import NCPrior, sir
from ncprior.adapters import hvae, lars_snis, nvae, rae, scvi, vdvae
from ncprior.heads import make_head
from ncprior.source import LatentSource


def nvae_source(decoder: str) -> Any:
    model = nvae_standin.nvae(decoder)
    nvae.on_cpu(model)
    return nvae.NVAESource(model)


def pythae_source(loss: str) -> Any:
    pytest.importorskip("pythae")
    from pythae.models import VAE, VAEConfig

    from ncprior.adapters.pythae import PythaeSource

    config = VAEConfig(input_dim=(1, 8, 8), latent_dim=3, reconstruction_loss=loss)
    return PythaeSource(VAE(config).eval())


def scvi_source() -> tuple[Any, Any]:
    source: Any = scvi.SCVISource(SCVI(likelihood="nb"))
    return source, source.condition(next(iter(source.loader(batch_size=4))))


def on_levels(x: torch.Tensor, levels: int) -> bool:
    return bool((x * levels - (x * levels).round()).abs().max() < 1e-3) and 0 <= x.min() <= 1


def is_binary(x: torch.Tensor) -> bool:
    return {*x.unique().tolist()} <= {0.0, 1.0}


MEAN = torch.full((1, 28, 28), 0.3)

CASES: dict[str, tuple[Callable[[], Any], Callable[[torch.Tensor], bool]]] = {
    "hvae": (
        lambda: hvae.HVAESource(hvae.HVAE(num_groups=2, width=8, hidden=8).eval()),
        is_binary,
    ),
    "lars": (lambda: lars_snis.EIMSource(lars_snis.EIMVAE(MEAN).eval()), is_binary),
    "lars, two groups": (
        lambda: lars_snis.ConvEIMSource(lars_snis.ConvEIMVAE(MEAN).eval()),
        is_binary,
    ),
    "rae": (
        lambda: rae.RAESource(rae.VAE("mnist", width=0.05).eval()),
        lambda x: not on_levels(x, 255),
    ),
    "nvae, Bernoulli": (lambda: nvae_source("bernoulli"), is_binary),
    "nvae, normal": (
        lambda: nvae_source("gaussian"),
        lambda x: not on_levels(x, 255),
    ),
    "nvae, logistics": (
        lambda: nvae_source("mixture"),
        lambda x: on_levels(x, 255),
    ),
    "vdvae": (
        lambda: vdvae.VDVAESource(vdvae_standin.vdvae()),
        lambda x: x.dtype == torch.uint8,
    ),
    "scvi": (scvi_source, lambda x: bool((x == x.round()).all() and x.min() >= 0)),
    "pythae, bce": (lambda: pythae_source("bce"), is_binary),
    "pythae, mse": (lambda: pythae_source("mse"), lambda x: not on_levels(x, 255)),
}


@pytest.mark.parametrize("name", CASES)
def test_x_is_drawn_from_the_likelihood(name: str) -> None:
    make, fits = CASES[name]
    made = make()
    source: LatentSource[Any, Any]
    source, condition = made if isinstance(made, tuple) else (made, None)
    heads, state = [], source.start(4, None, condition)
    for _ in range(source.num_groups):
        group = source.group(state)
        heads.append(make_head(group, width=8, depth=1))
        state = source.advance(state, group.prior.sample())
    prior = NCPrior(source, heads).eval()
    sampler = partial(sir, num_proposals=2)
    torch.manual_seed(1)
    mean = prior.sample(4, sampler, condition=condition).x
    torch.manual_seed(1)
    x = prior.sample(4, sampler, condition=condition, draw_x=True).x
    assert x.shape == mean.shape
    assert fits(x) and not torch.equal(x, mean)
