"""Models of pythae (benchmark_VAE) as sources.

A pythae model has one group of latents: ``model.encoder(x)`` gives an ``embedding``, and, where q is
Gaussian, its ``log_covariance``, the log-variance; ``model.decoder(z)`` gives a ``reconstruction``.

References:
    | Pythae: Unifying Generative Autoencoders in Python (Chadebec et al., NeurIPS 2022)
    | https://github.com/clementchadebec/benchmark_VAE
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from ncprior.bases.empirical import NoPrior
from ncprior.bases.mixture import GaussianMixture
from ncprior.distributions import Sampleable
from ncprior.single_group import SingleGroup
from ncprior.utils.precision import at_least_float32, input_like
from ncprior.utils.require import (
    described,
    floats_of_batch,
    require_numbers,
)
from ncprior.utils.visible import require_eval

_FLOWS = (
    "its z is a Gaussian draw pushed through flows, not the Gaussian of the encoder. Wrap it in "
    "SingleGroup(prior, posterior, decoder, module=model) with a posterior that samples by "
    "model.embed(x)"
)

_CODES = (
    "its latents are codes of a codebook. Wrap it in ncprior.adapters.vq.VQSource, from a function "
    "that encodes x as indices and one that decodes indices, and fit a base by fit_code_network"
)

_HAMILTON = (
    "its z is a draw moved by Hamiltonian steps, not the Gaussian of the encoder. Train a VAE or "
    "a VAMP on the same networks"
)

_CURVED = (
    "its latents lie on a curved space, where N(0, I) and the heads' Euclidean z do not apply. "
    "Train a VAE or a VAMP on the same networks"
)

_REFUSED = {
    **dict.fromkeys(("VQVAE", "HRQVAE"), _CODES),
    **dict.fromkeys(("VAE_IAF", "VAE_LinNF"), _FLOWS),
    **dict.fromkeys(("HVAE", "RHVAE"), _HAMILTON),
    **dict.fromkeys(("SVAE", "PoincareVAE"), _CURVED),
}

_PIXELS = (-16.0, 16.0)  # pixels of any scaling are within; bytes are not

_NO_LIKELIHOOD = {
    "MSSSIM_VAE": "it was trained on structural similarity, which is no density of x",
    "VAEGAN": "it was trained on features of a discriminator, which give no density of x",
}


class PythaeSource(SingleGroup):
    """A pythae model with Gaussian posterior, or with deterministic codes made Gaussian by noise.

    The prior is N(0, I); for a VAMP it is the mixture of q(z | u) over the present pseudo-inputs u.
    An AE or RAE has none until one is fitted. A fitted ``GaussianMixtureSampler`` of pythae becomes
    the prior by ``rebase(source, GaussianMixture.from_sklearn(sampler.gmm))``.

    A batch is x itself, floats with shape ``(B, *input_dim)`` as in training, the first item of a
    tuple, or the item ``"data"`` of a dict, as pythae's own data sets yield it.

    Arguments:
        model: The model, in evaluation mode, on the device where it is to stay.
        noise: The standard deviation of q(z | x) = N(code, noise² I), for a model with
            deterministic codes: small against the spread of the codes, say a tenth of it.

    Raises:
        TypeError: If it is no pythae model.
        ValueError: If its posterior is not Gaussian, if it is in training mode, or if there is no
            ``noise`` where one is needed, one where none is, or one out of range.

    Example:
        >>> from pythae.models import RAE_L2, RAE_L2_Config
        >>> from ncprior.bases import fit_mixture, latents_of, rebase
        >>> model = RAE_L2(RAE_L2_Config(input_dim=(1, 8, 8), latent_dim=3)).eval()
        >>> source, x = PythaeSource(model, noise=0.1), torch.rand(50, 1, 8, 8)
        >>> source = rebase(source, fit_mixture(latents_of(source, x), num_components=2))
        >>> source.group(source.start(5)).prior.sample().shape
        torch.Size([5, 3])
    """

    module: Any

    def __init__(self, model: nn.Module, *, noise: float | None = None) -> None:
        self._lineage = lineage_of(model)
        self._is_gaussian = has_posterior(model)
        require_eval(model)
        check_noise(model, noise)
        self.noise = None if noise is None else float(noise)
        self.module = model
        super().__init__(self._prior(), self._q, self._reconstruct, module=model)

    def facts(self) -> dict[str, Any]:
        """Returns the noise on codes."""
        return {"PythaeSource.noise": self.noise}

    def encode(self, x: Any) -> SingleGroup.Encoding:  # noqa: ANN401
        """Encodes one batch: the parameters of q(z | x).

        Raises:
            ValueError: If x is of another shape, or holds bytes that have not been scaled.
        """
        limits = _PIXELS if len(self.module.input_dim or ()) == 3 else None
        if getattr(self.module.model_config, "reconstruction_loss", None) == "bce":
            limits = (0.0, 1.0)
        remedy = "Scale x as in training: x / 255 for bytes and models of images in [0, 1]."
        return super().encode(
            floats_of_batch(self._lineage[0], _x_of(x), remedy, limits, self.module)
        )

    def observed(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Returns the x of a batch: its item ``data``, if it is a mapping."""
        return super().observed(_x_of(batch))

    def likelihood(self, state: SingleGroup.State) -> Distribution:
        """Returns p(x | z): N(mean, I) for the loss ``mse``, Bernoulli for ``bce``.

        Raises:
            ValueError: If the model has no density of x.
        """
        reason = "its encoder is deterministic, trained on a misfit and not on a likelihood"
        if self._is_gaussian:
            found = (_NO_LIKELIHOOD[name] for name in self._lineage if name in _NO_LIKELIHOOD)
            reason = next(found, "")
        if reason:
            raise ValueError(f"{self._lineage[0]} knows no p(x | z): {reason}.")
        mean = self.decode(state)
        axes = mean.ndim - 1
        if self.module.model_config.reconstruction_loss == "bce":
            return Independent(Bernoulli(mean, validate_args=False), axes, validate_args=False)
        return _normal(mean, torch.ones_like(mean))

    def _prior(self) -> Sampleable:
        if not {"VAE", "WAE_MMD"} & set(self._lineage):
            return NoPrior(f"{self._lineage[0]} has no prior.")
        if "VAMP" in self._lineage:
            return self._mixture()
        zeros = torch.zeros(self.module.latent_dim, device=input_like(self.module).device)
        return _normal(zeros, torch.ones_like(zeros), axes=1)

    @torch.no_grad()
    def _mixture(self) -> GaussianMixture:
        """The mixture of q(z | u) over pseudo-inputs u, in equal shares."""
        weight = input_like(self.module.pseudo_inputs)
        u = self.module.pseudo_inputs(self.module.idle_input.to(weight))
        out = self.module.encoder(u.reshape(len(u), *self.module.model_config.input_dim))
        scale = (0.5 * self._item(out, "log_covariance", len(u))).exp()
        code = self._item(out, "embedding", len(u))
        return GaussianMixture(scale.new_zeros(len(u)), code, scale)

    def _q(self, x: Tensor) -> Distribution:
        shape = self.module.input_dim
        if shape is not None and tuple(x.shape[1:]) != tuple(shape):
            raise ValueError(
                f"{self._lineage[0]} takes x of shape (B, {', '.join(map(str, shape))}); "
                f"got {tuple(x.shape)}."
            )
        out = self.module.encoder(x.to(input_like(self.module.encoder)))
        code = self._item(out, "embedding", len(x))
        if self.noise is not None:
            return _normal(code, torch.full_like(code, self.noise))
        return _normal(code, (0.5 * self._item(out, "log_covariance", len(x))).exp())

    def _item(self, out: Mapping[str, Tensor], name: str, count: int) -> Tensor:
        shape = (count, self.module.latent_dim)
        if name not in out or tuple(out[name].shape) != shape:
            got = f"one of shape {tuple(out[name].shape)}" if name in out else f"only {list(out)}"
            raise ValueError(
                f"The encoder of a {self._lineage[0]} must return '{name}' of shape {shape}; "
                f"got {got}."
            )
        return at_least_float32(out[name])

    def _reconstruct(self, z: Tensor) -> Tensor:
        z = z.to(input_like(self.module.decoder).dtype)
        x: Tensor = self.module.decoder(z)["reconstruction"]
        return at_least_float32(x)


