r"""A hierarchical VAE of our own, small enough for a CPU: top-down groups and residual posteriors.

.. math::
    p(z) = \prod_k N(z_k; \mu_k(h_k), \sigma_k(h_k)), \qquad
    q(z_k | z_{<k}, x) = N(z_k; \mu_k + \Delta\mu_k, \sigma_k \, e^{\Delta\log\sigma_k})

The state of the decoder is a feature map h_k, which every z_k updates. The posterior depends on h_k
and on features s of x. All groups have one resolution, 4×4.

References:
    | NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat & Kautz, NeurIPS 2020)
    | Very Deep VAEs Generalize Autoregressive Models (Child, ICLR 2021)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from ncprior.source import Group, LatentSource
from ncprior.utils.precision import at_least_float32
from ncprior.utils.require import (
    floats_of_batch,
    require_counts,
    require_instance,
    require_numbers,
)
from ncprior.utils.visible import require_eval

_SIDE = 4  # of every group's map

_BYTES = "Divide bytes by 255, and draw binary images: (x / 255).bernoulli()."


class HVAE(nn.Module):
    """A hierarchical VAE of binary 28×28 images with K groups of ``latents`` × 4 × 4.

    Arguments:
        num_groups: K.
        latents: Channels of each z_k.
        width: Channels of h and s.
        hidden: Channels inside the cells.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is below 1.

    Example:
        >>> vae = HVAE(num_groups=3, width=16, hidden=8)
        >>> vae.negative_elbo(torch.rand(5, 1, 28, 28).bernoulli()).shape
        torch.Size([5])
    """

    def __init__(
        self, *, num_groups: int = 10, latents: int = 2, width: int = 64, hidden: int = 32
    ) -> None:
        require_counts(num_groups=num_groups, latents=latents, width=width, hidden=hidden)
        super().__init__()
        self.num_groups = num_groups
        self.encoder = nn.Sequential(  # 32 -> 8 -> 4
            nn.PixelUnshuffle(4),
            nn.Conv2d(16, width, 3, padding=1),
            *(_Cell(width, hidden) for _ in range(3)),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            *(_Cell(width, hidden) for _ in range(3)),
        )
        self.h_0 = nn.Parameter(torch.zeros(width, _SIDE, _SIDE))
        self.rungs = nn.ModuleList(_Rung(latents, width, hidden) for _ in range(num_groups))
        self.decoder = nn.Sequential(  # 4 -> 8 -> 32
            _Cell(width, hidden),
            nn.Conv2d(width, 4 * width, 1),
            nn.PixelShuffle(2),
            *(_Cell(width, hidden) for _ in range(3)),
            nn.SiLU(),
            nn.Conv2d(width, 16, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def features(self, x: Tensor) -> Tensor:
        """Returns s, ``(B, width, 4, 4)``, of images ``(B, 1, 28, 28)`` in [0, 1]."""
        s: Tensor = self.encoder(pad(2 * x - 1, (2, 2, 2, 2), value=-1.0))
        return s

    def start(self, batch_size: int) -> Tensor:
        """Returns h_0, ``(B, width, 4, 4)``, the same for every row."""
        require_counts(batch_size=batch_size)
        return self.h_0.expand(batch_size, -1, -1, -1)

    def logits(self, h: Tensor) -> Tensor:
        """Returns the logits of p(x | z), ``(B, 1, 28, 28)``, from the last state."""
        x: Tensor = self.decoder(h)
        return at_least_float32(x[..., 2:-2, 2:-2])

    def negative_elbo(self, x: Tensor) -> Tensor:
        """Returns KL(q, p) - E_q[log p(x | z)] in nats, ``(B,)``, from one draw of z."""
        misfit, kl = self._misfit_and_kl(x)
        return misfit + kl.sum(0)

    def warm_up_loss(self, x: Tensor, beta: float) -> Tensor:
        """Returns the negative ELBO with its KL terms weighted by β, in nats, ``(B,)``.

        While β < 1, a group's weight is also in proportion to its KL, on average β, so that groups
        that say little yet are not silenced for good.

        References:
            Vahdat & Kautz (2020), appendix A.
        """
        misfit, kl = self._misfit_and_kl(x)
        weight = torch.full_like(kl[:, :1], beta)
        if beta < 1:
            share = kl.detach().mean(1, keepdim=True) + 0.1
            weight = weight * share / share.mean()
        return misfit + (weight * kl).sum(0)

    def _misfit_and_kl(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(x | z), ``(B,)``, and KL(q, p) of every group, ``(K, B)``."""
        x = x.to(self.h_0)
        s, h, kl = self.features(x), self.start(len(x)), []
        rung: Any
        for rung in self.rungs:
            p, q, update = rung(h, s)
            kl.append(kl_divergence(q, p))
            h = rung.move(h + update, q.rsample())
        misfit = binary_cross_entropy_with_logits(self.logits(h), x, reduction="none")
        return misfit.flatten(1).sum(1), torch.stack(kl)


