"""VAEs of several kinds, made on the CPU under one seed and moved to a device, as a user does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from helpers import nvae_standin, scvi_standin, vdvae_standin
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MultivariateNormal, Normal
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from ncprior import SingleGroup
from ncprior.adapters.hvae import HVAE, HVAESource
from ncprior.adapters.lars_snis import EIMVAE, EIMSource, LARSPrior, SNISPrior
from ncprior.adapters.nvae import NVAESource, on_cpu
from ncprior.adapters.rae import RAE, RAESource
from ncprior.adapters.scvi import SCVISource
from ncprior.adapters.vdvae import VDVAESource
from ncprior.bases import fit_gaussian, fit_mixture, latents_of, rebase


class Perceptron(nn.Module):
    """A VAE of rows of 6 numbers, with 3 latents, and with classes if asked."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6 + classes, 8), nn.Tanh(), nn.Linear(8, 6))
        self.decoder = nn.Sequential(nn.Linear(3 + classes, 8), nn.Tanh(), nn.Linear(8, 6))
        self.eval()

    def posterior(self, x: Tensor, *c: Tensor) -> Independent:
        """q(z | x) or q(z | x, c)."""
        mean, log_var = self.encoder(torch.cat([x, *c], 1)).chunk(2, 1)
        return Independent(Normal(3 * mean, (0.5 * log_var - 1).exp(), validate_args=False), 1)

    def decode(self, z: Tensor, *c: Tensor) -> Tensor:
        """The mean of p(x | z) or p(x | z, c)."""
        return self.decoder(torch.cat([z, *c], 1))


