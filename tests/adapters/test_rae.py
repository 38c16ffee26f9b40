"""The networks of the RAE paper: sizes, TensorFlow's padding, losses, and the walk."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers.toys import everything
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.nn.functional import conv2d, pad
from torch.utils._pytree import tree_leaves

from ncprior import NCPrior, fit, sir
from ncprior.adapters.rae import RAE, VAE, RAESource, networks, pad_to_32, settle
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture_em import fit_mixture
from ncprior.bases.rebase import rebase
from ncprior.heads.networks import MLPHead
from ncprior.source import sample_posterior
from ncprior.testing import check_source

SHAPES = {"mnist": (1, 32, 32), "cifar10": (3, 32, 32), "celeba": (3, 64, 64)}


def small(model: type[VAE | RAE], data: str = "mnist", **options: Any) -> Any:
    return model(data, width=0.05, **options).eval()


def images(data: str = "mnist", count: int = 6) -> Tensor:
    return torch.rand(count, *SHAPES[data])


def stir(model: nn.Module) -> nn.Module:
    """Moves batch statistics, as training would."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def num_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("data", "encoder", "decoder", "log_sigma"),
    [
        ("mnist", 11_083_408, 11_606_273, 65_552),
        ("cifar10", 11_546_368, 18_954_499, 524_416),
        ("celeba", 18_267_200, 21_475_331, 1_048_640),
    ],
)
def test_full_width_has_the_papers_numbers_of_parameters_and_shapes(
    data: str, encoder: int, decoder: int, log_sigma: int
) -> None:
    with torch.device("meta"):
        vae, autoencoder = VAE(data), RAE(data)
        x = images(data, 2)
    for model in (vae, autoencoder):
        assert num_parameters(model.features, model.mean) == encoder
        assert num_parameters(model.decoder) == decoder
    assert num_parameters(vae) == encoder + decoder + log_sigma
    assert num_parameters(autoencoder) == encoder + decoder
    assert vae.decode(autoencoder.encode(x)).shape == x.shape
    maps = [layer for layer in vae.features if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in maps] == [128, 256, 512, 1024]


def test_width_scales_the_filters() -> None:
    def filters(model: VAE) -> list[int]:
        kinds = nn.Conv2d, nn.ConvTranspose2d
        return [m.out_channels for m in model.modules() if isinstance(m, kinds)]

    assert filters(VAE("cifar10", width=0.25)) == [32, 64, 128, 256, 128, 64, 3]


def test_normalisation_is_that_of_keras() -> None:
    norms = [m for m in small(VAE).modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(m.eps, m.momentum) for m in norms] == [(1e-3, 0.01)] * 6  # 0.99 of the old statistics