def train_hvae(
    vae: HVAE,
    images: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    progress: bool = True,
) -> None:
    """Trains the VAE on the ELBO of binary images, drawn anew at every step; then evaluation mode.

    Adam with a cosine schedule; the weight of the KL rises to 1 over the first third.

    Arguments:
        vae: The VAE.
        images: Grey images in [0, 1], with shape ``(N, 1, 28, 28)``: a pixel's probability of 1.
        epochs: Passes over the images.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, or the images do not fill a batch.

    Example:
        >>> vae = HVAE(num_groups=2, width=16, hidden=8)
        >>> train_hvae(vae, torch.rand(64, 1, 28, 28), epochs=1, batch_size=32, progress=False)
        >>> vae.training
        False
    """
    from ncprior.utils.optimise import train

    require_instance("vae", vae, HVAE, "Make one: HVAE().")
    require_counts(epochs=epochs)
    require_numbers("(0, inf)", learning_rate=learning_rate)
    images = _images(images, vae)
    require_counts(f"[1, {len(images)}]", batch_size=batch_size)
    steps, seen = epochs * len(images) // batch_size, 0

    def loss(rows: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        beta = min(1.0, 3 * seen / steps)
        return vae.warm_up_loss(images[rows].bernoulli(), beta).mean()

    train(
        *(vae, loss, len(images)),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_grad_norm=200.0,
        name=f"VAE of {vae.num_groups} groups",
        progress=progress,
    )


def _images(x: Any, vae: HVAE) -> Tensor:  # noqa: ANN401
    images = floats_of_batch("An HVAE", x, _BYTES, (0, 1), vae).to(vae.h_0)
    if tuple(images.shape[1:]) != (1, 28, 28):
        raise ValueError(f"The images must have shape (B, 1, 28, 28); got {tuple(images.shape)}.")
    return images


class _Rung(nn.Module):
    """One group: its prior from h, its posterior from h and s, and the update of h by z."""

    def __init__(self, latents: int, width: int, hidden: int) -> None:
        super().__init__()
        self.latents = latents
        self.prior = _bottleneck(width, hidden, 2 * latents + width)
        self.posterior = _bottleneck(2 * width, hidden, 2 * latents)
        self.join = nn.Conv2d(latents, width, 1)
        self.cell = _Cell(width, hidden)

    def forward(self, h: Tensor, s: Tensor | None) -> tuple[Distribution, Any, Tensor]:
        """Returns p(z_k | z_<k), q(z_k | z_<k, x) or None, and the update of h by the prior network."""
        sizes = [self.latents, self.latents, h.shape[1]]
        mean, log_scale, update = self.prior(h).split(sizes, dim=1)
        mean, log_scale = at_least_float32(mean), _bounded(at_least_float32(log_scale))
        p = _normal(mean, log_scale.exp())
        if s is None:
            return p, None, update
        change = at_least_float32(self.posterior(torch.cat([h, s], dim=1)))
        shift, log_factor = change.chunk(2, dim=1)
        return p, _normal(mean + shift, (log_scale + _bounded(log_factor)).exp()), update

    def move(self, h: Tensor, z: Tensor) -> Tensor:
        """Returns the next state."""
        moved: Tensor = self.cell(h + self.join(z.to(self.join.weight.dtype)))
        return moved


class HVAESource(LatentSource[Any, Any]):
    """An :class:`HVAE` as a latent source; the context is h_k, or none for the first group.

    Arguments:
        model: The VAE, in evaluation mode.

    Raises:
        TypeError: If it is no :class:`HVAE`.

    Example:
        >>> from ncprior.testing import check_source
        >>> vae = HVAE(num_groups=3, width=16, hidden=8).eval()
        >>> check_source(HVAESource(vae), torch.rand(5, 1, 28, 28).bernoulli())
    """

    def __init__(self, model: HVAE) -> None:
        remedy = "Wrap another VAE in SingleGroup, or in a subclass of LatentSource."
        self.module: HVAE = require_instance("model", model, HVAE, remedy)
        self.num_groups = model.num_groups

    class State(NamedTuple):
        """The state before group k."""

        h: Tensor  # (B, width, 4, 4)
        s: Tensor | None  # (B, width, 4, 4)
        k: int

    def encode(self, x: Any) -> Tensor:  # noqa: ANN401
        """Returns features of images ``(B, 1, 28, 28)``, the first item of a tuple or list.

        Raises:
            ValueError: If the images have another shape or range, or the VAE is in training mode.
        """
        require_eval(self.module)
        return self.module.features(_images(x, self.module))

    def observed(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Returns the binary images of a batch, with shape ``(B, 1, 28, 28)``.

        Raises:
            ValueError: If they are grey, of which the Bernoulli likelihood is no density.
        """
        images = _images(batch, self.module)
        if not ((images == 0) | (images == 1)).all():
            raise ValueError(
                "log p(x | z) of an HVAE is of binary images; got grey ones. Draw them: "
                "torch.bernoulli(x)."
            )
        return images

    def start(
        self, batch_size: int, encoding: Tensor | None = None, condition: None = None
    ) -> State:
        """Returns the state before the first group."""
        require_eval(self.module)
        if condition is not None:
            raise ValueError("This VAE takes no condition; got one.")
        return self.State(self.module.start(batch_size), encoding, 0)

    def group(self, state: State) -> Group:
        """Returns p(z_k | z_<k), q(z_k | z_<k, x) and the context h_k."""
        p, q, _ = self.module.rungs[state.k](state.h, state.s)
        return Group(p, q, at_least_float32(state.h) if state.k > 0 else None)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the next state, given z_k with shape ``(B, latents, 4, 4)``."""
        rung: Any = self.module.rungs[state.k]
        _, _, update = rung(state.h, None)
        return state._replace(h=rung.move(state.h + update, z), k=state.k + 1)

    def decode(self, state: State) -> Tensor:
        """Returns the mean of p(x | z), ``(B, 1, 28, 28)``."""
        return self.module.logits(state.h).sigmoid()

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z), Bernoulli pixels."""
        pixels = Bernoulli(logits=self.module.logits(state.h), validate_args=False)
        return Independent(pixels, 3, validate_args=False)


class _Cell(nn.Module):
    """A residual bottleneck: 1×1, 3×3 and 1×1 convolutions."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = _bottleneck(width, hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.layers(h)
        return h


def _bottleneck(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    last = nn.Conv2d(hidden, outputs, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(
        nn.SiLU(),
        nn.Conv2d(inputs, hidden, 1),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.SiLU(),
        last,
    )


def _bounded(log_scale: Tensor) -> Tensor:
    """Keeps log σ within ±4."""
    return 4 * torch.tanh(log_scale / 4)


def _normal(mean: Tensor, scale: Tensor) -> Distribution:
    return Independent(Normal(mean, scale, validate_args=False), 3, validate_args=False)