def _x_of(batch: Any) -> Any:  # noqa: ANN401
    """The item ``data`` of a batch of pythae's loaders; other batches as they are."""
    if not isinstance(batch, Mapping):
        return batch
    if "data" not in batch:
        raise ValueError(f"x is the item 'data' of a batch; got the items {list(batch)}.")
    return batch["data"]


def has_posterior(model: object) -> bool:
    """Returns whether q(z | x) is Gaussian; an adversarial AE can be trained without its noise."""
    return "VAE" in lineage_of(model) and not getattr(model, "deterministic_posterior", False)


def check_noise(model: object, noise: float | None) -> None:
    """Validates that there is noise for deterministic codes, and none otherwise."""
    require_numbers("(0, inf) or None", noise=noise)
    name = lineage_of(model)[0]
    if has_posterior(model) and noise is not None:
        raise ValueError(f"{name} has a posterior of its own: leave out noise={noise}.")
    if not has_posterior(model) and noise is None:
        raise ValueError(
            f"This {name} encodes x as one code without noise. Say how wide q(z | x) = "
            f"N(code, noise² I) is to be: pass noise=..., a standard deviation above 0, say a "
            f"tenth of that of the codes."
        )


def lineage_of(model: object) -> list[str]:
    """Names of the model's pythae classes, nearest first; raises for unsupported models."""
    if model is None:
        raise TypeError(
            "The model is None, as load_from_hf_hub returns it, with only a warning, for a "
            "repository with pickled networks. If you trust it, load it with allow_pickle=True."
        )
    classes = [c for c in type(model).__mro__ if c.__module__.split(".")[0] == "pythae"]
    names = [c.__name__ for c in classes]
    for name in names:
        if name in _REFUSED:
            raise ValueError(f"A {name} cannot be wrapped: {_REFUSED[name]}.")
    if not {"VAE", "AE"} & set(names):
        raise TypeError(
            f"PythaeSource takes a VAE or an AE of pythae; got {described(model)}. "
            f"Wrap a model of your own in SingleGroup(prior, posterior, decoder, module=model)."
        )
    return names


def _normal(loc: Tensor, scale: Tensor, axes: int | None = None) -> Distribution:
    axes = loc.ndim - 1 if axes is None else axes
    return Independent(Normal(loc, scale, validate_args=False), axes, validate_args=False)
