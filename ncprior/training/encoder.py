r"""Encoders for frozen decoders: q(z | x) trained by the ELBO, where a model has none.

.. math::
    \mathrm{ELBO}(x) = E_q[\log p(x | z)] - w \, \mathrm{KL}(q(z | x) \,\|\, p(z))

With w = 1 it is a lower bound of log p(x), which is tight where q is the true posterior. A VAE whose
reconstruction was weighted by a factor f has maximised it with w = 1 / f. The gradient is pathwise,
without the score of q: its variance vanishes where q is the true posterior.

References:
    | Auto-Encoding Variational Bayes (Kingma & Welling, ICLR 2014)
    | Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference
    | (Roeder, Wu & Duvenaud, NeurIPS 2017)
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ncprior.data.batches import one_pass, spread_rows
from ncprior.data.checked import checked_batches
from ncprior.data.parts import with_held_out
from ncprior.data.stream import Stream
from ncprior.distributions import build
from ncprior.samplers.target import supports_langevin
from ncprior.source import Group, LatentSource, WrappedSource, device_of, require_source
from ncprior.utils.batches import data_of, own_batch
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.gradients import gradients_enabled
from ncprior.utils.optimise import minimise, one_if_constant
from ncprior.utils.random_state import seeded
from ncprior.utils.require import (
    described,
    require_counts,
    require_flags,
    require_instance,
    require_numbers,
)
from ncprior.utils.visible import naming_devices, require_apart, require_eval

_WIDTH, _PROBED = 256, 1024

_LOG_SCALE = 28  # at most, up or down: a variance beyond it is no number of float32


class AmortisedSource(WrappedSource):
    """A source with a Gaussian posterior q(z | x), whose parameters an encoder network returns.

    Everything else, the fingerprint included, is that of the wrapped source: a prior that was
    trained on these encodings also loads on the decoder alone.

    Arguments:
        source: The decoder with its prior: one group of real latents, without a condition.
        encoder: Maps x to mean and log-variance of q(z | x), side by side along axis 1: ``(B, 2 D)``,
            or ``(B, 2 C, ...)`` for latents of shape ``(C, ...)``.

    Attributes:
        encoder: The network.
        elbo: The held-out ELBO, with the weight of its KL divergence, that :func:`fit_encoder` has
            reached, in nats per row; else ``None``.

    Raises:
        TypeError: If an argument has the wrong type, or the prior has no density.
        ValueError: If the source has several groups, a condition, or latents that are not real
            numbers.

    Example:
        >>> amortised = AmortisedSource(source, torch.nn.Linear(3, 4).eval())
        >>> group = amortised.group(amortised.start(4, amortised.encode(x)))
        >>> group.posterior
        Independent(Normal(loc: torch.Size([4, 2]), scale: torch.Size([4, 2])), 1)
    """

    elbo: float | None = None

    def __init__(self, source: LatentSource[Any, Any], encoder: nn.Module) -> None:
        super().__init__(source)
        require_instance("encoder", encoder, nn.Module, "Pass a network, or None for an MLP.")
        self._event = _event_of(source)
        self.encoder = encoder

    class Encoding(NamedTuple):
        """Parameters of q(z | x)."""

        loc: Tensor
        scale: Tensor

    class State(NamedTuple):
        """The state of the wrapped source, and the parameters of q(z | x) or ``None``."""

        inner: Any
        encoding: AmortisedSource.Encoding | None

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the wrapped source, and the fingerprint of the encoder."""
        return {**super().facts(), "AmortisedSource.encoder": module_fingerprint(self.encoder)}

    def encode(self, x: Any) -> Encoding:  # noqa: ANN401
        """Returns the parameters of q(z | x), for one batch of x or a tuple that begins with it."""
        require_eval(self.encoder, self.module)
        return self.infer(data_of(x))

    def infer(self, x: Tensor) -> Encoding:
        """Returns the parameters of q(z | x) in the present mode of the encoder.

        Raises:
            ValueError: If the encoder does not return mean and log-variance of each row.
        """
        out = self.encoder(x)
        rows, wanted = len(x), 2 * self._event.numel()
        if not isinstance(out, Tensor) or out.shape[:1] != (rows,) or out[0].numel() != wanted:
            raise ValueError(
                f"The encoder must return mean and log-variance of q(z | x) side by side, here "
                f"({rows}, {wanted}); got {described(out)}."
            )
        loc, log_var = (part.reshape(rows, *self._event) for part in _wide(out).chunk(2, dim=1))
        return self.Encoding(loc, (0.5 * log_var).clamp(-_LOG_SCALE, _LOG_SCALE).exp())

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> State:  # noqa: ANN401
        """Returns the state before z is given."""
        return self.State(self.source.start(batch_size, None, condition), encoding)

    def group(self, state: State) -> Group:
        """Returns p(z) of the wrapped source and, given an x, q(z | x)."""
        q = None if state.encoding is None else _normal(*state.encoding)
        return self.source.group(state.inner)._replace(posterior=q)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state with z, which has shape ``(B, *event)``."""
        return state._replace(inner=self.source.advance(state.inner, z))

    def decode(self, state: State) -> Tensor:
        """Returns the decoder's mean."""
        return self.source.decode(state.inner)

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z) of the wrapped source."""
        return self.source.likelihood(state.inner)


def fit_encoder(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    encoder: nn.Module | None = None,
    *,
    held_out: Any = None,  # noqa: ANN401
    kl_weight: float = 1.0,
    steps: int = 20_000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    patience: int | None = 10,
    seed: int | None = None,
    progress: bool = True,
) -> AmortisedSource:
    """Encoder q(z | x) for a frozen decoder, trained by the ELBO.

    The decoder needs a prior with a density, and p(x | z): a ``SingleGroup(prior, None, decoder,
    likelihood=…)``, or a decoder of means wrapped in ``GaussianDecoder(source, sigma)``. It may come
    from a GAN, from a VAE whose encoder is lost, or have an encoder that does not fit. The decoder
    does not change. The encoder with the highest held-out ELBO is kept.

    Arguments:
        source: The decoder with its prior: one group of real latents, without a condition.
        data: Rows of x that the decoder was trained on: a tensor or map-style dataset; or a
            ``DataLoader`` or list of batches, which needs ``held_out``. If a batch is a tuple such
            as (image, label), x is its first item.
        encoder: A network for :class:`AmortisedSource`, trained in place; ``None`` makes an MLP on
            flattened, standardised x.
        held_out: Data of the same kind for early stopping; by default 5 % of the data.
        kl_weight: w, the weight of the KL divergence.
        steps: Largest number of optimizer steps.
        batch_size: Rows per batch, where batches are made here.
        learning_rate: The first learning rate, on a cosine to 0.
        patience: Held-out ELBOs, one every 100 steps, without progress before it stops; ``None``
            never stops early.
        seed: Seed of all random numbers; ``None`` takes them from torch's generator.
        progress: Whether to show a progress bar.

    Returns:
        The same decoder and prior, with a posterior.

    Raises:
        FloatingPointError: If the held-out ELBO is not finite.
        TypeError: If an argument has the wrong type, or the prior has no density.
        ValueError: If an argument is out of range, the source has several groups or a condition,
            p(x | z) is unknown or does not fit the data, or the decoder blocks gradients.

    Example:
        >>> from ncprior import SingleGroup
        >>> decoder = torch.nn.Linear(2, 3).eval()
        >>> def likelihood(z):
        ...     return Independent(Normal(decoder(z), 0.1), 1)
        >>> lost = SingleGroup(source.prior, None, decoder, likelihood=likelihood)
        >>> data = likelihood(torch.randn(200, 2)).sample()
        >>> found = fit_encoder(lost, data, steps=50, progress=False)
        >>> found.encode(data[:5]).loc.shape
        torch.Size([5, 2])
    """
    require_source(source)
    require_counts(batch_size=batch_size)
    require_counts("[0, inf)", steps=steps)
    require_counts("[1, inf) or None", patience=patience)
    require_counts("(-1e18, 1e18) or None", seed=seed)
    require_numbers("(0, inf)", kl_weight=kl_weight, learning_rate=learning_rate)
    require_flags(progress=progress)
    require_eval(source, source.module)
    with nullcontext() if seed is None else seeded(seed), gradients_enabled():
        train, held_out = with_held_out("An encoder", data, held_out)
        device = device_of(source)
        rows = data_of(own_batch(spread_rows(train, max(batch_size, _PROBED)), device))
        _event_of(source)  # validates it first
        network = _MLP(rows, _draws_of(source)) if encoder is None else encoder
        fitted = AmortisedSource(source, network)
        require_apart(network, source, "The encoder")
        objective = _Objective(fitted, float(kl_weight), device)
        with naming_devices(source=source, encoder=network):
            objective.check(rows[: int(batch_size)])
            fitted.elbo = -objective.fit(
                Stream(train, int(batch_size)),
                one_pass(held_out, int(batch_size)),
                steps=steps,
                learning_rate=learning_rate,
                patience=patience,
                progress=progress,
            )
    return fitted


class _Objective:
    """The negative ELBO of a source, as a function of the weights of its encoder."""

    def __init__(self, fitted: AmortisedSource, kl_weight: float, device: torch.device) -> None:
        self.fitted, self.kl_weight, self.device = fitted, kl_weight, device

    def fit(self, stream: Stream, held_out: Iterable[Any], **options: Any) -> float:  # noqa: ANN401
        """Trains the encoder, and returns the held-out loss in nats per row."""
        encoder, noise = self.fitted.encoder, int(torch.randint(2**31, ()))
        weights = [p for p in encoder.parameters() if p.requires_grad]
        if not weights:
            raise ValueError(
                "The encoder has no parameter to train: all have requires_grad=False."
            )

        def loss() -> Tensor:
            encoder.train()
            return self(data_of(own_batch(next(stream), self.device))).mean()

        def held_out_loss() -> Tensor:
            encoder.eval()
            with seeded(noise):
                batches = checked_batches(held_out, self.device)
                losses = [self(data_of(batch)) for batch in batches]
            return torch.cat(losses).mean()

        try:
            options |= {"buffers": list(encoder.buffers()), "name": "encoder"}
            return minimise(loss, held_out_loss, weights, **options)
        finally:
            encoder.eval()

    def __call__(self, x: Tensor) -> Tensor:
        """Negative ELBO of every row, ``(B,)``, in nats, from one z each."""
        loc, scale = self.fitted.infer(x)
        z = _normal(loc, scale).rsample()
        walk, source = self.fitted.source.start(len(z)), self.fitted.source
        log_p = source.group(walk).prior.log_prob(z)  # type: ignore[attr-defined]
        log_x = source.likelihood(source.advance(walk, z)).log_prob(x)
        log_q = _normal(loc.detach(), scale.detach()).log_prob(z)
        loss: Tensor = self.kl_weight * (log_q - log_p) - log_x
        return loss

    def check(self, x: Tensor) -> None:
        """Validates p(x | z) on a few rows: shape, values, and the gradient with respect to z."""
        source, walk = self.fitted.source, self.fitted.source.start(len(x))
        z = source.group(walk).prior.sample().detach().requires_grad_()
        likelihood = source.likelihood(source.advance(walk, z))
        rule = f"p(x | z) must be a distribution over rows of the data, here {described(x)}"
        require_instance("likelihood(z)", likelihood, Distribution, "Return p(x | z).")
        try:
            log_x = likelihood.log_prob(x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{rule}; log_prob(x) says: {error}") from error
        if log_x.shape != (len(x),):
            raise ValueError(
                f"{rule}, with log_prob(x) of shape ({len(x)},); got {described(log_x)}. "
                f"Independent(p, n) sums over n axes of x."
            )
        gradient = None
        if log_x.requires_grad:
            (gradient,) = torch.autograd.grad(log_x.sum(), z, allow_unused=True)
        if gradient is None or not (log_x.isfinite().all() and gradient.isfinite().all()):
            raise ValueError(
                "log p(x | z) must be finite, with a gradient with respect to z. Look for NaN in x, "
                "x outside of the support, and no_grad or detach in the decoder."
            )


class _MLP(nn.Module):
    """A linear map plus an MLP on flattened, standardised x; at first q has the moments of p(z)."""

    centre: Tensor
    spread: Tensor

    def __init__(self, rows: Tensor, z: Tensor) -> None:
        super().__init__()
        outputs = 2 * z.shape[1]
        flat = _wide(rows).flatten(1)
        centre, spread = flat.mean(0), flat.std(0, correction=0)
        self.register_buffer("centre", centre)
        self.register_buffer("spread", one_if_constant(spread, centre))
        layers = [
            nn.Linear(flat.shape[1], _WIDTH),
            nn.SiLU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.SiLU(),
        ]
        last = nn.Linear(_WIDTH, outputs)
        self.network = nn.Sequential(*layers, last)
        self.linear = nn.Linear(flat.shape[1], outputs, bias=False)
        with torch.no_grad():
            self.linear.weight.zero_()
            last.weight.zero_()
            last.bias.copy_(torch.cat([z.mean(0), z.var(0).clamp(min=1e-12).log()]))
        self.to(flat)

    def forward(self, x: Tensor) -> Tensor:
        """Mean and log-variance of q(z | x), ``(B, 2 D)``."""
        flat = (x.flatten(1).to(self.centre) - self.centre) / self.spread
        out: Tensor = self.linear(flat) + self.network(flat)
        return out


@torch.no_grad()
def _draws_of(source: LatentSource[Any, Any]) -> Tensor:
    """Draws of p(z), with shape ``(N, D)``."""
    return source.group(source.start(_PROBED)).prior.sample().reshape(_PROBED, -1)


def _event_of(source: LatentSource[Any, Any]) -> torch.Size:
    """Returns the shape of z, after a check that an encoder can be trained for this source."""
    if source.num_groups != 1:
        raise ValueError(
            f"An encoder is trained for one group of latents; the source has {source.num_groups}. "
            f"Write a source whose group() returns q(z_k | z_<k, x): see adapters/README.md."
        )
    group = source.group(source.start(1))
    if group.context is not None:
        raise ValueError(
            "An encoder is trained for a decoder without conditions; the group of this source has a "
            "context. Train one per condition, on a source without it."
        )
    prior = group.prior
    if not isinstance(prior, Distribution) or not supports_langevin(prior):
        raise TypeError(
            f"q(z | x) is a Gaussian, and the ELBO needs p(z): a prior with a density on all of R^n; "
            f"got {described(prior)}. Pass a source with such a prior."
        )
    return prior.event_shape


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normal(loc: Tensor, scale: Tensor) -> Distribution:
    return build({"Normal": {"loc": loc, "scale": scale}})