class Convolutions(nn.Module):
    """A VAE of 8×8 images with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten()),
            nn.Linear(64, 6),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(3, 64), nn.Unflatten(1, (4, 4, 4)), nn.SiLU()),
            nn.ConvTranspose2d(4, 1, 4, 2, 1),
        )
        self.eval()

    def posterior(self, x: Tensor) -> Independent:
        """q(z | x)."""
        mean, log_var = self.encoder(x).chunk(2, 1)
        return Independent(Normal(3 * mean, (0.5 * log_var - 1).exp(), validate_args=False), 1)


@dataclass(frozen=True)
class Kind:
    """A source on a device, its data on the CPU, and what it can do."""

    source: Any
    data: Any  # rows of it, a data set of them, or a loader
    condition: Callable[[Any], Any] | None = None
    has_density: bool = True  # of x given z
    is_continuous: bool = True
    is_cached: bool = True  # the distributions of its groups

    @property
    def batch(self) -> Any:
        """Some rows as a loader yields them."""
        if isinstance(self.data, Tensor):
            return self.data[:16]
        return self.data[:16] if hasattr(self.data, "__getitem__") else next(iter(self.data))

    @property
    def rows_of_condition(self) -> Any:
        """The condition of the batch, on the CPU."""
        return None if self.condition is None else self.condition(self.batch)


def normal(device: torch.device, *event: int) -> Independent:
    """N(0, I), as a user writes it for a loop without checks."""
    loc = torch.zeros(event or (3,), device=device)
    return Independent(Normal(loc, torch.ones_like(loc), validate_args=False), loc.ndim)


def around(decode: Callable[..., Tensor]) -> Callable[..., Independent]:
    """The likelihood N(decode(z), 0.3²)."""

    def likelihood(*z: Tensor) -> Independent:
        mean = decode(*z)
        scale = torch.full_like(mean, 0.3)
        return Independent(Normal(mean, scale, validate_args=False), mean.ndim - 1)

    return likelihood


def flat(device: torch.device, **options: Any) -> SingleGroup:
    """A VAE of one group: every capability is tried on it."""
    vae = Perceptron().to(device)
    parts = (normal(device), vae.posterior, vae.decode)
    return SingleGroup(*parts, module=vae, likelihood=around(vae.decode), **options)


def rows(count: int = 160) -> Tensor:
    """Data of :func:`flat`."""
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(0))


def _features(device: torch.device) -> Kind:
    vae = Convolutions().to(device)
    source = SingleGroup(
        *(normal(device), vae.posterior, vae.decoder),
        module=vae,
        likelihood=around(vae.decoder),
        features=vae.decoder[:2],
    )
    return Kind(source, torch.randn(48, 1, 8, 8))


def hierarchical(device: torch.device) -> Kind:
    """A VAE of three groups with contexts."""
    vae = HVAE(num_groups=3, width=8, hidden=8)
    nvae_standin.randomly(vae, 0.05)
    return Kind(HVAESource(vae.to(device).eval()), torch.rand(48, 1, 28, 28).bernoulli())


def _conditional(device: torch.device) -> Kind:
    vae = Perceptron(classes=3).to(device)

    def classes(batch: Any) -> Tensor:
        return nn.functional.one_hot(batch[1], 3).float()

    options: Any = {"likelihood": around(vae.decode), "condition": classes}
    source = SingleGroup(normal(device), vae.posterior, vae.decode, module=vae, **options)
    return Kind(source, TensorDataset(torch.randn(48, 6), torch.randint(3, (48,))), classes)


def codes(device: torch.device) -> Kind:
    """A VAE with one code of 6 as its latent."""
    vae = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(device).eval()
    encoder, decoder = vae

    def decode(z: Tensor) -> Tensor:
        return decoder(nn.functional.one_hot(z, 6).float())

    uniform = Categorical(logits=torch.zeros(6, device=device), validate_args=False)
    source = SingleGroup(
        *(uniform, lambda x: Categorical(logits=2 * encoder(x), validate_args=False), decode),
        likelihood=around(decode),
        module=vae,
    )
    return Kind(source, torch.randn(48, 6), is_continuous=False)


def _full_covariance(device: torch.device) -> Kind:
    vae = Perceptron().to(device)
    skew = 0.1 * torch.ones(3, 3, device=device).tril(-1)

    def posterior(x: Tensor) -> MultivariateNormal:
        mean, log_var = vae.encoder(x).chunk(2, 1)
        tril = torch.diag_embed((0.5 * log_var - 1).exp()) + skew
        return MultivariateNormal(mean, scale_tril=tril)

    prior = MultivariateNormal(torch.zeros(3, device=device), torch.eye(3, device=device))
    options: Any = {"module": vae, "likelihood": around(vae.decode)}
    return Kind(SingleGroup(prior, posterior, vae.decode, **options), torch.randn(48, 6))


def _nvae(device: torch.device, decoder: str = "bernoulli", **options: Any) -> Kind:
    model = nvae_standin.randomly(nvae_standin.nvae(decoder, **options), 0.1).to(device)
    if device.type != "cuda":
        on_cpu(model)  # without kernels of CUDA
    for module in model.modules():  # tensors that NVAE's code makes on a GPU, and no buffers
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.to(device))
    source, x = NVAESource(model), nvae_standin.images(decoder, 32)
    return Kind(source, x, is_cached="num_flows" not in options)


def _vdvae(device: torch.device) -> Kind:
    x = torch.cat([vdvae_standin.images() for _ in range(8)])
    return Kind(VDVAESource(vdvae_standin.vdvae().to(device)), x)


def _rae(device: torch.device) -> Kind:
    source = RAESource(RAE("mnist", width=0.05).to(device).eval(), noise=0.1)
    x = torch.rand(40, 1, 32, 32)
    base = fit_mixture(latents_of(source, x), 2, covariance="diagonal", starts=1)
    return Kind(rebase(source, base), x, has_density=False)


def _scvi(device: torch.device) -> Kind:
    model: Any = scvi_standin.SCVI()
    model.module.to(device)
    source = SCVISource(model)
    loader = source.loader(batch_size=32)
    return Kind(source, loader, source.condition, has_density=False)


def _resampled(device: torch.device, prior: SNISPrior | LARSPrior) -> Kind:
    vae = EIMVAE(torch.full((1, 28, 28), 0.5), prior).to(device).eval()
    if isinstance(prior, LARSPrior):
        prior.estimate_normaliser(1000)
    x = torch.rand(40, 1, 28, 28).bernoulli()
    return Kind(EIMSource(vae), x, has_density=False, is_continuous=False)


def _pythae(device: torch.device) -> Kind:
    from pythae.models import VAE, VAEConfig

    from ncprior.adapters.pythae import PythaeSource

    model = VAE(VAEConfig(input_dim=(1, 4, 4), latent_dim=3)).to(device).eval()
    return Kind(PythaeSource(model), torch.rand(48, 1, 4, 4))


def _diffusers(device: torch.device) -> Kind:
    from diffusers import AutoencoderKL

    from ncprior.adapters.diffusers import DiffusersSource

    model = AutoencoderKL(
        norm_num_groups=4,
        latent_channels=2,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    source, x = DiffusersSource(model.to(device).eval()), 2 * torch.rand(24, 3, 8, 8) - 1
    base = fit_gaussian(latents_of(source, x), covariance="diagonal")
    return Kind(rebase(source, base), x, has_density=False)


KINDS: dict[str, Callable[[torch.device], Kind]] = {
    "features": _features,
    "hierarchical": hierarchical,
    "conditional": _conditional,
    "codes": codes,
    "full covariance": _full_covariance,
    "nvae": _nvae,
    "nvae of logistics": partial(_nvae, decoder="mixture"),
    "nvae with flows": partial(_nvae, num_flows=1),
    "vdvae": _vdvae,
    "rae": _rae,
    "scvi": _scvi,
    "snis": lambda device: _resampled(device, SNISPrior(num_proposals=8)),
    "lars": lambda device: _resampled(device, LARSPrior(truncation=5, num_proposals=8)),
    "pythae": _pythae,
    "diffusers": _diffusers,
}

NEEDS = {"pythae": "pythae", "diffusers": "diffusers"}


def strays(found: Any, on: torch.device) -> set[torch.device]:
    """Devices, other than the expected one, of tensors in a result."""
    return {t.device for t in tree_leaves(found) if isinstance(t, Tensor)} - {on}