def test_initial_weights_are_glorot_uniform() -> None:
    layer = VAE("mnist", width=0.5).features[4 + 1 + 1]  # the second convolution, 64 to 128 maps
    assert layer.weight.shape == (128, 64, 4, 4)
    limit = math.sqrt(6 / (16 * (64 + 128)))
    assert 0.99 * limit < layer.weight.abs().max() <= limit
    assert not layer.bias.any()


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (5, 2), (4, 1), (5, 1)])
def test_transposed_layers_are_adjoint_to_convolutions_with_the_same_padding(
    kernel: int, stride: int
) -> None:
    """TensorFlow defines the transposed layer as the gradient of a 'same' convolution.

    Of a size divisible by the stride, 'same' pads kernel - stride in all, the odd one behind.
    """
    total = kernel - stride
    padding = (total // 2, total - total // 2)
    layer, crop = networks._transposed(3, 2, kernel, stride=stride)
    x, y = torch.randn(1, 2, 8, 8).double(), torch.randn(1, 3, 8 // stride, 8 // stride).double()
    weight = layer.weight.detach().double()
    forward = conv2d(pad(x, padding * 2), weight, stride=stride)
    with torch.no_grad():
        layer.bias.zero_()
        backward = crop(layer.double()(y))
    assert forward.shape == y.shape
    assert backward.shape == x.shape
    assert torch.allclose((forward * y).sum(), (backward * x).sum())


def test_the_encoder_pads_the_odd_row_behind() -> None:
    layers = small(VAE, "celeba").features
    assert layers[0].padding == (1, 2, 1, 2)
    layers = small(VAE, "mnist").features
    assert layers[1].padding == (1, 1, 1, 1)


def test_grey_and_cifar_encoders_see_centred_images_and_celebas_raw_ones() -> None:
    seen: dict[str, Tensor] = {}
    for data, shape in SHAPES.items():
        model = small(VAE, data)
        first = next(m for m in model.features if isinstance(m, nn.ZeroPad2d))
        first.register_forward_pre_hook(lambda _, args, data=data: seen.update({data: args[0]}))
        model.posterior(torch.full((1, *shape), 0.25))
    assert {data: x.mean().item() for data, x in seen.items()} == {
        "mnist": -0.5,
        "cifar10": -0.5,
        "celeba": 0.25,
    }


@pytest.mark.parametrize("data", SHAPES)
def test_the_vaes_loss_is_its_negative_elbo_in_other_units(data: str) -> None:
    """Loss = β (-log p(x|z) + KL) + a constant: squared error over σ² = β C / 2."""
    vae, x = small(VAE, data), images(data)
    torch.manual_seed(1)
    with torch.no_grad():
        loss = vae.loss(x)
        torch.manual_seed(1)
        q = vae.posterior(x)
        p = vae.likelihood(q.rsample())
        negative_elbo = kl_divergence(q, vae.prior()) - p.log_prob(x)
    constant = 0.5 * math.prod(SHAPES[data]) * math.log(2 * math.pi * vae.sigma**2)
    assert torch.allclose(loss, vae.beta * (negative_elbo - constant), rtol=1e-3)


def test_the_vaes_loss_sums_over_pixels_and_averages_over_channels() -> None:
    vae, x = small(VAE, "cifar10"), images("cifar10")
    vae.decode = lambda z: torch.zeros(len(z), 3, 32, 32)
    q = vae.posterior(x)
    by_hand = x.square().sum((1, 2, 3)) / 3 + 0.024 * kl_divergence(q, vae.prior())
    assert torch.allclose(vae.loss(x), by_hand)


def test_log_sigma_stays_between_minus_5_and_5() -> None:
    vae = small(VAE)
    with torch.no_grad():
        vae.log_sigma.bias.copy_(torch.linspace(-100, 100, 16))
    sigma = vae.posterior(images()).base_dist.scale
    assert torch.allclose(sigma.log().min(), torch.tensor(-5.0))
    assert torch.allclose(sigma.log().max(), torch.tensor(5.0))


def test_the_raes_loss_is_its_three_terms() -> None:
    model, x = small(RAE, "cifar10"), images("cifar10")
    z = model.encode(x)
    misfit = (x - model.decode(z)).square().mean((1, 2, 3))
    weights = [p for name, p in model.decoder.named_parameters() if p.ndim > 1]
    assert len(weights) == 4
    penalty = 1e-6 * sum(w.square().sum() for w in weights)
    assert torch.allclose(model.loss(x), misfit + 1e-3 * z.square().mean(1) + penalty)
    bare = small(RAE, "cifar10", regulariser=None, beta=0.0)
    assert torch.allclose(bare.loss(x), (x - bare.decode(bare.encode(x))).square().mean((1, 2, 3)))


def test_spectral_normalisation_bounds_every_layer_of_the_decoder_only() -> None:
    model = RAE("mnist", width=0.05, regulariser="sn")
    for _ in range(50):  # power iteration while training
        model.decode(torch.randn(4, 16))
    model.eval()
    linear = model.decoder[0].weight
    assert torch.linalg.matrix_norm(linear, 2).item() == pytest.approx(1, abs=1e-3)
    for layer in model.decoder:
        if isinstance(layer, nn.ConvTranspose2d):
            matrix = layer.weight.transpose(0, 1).flatten(1)
            assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=1e-2)
    assert not any("parametrizations" in name for name, _ in model.features.named_modules())


@pytest.mark.parametrize(
    ("data", "regulariser", "beta", "decay"),
    [
        ("mnist", "l2", 1e-4, 1e-7),
        ("cifar10", "l2", 1e-3, 1e-6),
        ("celeba", "l2", 1e-4, 1e-7),
        ("mnist", "sn", 9e-3, 0.0),
        ("cifar10", "sn", 0.03, 0.0),
        ("celeba", "sn", 2.4e-3, 0.0),
        ("mnist", None, 5e-4, 0.0),
        ("cifar10", None, 1e-2, 0.0),
        ("celeba", None, 1e-4, 0.0),
    ],
)
def test_the_losses_weights_are_the_papers(
    data: str, regulariser: str | None, beta: float, decay: float
) -> None:
    model = small(RAE, data, regulariser=regulariser)
    assert (model.beta, model.decay) == (beta, decay)


@pytest.mark.parametrize("data", SHAPES)
def test_the_vaes_source_keeps_the_laws(data: str) -> None:
    check_source(RAESource(stir(small(VAE, data))), images(data))


@pytest.mark.parametrize("regulariser", ["l2", "sn", None])
def test_the_raes_source_keeps_the_laws_once_it_has_a_prior(regulariser: str | None) -> None:
    source = RAESource(stir(small(RAE, regulariser=regulariser)), noise=0.1)
    mixture = fit_mixture(latents_of(source, images(count=40)), 2)
    check_source(rebase(source, mixture), images())


def test_half_precision_models_have_a_source_that_keeps_the_laws() -> None:
    source = RAESource(stir(small(VAE)).bfloat16())
    assert source.decode(sample_posterior(source, images())[1]).dtype == torch.bfloat16
    check_source(source, images())


def test_the_walk_is_the_models_own_forward() -> None:
    vae, x = stir(small(VAE)), images()
    torch.manual_seed(1)
    (z,), state = sample_posterior(RAESource(vae), x)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = vae.posterior(x).sample()
        assert torch.equal(z, expected)
        assert torch.equal(RAESource(vae).decode(state), vae.decode(expected))


def test_images_of_a_walk_are_between_0_and_1() -> None:
    source = RAESource(stir(small(VAE, "cifar10")))
    state = source.start(100)
    x = source.decode(source.advance(state, 20 * source.group(state).prior.sample()))
    assert x.shape == (100, 3, 32, 32)
    assert 0 <= x.min() and x.max() <= 1


def test_an_rae_without_a_fitted_prior_says_how_to_fit_one() -> None:
    source = RAESource(small(RAE), noise=0.1)
    prior = NCPrior(source, MLPHead((16,)))
    with pytest.raises(ValueError, match=r"no prior of its own\. Fit one: rebase\(source, fit_m"):
        prior.sample(2, partial(sir, num_proposals=2))
    with pytest.raises(ValueError, match="Fit one"):
        source.group(source.start(3)).prior.sample()


def test_an_raes_posterior_is_its_code_and_the_stated_noise() -> None:
    model, x = stir(small(RAE)), images(count=3)
    source = RAESource(model, noise=0.25)
    q = source.group(source.start(3, source.encode(x))).posterior
    assert isinstance(q, Distribution)
    assert torch.equal(q.mean, model.encode(x))
    assert torch.equal(q.stddev, torch.full((3, 16), 0.25))


def test_an_raes_means_are_its_codes_and_its_samples_are_not() -> None:
    model, x = stir(small(RAE)), images(count=3)
    source = RAESource(model, noise=0.25)
    assert torch.equal(latents_of(source, x, of="means"), model.encode(x).detach())
    assert not torch.equal(latents_of(source, x), model.encode(x).detach())


@pytest.mark.parametrize("noise", [None, 0.0, -1.0, math.nan, math.inf])
def test_an_rae_needs_a_noise(noise: float | None) -> None:
    with pytest.raises(ValueError, match=r"pass noise=, the standard deviation|noise must be"):
        RAESource(small(RAE), noise=noise)


def test_a_vae_takes_no_noise() -> None:
    with pytest.raises(ValueError, match="has its own"):
        RAESource(small(VAE), noise=0.1)


def test_other_models_are_refused() -> None:
    for model, name in ((nn.Linear(2, 2), "Linear"), (None, "None"), (VAE, "the class VAE")):
        with pytest.raises(TypeError, match=f"takes a VAE or a RAE of .*; got .*{name}"):
            RAESource(model)  # type: ignore[arg-type]


def test_F32_images_in_0_to_255_are_refused() -> None:
    for source in (RAESource(small(VAE)), RAESource(small(RAE), noise=0.1)):
        with pytest.raises(
            ValueError, match=r"in \[0, 1\]; got numbers from .* Divide bytes by 255"
        ):
            source.encode(255 * images())


def loc(encoding: Any) -> Tensor:
    (tensor, *_) = tree_leaves(encoding)
    return tensor


def test_F25_arrays_are_images() -> None:
    source, x = RAESource(small(VAE)), images()
    assert torch.equal(loc(source.encode(x.numpy())), loc(source.encode(x)))


def test_only_the_vae_has_a_likelihood() -> None:
    x = images(count=3)
    source = RAESource(small(VAE))
    state = sample_posterior(source, x)[1]
    assert source.likelihood(state).log_prob(x).shape == (3,)
    source = RAESource(small(RAE), noise=0.1)
    with pytest.raises(ValueError, match="no probability model"):
        source.likelihood(sample_posterior(source, x)[1])


@pytest.mark.parametrize("model", [VAE, RAE])
def test_training_mode_is_refused(model: type[VAE | RAE]) -> None:
    source = RAESource(small(model).train(), **({} if model is VAE else {"noise": 0.1}))
    with pytest.raises(ValueError, match="evaluation mode"):
        source.encode(images())
    with pytest.raises(ValueError, match="evaluation mode"):
        source.start(2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 1, 28, 28), r"got \(2, 1, 28, 28\)\. Pad it: pad_to_32\(x\)\."),
        (torch.rand(2, 3, 32, 32), r"take images of shape \(B, 1, 32, 32\)"),
        (torch.rand(1, 32, 32), r"got \(1, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "as floats; got .* Divide bytes by 255"),
    ],
)
def test_wrong_images_are_refused(x: Tensor, message: str) -> None:
    for source in (RAESource(small(VAE)), RAESource(small(RAE), noise=0.1)):
        with pytest.raises(ValueError, match=message):
            source.encode(x)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="one of 'mnist', 'cifar10', 'celeba'; got 'svhn'"):
        VAE("svhn")
    for model in (VAE, RAE):
        for wrong in ({"width": "1"}, {"beta": "1"}, {"beta": True}):
            with pytest.raises(TypeError, match="must be a number"):
                model("mnist", **wrong)
    with pytest.raises(ValueError, match="one of None, 'l2', 'sn'; got 'gp'"):
        RAE("mnist", regulariser="gp")
    for width in (0.0, -1.0, math.nan, 0.001):
        with pytest.raises(ValueError, match="fraction of the filter counts|width must be"):
            VAE("mnist", width=width)


