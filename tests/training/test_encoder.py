"""Encoders for frozen decoders: the best q(z | x) in closed form, promises, and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from helpers.toys import VAE, base, everything
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MultivariateNormal, Normal

from ncprior import NCPrior, SingleGroup, sir
from ncprior.evaluation import log_likelihood
from ncprior.heads import MLPHead
from ncprior.source import WrappedSource, posterior_of
from ncprior.testing import check_source
from ncprior.training import AmortisedSource, fit_encoder
from ncprior.vaebm import GaussianDecoder

SIGMA = 0.5
ORTHOGONAL = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.0, 0.0]])
OBLIQUE = torch.tensor([[1.0, 0.6], [0.5, 1.0], [0.3, -0.2]])


def linear(w: Tensor) -> SingleGroup:
    """The decoder p(x | z) = N(W z + 1, σ² I), without an encoder."""
    return SingleGroup(
        base(),
        None,
        lambda z: z @ w.T + 1,
        likelihood=lambda z: Independent(Normal(z @ w.T + 1, SIGMA, validate_args=False), 1),
    )


def data_of(w: Tensor, count: int = 2000) -> Tensor:
    """Draws of p(x)."""
    return torch.randn(count, 2) @ w.T + 1 + SIGMA * torch.randn(count, 3)


def best(w: Tensor, x: Tensor, kl_weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean and scale of the diagonal Gaussian with the highest ELBO.

    At weight w it is that of an observation with variance w σ². The mean is that of the true
    posterior N(m, Λ⁻¹), and a precision is the diagonal entry of Λ.
    """
    noise = kl_weight * SIGMA**2
    precision = torch.eye(2) + w.T @ w / noise
    return torch.linalg.solve(precision, (x - 1) @ w / noise, left=False), precision.diag() ** -0.5


@cache
def fitted(kind: str, kl_weight: float = 1.0) -> tuple[AmortisedSource, Tensor, Tensor]:
    """A linear encoder, in whose family the best one is, its decoder, and held-out rows."""
    w = {"orthogonal": ORTHOGONAL, "oblique": OBLIQUE}[kind]
    x = data_of(w)
    options = {"steps": 500, "learning_rate": 0.1, "batch_size": 200, "kl_weight": kl_weight}
    encoder = nn.Linear(3, 4)
    source = fit_encoder(
        linear(w), data_of(w), encoder, held_out=x, seed=0, progress=False, **options
    )
    return source, w, x


@pytest.mark.parametrize(
    ("kind", "kl_weight"), [("orthogonal", 1.0), ("orthogonal", 0.5), ("oblique", 1.0)]
)
def test_the_best_gaussian_of_a_linear_decoder_is_reached(kind: str, kl_weight: float) -> None:
    source, w, x = fitted(kind, kl_weight)
    mean, scale = best(w, x, kl_weight)
    found = source.encode(x)
    # The loss is quadratic around its minimum: a gap of g nats is an error of √(2 g) in units of
    # the scale of q, and relative to it √g. The gap asked for here and below is 0.001 nats.
    assert ((found.loc - mean) / scale).square().mean().sqrt() < math.sqrt(2e-3)
    assert (found.scale / scale - 1).square().mean().sqrt() < math.sqrt(1e-3)


def test_the_elbo_of_the_true_posterior_is_the_likelihood() -> None:
    source, w, x = fitted("orthogonal")
    exact = MultivariateNormal(torch.ones(3), w @ w.T + SIGMA**2 * torch.eye(3)).log_prob(x)
    elbo = log_likelihood(source, x, num_samples=1, batch_size=2000)["base"].lower
    assert (exact - elbo).mean().abs() < 1e-3
    assert source.elbo == pytest.approx(exact.mean().item(), abs=1e-3)


