"""Autoencoders of diffusers as sources: the laws of a source, the models' own numbers, refusals."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from helpers.toys import everything
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup, fit
from ncprior.adapters.diffusers import DiffusersSource
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture_em import fit_gaussian
from ncprior.bases.rebase import rebase
from ncprior.heads.networks import ConvHead
from ncprior.source import posterior_of, sample_posterior
from ncprior.testing import check_source

SMALL: dict[str, Any] = {
    "norm_num_groups": 4,
    "latent_channels": 2,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def build(**config: Any) -> Any:
    """A small AutoencoderKL that halves images once."""
    return diffusers.AutoencoderKL(**{**SMALL, **config}).eval()


def images(count: int = 4, size: int = 8) -> Tensor:
    """Images in [-1, 1]."""
    return 2 * torch.rand(count, 3, size, size) - 1


def based(model: nn.Module, x: Tensor) -> Any:
    """A source with a base fitted to x."""
    source = DiffusersSource(model)
    return rebase(source, fit_gaussian(latents_of(source, x), covariance="diagonal"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_autoencoder_kl_keeps_the_laws(dtype: torch.dtype) -> None:
    x = images()
    check_source(based(build().to(dtype), x), x)


def asymmetric() -> tuple[nn.Module, Tensor]:
    blocks = {"down_block_types": SMALL["down_block_types"], "norm_num_groups": 4}
    return diffusers.AsymmetricAutoencoderKL(
        **blocks,
        up_block_types=SMALL["up_block_types"],
        down_block_out_channels=(8, 8),
        up_block_out_channels=(8, 8),
        latent_channels=2,
    ), images()


def audio() -> tuple[nn.Module, Tensor]:
    model = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 3],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=2,
        audio_channels=1,
    )
    return model, torch.randn(4, 1, 24)


def video() -> tuple[nn.Module, Tensor]:
    if not hasattr(diffusers, "AutoencoderKLWan"):
        pytest.skip("this diffusers has no AutoencoderKLWan")
    model = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=2,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0, 0.0],
        latents_std=[1.0, 1.0],
    )
    return model, 2 * torch.rand(4, 3, 5, 8, 8) - 1


@pytest.mark.parametrize("make", (asymmetric, audio, video))
def test_other_models_with_a_latent_dist_keep_the_laws(make: Any) -> None:
    model, x = make()
    check_source(based(model.eval(), x), x)


def test_a_walk_is_the_models_own_forward_pass() -> None:
    model, x = build(), images(6)
    torch.manual_seed(1)
    theirs = model(x, sample_posterior=True).sample
    torch.manual_seed(1)
    source = DiffusersSource(model)
    (z,), state = sample_posterior(source, x)
    assert z.shape == (6, 2, 4, 4)
    torch.testing.assert_close(source.decode(state), theirs)  # to rounding


def test_latents_are_those_of_encode_unscaled() -> None:
    model, x = build(scaling_factor=0.1), images()
    dist = model.encode(x).latent_dist
    source = DiffusersSource(model)
    q = posterior_of(source.group(source.start(4, source.encode(x))))
    assert torch.equal(q.mean, dist.mean)
    assert torch.equal(q.stddev, dist.std)
    with torch.no_grad():
        assert torch.equal(latents_of(source, x, of="means"), dist.mean)


def test_log_q_is_that_of_the_latent_dist() -> None:
    model, x = build(), images()
    source, dist = DiffusersSource(model), model.encode(x).latent_dist
    z = dist.sample()
    q = posterior_of(source.group(source.start(4, source.encode(x))))
    torch.testing.assert_close(-q.log_prob(z), dist.nll(z, dims=[1, 2, 3]), rtol=1e-5, atol=1e-3)


def test_a_model_in_half_precision_is_cast_in_and_out() -> None:
    model, x = build().to(torch.bfloat16), images()
    source = DiffusersSource(model)
    (z,), state = sample_posterior(source, x)
    assert z.dtype == torch.float32
    assert source.decode(state).dtype == torch.float32
    theirs = model.decode(z.to(torch.bfloat16)).sample.float()
    assert torch.equal(source.decode(state), theirs)


def test_the_prior_has_to_be_fitted_first() -> None:
    x = images(20)
    source = DiffusersSource(build())
    message = r"AutoencoderKL has no prior worth.*N\(0, I\).*rebase\(source, fit_mixture"
    with pytest.raises(ValueError, match=message):
        NCPrior.for_source(source, x)
    with pytest.raises(ValueError, match=message):
        source.group(source.start(3)).prior.sample()


def test_whoever_insists_on_a_standard_normal_states_it() -> None:
    standard = Independent(Normal(torch.zeros(2, 4, 4), 1.0), 3)
    source = rebase(DiffusersSource(build()), standard)
    check_source(source, images())


def test_heads_for_maps_train_and_the_model_stays() -> None:
    model, x = build(), images(40)
    before = everything(model)
    prior = NCPrior(based(model, x), ConvHead((2, 4, 4), width=8, depth=1))
    history = fit(prior, x, steps=5, batch_size=20, progress=False)
    assert len(history.rows[-1].loss) == 1
    assert everything(model) == before


@pytest.mark.parametrize("size", ((15, 16), (16, 10), (17, 16), (9, 9), (12, 12)))
def test_images_that_would_lose_their_margin_are_refused(size: tuple[int, int]) -> None:
    blocks = {"block_out_channels": (8,) * 4}
    blocks |= {"down_block_types": SMALL["down_block_types"] * 2}  # type: ignore[dict-item]
    blocks |= {"up_block_types": SMALL["up_block_types"] * 2}  # type: ignore[dict-item]
    source = DiffusersSource(build(**blocks))  # halves three times
    with pytest.raises(ValueError, match=rf"\({size[0]}, {size[1]}\) pixels became.*multiples"):
        source.encode(torch.zeros(2, 3, *size))
    assert source.encode(torch.zeros(2, 3, 16, 24)).posterior["Normal"]["loc"].shape[2:] == (2, 3)


def test_images_of_another_size_than_the_base_are_refused() -> None:
    source = based(build(), images())
    with pytest.raises(ValueError, match=r"\(2, 4, 4\).*\(2, 8, 8\)"):
        source.group(source.start(4, source.encode(images(size=16))))


def test_vq_models_are_refused_with_what_to_do() -> None:
    model = diffusers.VQModel(norm_num_groups=4, block_out_channels=(8,), latent_channels=2)
    with pytest.raises(
        ValueError, match="A VQModel cannot be wrapped.*VQModelSource.*SingleGroup.*fitted"
    ):
        DiffusersSource(model.eval())


def test_the_remedy_for_vq_models_works() -> None:
    model = diffusers.VQModel(
        norm_num_groups=4, block_out_channels=(8,), latent_channels=2, num_vq_embeddings=16
    ).eval()

    def posterior(x: Tensor) -> Independent:
        return Independent(Normal(model.encode(x).latents, 0.1, validate_args=False), 3)

    source = SingleGroup(
        Independent(Normal(torch.zeros(2, 8, 8), 1.0), 3),
        posterior,
        lambda h: model.decode(h).sample,
        module=model,
    )
    x = images(20)
    source = rebase(source, fit_gaussian(latents_of(source, x), covariance="diagonal"))
    state = source.start(3)
    z = source.group(state).prior.sample()
    assert source.decode(source.advance(state, z)).shape == (3, 3, 8, 8)


def test_models_without_a_latent_dist_are_refused() -> None:
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with pytest.raises(ValueError, match=r"AutoencoderTiny.*no latent_dist.*SingleGroup"):
        DiffusersSource(model.eval()).encode(images())


def test_a_deterministic_latent_dist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encode = build(), diffusers.AutoencoderKL.encode

    def certain(self: Any, x: Tensor) -> Any:
        out = encode(self, x)
        law = DiagonalGaussianDistribution(out.latent_dist.parameters, deterministic=True)
        return type(out)(latent_dist=law)

    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", certain)
    with pytest.raises(ValueError, match="DiagonalGaussianDistribution without a spread.*noise"):
        DiffusersSource(model).encode(images())


def test_a_latent_dist_that_is_no_distribution_is_refused() -> None:
    if not hasattr(diffusers, "AutoencoderKLCosmos"):
        pytest.skip("this diffusers has no AutoencoderKLCosmos")
    model = diffusers.AutoencoderKLCosmos(
        latent_channels=2,
        encoder_block_out_channels=(8, 8, 8),
        decode_block_out_channels=(8, 8, 8),
        attention_resolutions=(4,),
        resolution=16,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    with pytest.raises(ValueError, match="IdentityDistribution without a spread"):
        DiffusersSource(model.eval()).encode(torch.zeros(2, 3, 1, 16, 16))


@pytest.mark.parametrize(
    ("name", "reason"),
    (
        ("AutoencoderKLTemporalDecoder", "frames of a video"),
        ("ConsistencyDecoderVAE", "draws noise"),
    ),
)
def test_models_whose_decoder_is_no_mean_are_refused(name: str, reason: str) -> None:
    model = getattr(diffusers, name).__new__(getattr(diffusers, name))  # known by name alone
    with pytest.raises(ValueError, match=f"A {name} cannot be wrapped: .*{reason}"):
        DiffusersSource(model)


def test_other_modules_are_sent_to_single_group() -> None:
    with pytest.raises(TypeError, match="got Linear.*SingleGroup"):
        DiffusersSource(nn.Linear(1, 1).eval())


@pytest.mark.parametrize("wrong", [None, 3, "vae", diffusers.AutoencoderKL])
def test_F32_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="model must be of type Module; got .*from_pretrained"):
        DiffusersSource(wrong)


def test_F32_W12_bytes_are_refused() -> None:
    source, x = DiffusersSource(build()), 255 * torch.rand(4, 3, 8, 8)
    for batch in (x.byte(), x, x.long(), x.byte().numpy(), (x, torch.zeros(4))):
        with pytest.raises(ValueError, match=r"AutoencoderKL takes x .*x / 127\.5 - 1 for bytes"):
            source.encode(batch)
        with pytest.raises(ValueError, match=r"AutoencoderKL takes x .*x / 127\.5 - 1 for bytes"):
            latents_of(source, [batch])


def test_F25_arrays_are_images() -> None:
    source, x = DiffusersSource(build()), images()
    for array in (x.numpy(), x.double().numpy()):
        ours, theirs = (source.encode(batch).posterior["Normal"]["loc"] for batch in (array, x))
        assert torch.equal(ours, theirs)


def test_W4_an_upcast_decoder_gets_z_in_its_own_dtype() -> None:
    """As pipelines upcast it: the encoder stays in half precision."""
    model, x = build(), images()
    model.encoder.to(torch.bfloat16)
    model.quant_conv.to(torch.bfloat16)
    source = DiffusersSource(model)
    (z,), state = sample_posterior(source, x)
    z = z.bfloat16().float()
    assert torch.equal(source.decode(source.advance(state, z)), model.decode(z).sample)


def test_no_likelihood_and_why() -> None:
    x = images()
    source = based(build(), x)
    _, state = sample_posterior(source, x)
    with pytest.raises(ValueError, match="AutoencoderKL knows no p.*perceptual and adversarial"):
        source.likelihood(state)


def test_training_mode_is_refused() -> None:
    model, x = build(), images()
    source = DiffusersSource(model)
    encoding = source.encode(x)
    model.quant_conv.train()
    for call in (
        lambda: DiffusersSource(model),
        lambda: source.encode(x),
        lambda: source.start(4, encoding),
    ):
        with pytest.raises(ValueError, match="quant_conv is in training mode"):
            call()