def test_padding_puts_zeros_around_and_refuses_other_sizes() -> None:
    x = torch.rand(2, 1, 28, 28)
    padded = pad_to_32(x)
    assert torch.equal(padded[..., 2:30, 2:30], x)
    assert padded.sum() == pytest.approx(x.sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"got \(2, 1, 32, 32\)"):
        pad_to_32(padded)


@pytest.mark.parametrize("model", [VAE, RAE])
def test_a_step_of_training_lowers_the_loss(model: type[VAE | RAE]) -> None:
    network, x = small(model).train(), images(count=16)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = network.loss(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_model_is_as_it_was_after_heads_were_trained() -> None:
    vae = stir(small(VAE))
    before = everything(vae)
    source = RAESource(vae)
    source = rebase(source, fit_mixture(latents_of(source, images(count=40), of="means"), 2))
    prior = NCPrior(source, MLPHead((16,), width=8))
    fit(prior, images(count=40), steps=3, batch_size=8, progress=False)
    prior.sample(4, partial(sir, num_proposals=4))
    assert everything(vae) == before


def test_settling_makes_the_statistics_those_of_the_images() -> None:
    """The first normalisation sees the first convolution's output: its plain mean and variance."""
    model, images = VAE("mnist", width=0.05), torch.rand(300, 1, 32, 32)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    settle(model, images)
    hook.remove()
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    assert len(seen) == 3
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)  # type: ignore[arg-type]
    assert norm.momentum == 0.01
    assert not model.training