def test_the_default_encoder_fits_a_decoder_that_is_not_linear() -> None:
    """z is seen through z², with one sign only: the posterior is not linear in x."""

    def likelihood(z: Tensor) -> Independent:
        return Independent(Normal((1 + z).square(), 0.1, validate_args=False), 1)

    z = 0.3 * torch.randn(1000, 2)
    prior = Independent(Normal(torch.zeros(2), torch.full((2,), 0.3), validate_args=False), 1)
    x = likelihood(z).sample()
    source = SingleGroup(prior, None, lambda z: likelihood(z).mean, likelihood=likelihood)
    options = {"steps": 300, "learning_rate": 5e-3, "batch_size": 100, "seed": 0}
    fitted = fit_encoder(source, x, progress=False, **options)
    residual = fitted.encode(x).loc - z
    linear_fit = torch.linalg.lstsq(torch.cat([x, torch.ones(1000, 1)], 1), z).solution
    of_line = torch.cat([x, torch.ones(1000, 1)], 1) @ linear_fit - z
    assert residual.square().mean() < 0.5 * of_line.square().mean()


def vae_without_encoder(**parts: Any) -> tuple[VAE, SingleGroup]:
    """A small network as the decoder, whose weights have gradients from elsewhere."""
    vae = VAE()
    vae.decoder[0].weight.grad = torch.ones(8, 2)

    def likelihood(z: Tensor) -> Independent:
        return Independent(Normal(vae.decode(z), 1.0, validate_args=False), 1)

    parts = {"module": vae.decoder, "likelihood": likelihood, **parts}
    return vae, SingleGroup(base(), None, vae.decode, **parts)


def briefly(source: Any, data: Any, *arguments: Any, **options: Any) -> AmortisedSource:
    options = {"steps": 2, "batch_size": 8, "progress": False, **options}
    return fit_encoder(source, data, *arguments, **options)


def test_the_decoder_stays_as_it_was() -> None:
    vae, source = vae_without_encoder()
    before = everything(vae)
    fitted = briefly(source, torch.randn(40, 3), steps=20)
    assert everything(vae) == before
    assert fitted.fingerprint() == source.fingerprint()
    assert fitted.shared_prior() is source.prior