@pytest.mark.parametrize(("model", "options"), [(VAE, {}), (RAE, {"noise": 0.1})])
def test_heads_may_see_the_maps_of_the_decoders_first_layer(
    model: type[VAE | RAE], options: dict[str, float]
) -> None:
    torch.manual_seed(0)
    networks = small(model)
    source = RAESource(networks, maps=True, **options)
    z = torch.randn(3, 5, networks.latents)
    maps = torch.stack([networks.decoder[:2](row) for row in z])
    assert torch.equal(source.features(0, z), maps)
    closer = rebase(source, fit_mixture(torch.randn(50, networks.latents), 2))
    head = NCPrior.for_source(closer, images(), width=8).heads[0]
    assert head.event_shape == maps.shape[2:]
    assert RAESource(networks, **options).features(0, z) is z


def test_an_error_while_settling_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VAE("mnist", width=0.05)
    before = everything(model)
    settle(VAE("mnist", width=0.05), torch.rand(150, 1, 32, 32))
    loss, calls = type(model).loss, []

    def fail(self: VAE, x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 2:
            raise MemoryError
        found: Tensor = loss(self, x)
        return found

    monkeypatch.setattr(type(model), "loss", fail)
    with pytest.raises(MemoryError):
        settle(model, torch.rand(301, 1, 32, 32))
    assert calls == [101, 100]  # of nearly equal weight
    after = everything(model)
    assert [name for name, _ in before] == [name for name, _ in after]
    for (_, one), (_, other) in zip(before, after, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.01}