def test_the_result_keeps_the_rules_of_a_source() -> None:
    _, source = vae_without_encoder()
    x = torch.randn(40, 3)
    fitted = briefly(source, x)
    check_source(fitted, x[:5])
    prior = NCPrior(fitted, MLPHead((2,), width=4, depth=1))
    sampler = partial(sir, num_proposals=5)
    assert prior.sample(5, sampler, draw_x=True).x.shape == (5, 3)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_a_seed_repeats_it_and_leaves_the_generators(no_grad: Callable[[], Any]) -> None:
    _, source = vae_without_encoder()
    x = torch.randn(40, 3)
    state = torch.get_rng_state()
    first = briefly(source, x, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    with no_grad():
        second = briefly(source, x, seed=3)
    assert torch.equal(first.encode(x).loc, second.encode(x).loc)
    assert first.elbo == second.elbo
    assert not torch.equal(first.encode(x).loc, briefly(source, x, seed=4).encode(x).loc)


class Counted(nn.Linear):
    """A linear encoder that counts its training steps, and starts at q = p."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        return super().forward(x)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def test_training_ends_early_and_keeps_the_best() -> None:
    _, source = vae_without_encoder()
    x, noise, encoder = torch.randn(40, 3), torch.randn(40, 3), Counted(3, 4)
    options = {"held_out": noise, "steps": 5000, "patience": 2, "learning_rate": 1.0}
    fitted = briefly(source, x, encoder, **options)
    assert encoder.steps == 200  # no evaluation is better than q = p
    assert fitted.encoder is encoder and not encoder.training
    assert not encoder.weight.any()


def test_held_out_losses_have_the_same_noise() -> None:
    _, source = vae_without_encoder()
    for seed in range(3):  # fresh noise would lower one loss of two
        encoder = Counted(3, 4)
        options = {"steps": 300, "patience": 1, "learning_rate": 1e-17, "seed": seed}
        briefly(source, torch.randn(40, 3), encoder, **options)
        assert encoder.steps == 100


def test_latents_with_more_axes_and_decoders_of_means() -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Flatten(), nn.Linear(2 * 2 * 2, 5)).eval()
    zeros = torch.zeros(2, 2, 2)
    prior = Independent(Normal(zeros, torch.ones_like(zeros), validate_args=False), 3)
    source = GaussianDecoder(SingleGroup(prior, None, decoder, module=decoder), sigma=0.1)
    encoder = nn.Sequential(nn.Linear(5, 16), nn.Unflatten(1, (4, 2, 2)))
    x = torch.randn(40, 5)
    fitted = briefly(source, [(x, torch.zeros(40))], encoder, held_out=x)
    q = posterior_of(fitted.group(fitted.start(40, fitted.encode(x))))
    assert q.event_shape == (2, 2, 2)
    assert torch.equal(q.mean, encoder(x)[:, :2])  # along the channels
    assert torch.allclose(q.stddev, (0.5 * encoder(x)[:, 2:]).exp())


class Conditional(WrappedSource):
    """A source whose group has a context."""

    def group(self, state: Any) -> Any:
        return self.source.group(state)._replace(context=torch.zeros(len(state.rows), 1))


def faults() -> dict[str, tuple[type[Exception], str, Callable[[], Any]]]:
    """Each wrong call, the kind of its error, and a part of the message."""
    x, (_, source) = torch.randn(40, 3), vae_without_encoder()
    codes = Independent(Categorical(logits=torch.zeros(2, 4)), 1)
    encoder, trained = nn.Linear(3, 4), nn.Linear(3, 4).requires_grad_(False)
    shared = vae_without_encoder()[0]

    def detached(z: Tensor) -> Independent:
        return Independent(Normal(z.detach().repeat(1, 2)[:, :3], 1.0), 1)

    def without(likelihood: Any) -> SingleGroup:
        return SingleGroup(base(), None, lambda z: z, likelihood=likelihood)

    return {
        "no likelihood": (ValueError, "does not know p", lambda: briefly(without(None), x)),
        "no source": (TypeError, "LatentSource", lambda: briefly(nn.Linear(2, 3), x)),
        "codes": (
            TypeError,
            "density on all of",
            lambda: briefly(SingleGroup(codes, None, lambda z: z), x),
        ),
        "a context": (ValueError, "context", lambda: briefly(Conditional(source), x)),
        "detached": (ValueError, "no_grad or detach", lambda: briefly(without(detached), x)),
        "not summed": (
            ValueError,
            "Independent",
            lambda: briefly(without(lambda z: Normal(z @ torch.ones(2, 3), 1.0)), x),
        ),
        "another width": (ValueError, r"log_prob\(x\) says", lambda: briefly(source, x[:, :2])),
        "NaN": (ValueError, "NaN in x", lambda: briefly(source, torch.full((40, 3), torch.nan))),
        "no network": (TypeError, "encoder", lambda: briefly(source, x, torch.zeros_like)),
        "frozen": (ValueError, "requires_grad", lambda: briefly(source, x, trained)),
        "outputs": (ValueError, "side by side", lambda: briefly(source, x, nn.Linear(3, 5))),
        "one-shot": (TypeError, "one-shot", lambda: briefly(source, iter([x]))),
        "batches": (ValueError, "held_out", lambda: briefly(source, [x])),
        "shared": (
            ValueError,
            "share parameters",
            lambda: briefly(
                SingleGroup(base(), None, shared.decode, module=shared, likelihood=detached),
                x,
                shared.decoder,
            ),
        ),
        "training": (
            ValueError,
            "evaluation mode",
            lambda: fit_encoder(vae_without_encoder(module=nn.Dropout())[1], x, encoder),
        ),
    }


@pytest.mark.parametrize("name", faults())
def test_wrong_calls_say_what_to_do(name: str) -> None:
    kind, message, wrong = faults()[name]
    with pytest.raises(kind, match=message):
        wrong()


def test_a_source_without_posterior_says_so() -> None:
    _, source = vae_without_encoder()
    with pytest.raises(ValueError, match="fit_encoder"):
        source.encode(torch.randn(4, 3))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_an_encoder_is_made_for_latents_of_any_shape(shape: tuple[int, ...]) -> None:
    prior = Normal(torch.zeros(shape), torch.ones(shape))
    prior = Independent(prior, 1) if shape else prior
    source = SingleGroup(
        prior,
        None,
        lambda z: z.reshape(len(z), -1).mean(1, keepdim=True),
        likelihood=lambda z: Independent(
            Normal(z.reshape(len(z), -1).mean(1, keepdim=True), 1.0), 1
        ),
    )
    found = fit_encoder(source, torch.randn(200, 1), steps=2, progress=False)
    assert found.encode(torch.randn(5, 1)).loc.shape == (5, *shape)
