"""pythae's models as sources: the laws of a source, pythae's own numbers, and refusals by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pythae.models as zoo
import torch
from helpers.toys import everything
from pythae.data.datasets import BaseDataset, DatasetOutput
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig
from torch import Tensor, nn

from ncprior import NCPrior, fit
from ncprior.adapters.pythae import PythaeSource
from ncprior.bases.empirical import NoPrior
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.mixture_em import fit_gaussian
from ncprior.bases.rebase import rebase
from ncprior.heads.networks import MLPHead
from ncprior.source import posterior_of, sample_posterior
from ncprior.testing import check_source

SHAPE = (1, 8, 8)
VARIATIONAL = ("VAE", "BetaVAE", "BetaTCVAE", "DisentangledBetaVAE", "FactorVAE", "INFOVAE_MMD")
VARIATIONAL += ("IWAE", "CIWAE", "MIWAE", "PIWAE", "Adversarial_AE", "VAEGAN", "VAMP")
CODES = ("AE", "RAE_GP", "RAE_L2", "WAE_MMD")
REFUSED = {
    "VQVAE": "codes of a codebook.*VQSource",
    "VAE_IAF": r"pushed through flows.*model\.embed",
    "VAE_LinNF": r"pushed through flows.*model\.embed",
    "HVAE": "Hamiltonian",
    "RHVAE": "Hamiltonian",
    "SVAE": "curved space",
    "PoincareVAE": "curved space",
}


class ConvEncoder(BaseEncoder):
    """A convolution with batch statistics; with or without a log-variance."""

    def __init__(self, dim: int, *, variational: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        )
        self.loc = nn.Linear(64, dim)
        self.log_var = nn.Linear(64, dim) if variational else None

    def forward(self, x: Tensor) -> ModelOutput:
        h = self.layers(x)
        out = ModelOutput(embedding=self.loc(h))
        if self.log_var is not None:
            out["log_covariance"] = self.log_var(h)
        return out


class ConvDecoder(BaseDecoder):
    """Transposed convolutions with batch statistics, and no sigmoid at the end."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, 64),
            nn.Unflatten(1, (4, 4, 4)),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1),
        )

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.layers(z))


def build(name: str, *, dim: int = 3, conv: bool = False, **config: Any) -> Any:
    """A new model in evaluation mode, its batch statistics moved by a few forward passes."""
    cls = getattr(zoo, name)
    made = getattr(zoo, f"{name}_Config", None) or getattr(zoo, f"{name}Config")
    if name == "VAMP":
        config.setdefault("number_components", 5)
    networks = {}
    if conv:
        networks["encoder"] = ConvEncoder(dim, variational=name not in CODES)
        networks["decoder"] = ConvDecoder(dim)
    model = cls(model_config=made(input_dim=SHAPE, latent_dim=dim, **config), **networks)
    for _ in range(20 if conv else 0):
        model.decoder(model.encoder(torch.rand(30, *SHAPE))["embedding"])
    return model.eval().requires_grad_(True)


def source_of(name: str, **options: Any) -> Any:
    """A source with a prior that can be drawn from."""
    source = PythaeSource(build(name, **options), noise=0.2 if name in CODES else None)
    if isinstance(source.prior, NoPrior):
        source = rebase(source, fit_gaussian(latents_of(source, torch.rand(50, *SHAPE))))
    return source


@pytest.mark.parametrize("name", (*VARIATIONAL, *CODES))
def test_sources_with_the_default_networks_keep_the_laws(name: str) -> None:
    check_source(source_of(name), torch.rand(4, *SHAPE))


@pytest.mark.parametrize("name", ("VAE", "BetaVAE", "VAMP", *CODES))
def test_sources_with_convolutions_and_batch_statistics_keep_the_laws(name: str) -> None:
    check_source(source_of(name, conv=True), torch.rand(4, *SHAPE))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_sources_of_other_dtypes_keep_the_laws(dtype: torch.dtype) -> None:
    for name in ("VAE", "VAMP"):
        model = build(name).to(dtype)
        check_source(PythaeSource(model), torch.rand(4, *SHAPE))


def test_ms_ssim_keeps_the_laws() -> None:
    shape = (1, 11, 11)  # its window
    model = zoo.MSSSIM_VAE(zoo.MSSSIM_VAEConfig(input_dim=shape, latent_dim=3)).eval()
    check_source(PythaeSource(model), torch.rand(4, *shape))


def test_a_walk_is_pythaes_own_forward_pass_bit_for_bit() -> None:
    model, x = build("VAE", conv=True), torch.rand(6, *SHAPE)
    torch.manual_seed(1)
    theirs = model(DatasetOutput(data=x))
    torch.manual_seed(1)
    (z,), state = sample_posterior(PythaeSource(model), x)
    assert torch.equal(z, theirs.z)
    assert torch.equal(PythaeSource(model).decode(state), theirs.recon_x)


@pytest.mark.parametrize("loss", ("mse", "bce"))
def test_the_likelihood_is_the_reconstruction_loss(loss: str) -> None:
    model, x = build("VAE", reconstruction_loss=loss), torch.rand(6, *SHAPE)
    x = x.round() if loss == "bce" else x
    torch.manual_seed(1)
    theirs = model(DatasetOutput(data=x))
    torch.manual_seed(1)
    source = PythaeSource(model)
    _, state = sample_posterior(source, x)
    log_p = source.likelihood(state).log_prob(x)
    constant = 0.5 * x[0].numel() * torch.tensor(2 * torch.pi).log() if loss == "mse" else 0.0
    assert log_p.shape == (6,)
    torch.testing.assert_close(-log_p.mean(), theirs.recon_loss + constant)


def test_importance_weighted_log_likelihood_is_pythaes_own() -> None:
    model, x = build("VAE", reconstruction_loss="bce"), torch.rand(3, *SHAPE).round()
    source, draws = PythaeSource(model), 200
    torch.manual_seed(1)
    with torch.no_grad():
        theirs = model.get_nll(x, n_samples=draws, batch_size=draws)  # mean log p(x), not negated
    torch.manual_seed(1)
    ours = []
    with torch.no_grad():
        for row in x:
            rows = row.expand(draws, *SHAPE)
            (z,), state = sample_posterior(source, rows)
            group = source.group(source.start(draws, source.encode(rows)))
            log_w = source.likelihood(state).log_prob(rows) + group.prior.log_prob(z)
            ours.append((log_w - posterior_of(group).log_prob(z)).logsumexp(0))
    mean = torch.stack(ours).mean() - torch.tensor(float(draws)).log()
    torch.testing.assert_close(mean, torch.tensor(theirs, dtype=mean.dtype), rtol=1e-5, atol=0)


def test_the_prior_of_a_vamp_is_its_mixture_over_pseudo_inputs() -> None:
    model, z = build("VAMP", conv=True, dim=4), torch.randn(7, 4)
    p = PythaeSource(model).prior
    with torch.no_grad():  # pythae's own lacks the constant
        theirs = model._log_p_z(z) - 2 * torch.tensor(2 * torch.pi).log()
    torch.testing.assert_close(p.log_prob(z), theirs)
    draws = p.sample((20_000,))
    error = 4 * draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - p.mean).abs() < error).all()


def test_making_a_vamps_prior_leaves_the_model_as_it_was() -> None:
    model = build("VAMP", conv=True)
    before = everything(model)
    prior = PythaeSource(model).prior
    assert everything(model) == before
    assert not prior.loc.requires_grad


def test_a_code_is_the_mean_and_the_noise_the_scale() -> None:
    model, x = build("RAE_L2"), torch.rand(5, *SHAPE)
    source = PythaeSource(model, noise=0.3)
    q = posterior_of(source.group(source.start(5, source.encode(x))))
    torch.testing.assert_close(q.mean, model.encoder(x)["embedding"])
    torch.testing.assert_close(q.stddev, torch.full((5, 3), 0.3))
    assert torch.equal(latents_of(source, x, of="means"), model.encoder(x)["embedding"])


@pytest.mark.parametrize("name", ("WAE_MMD", "VAE"))
def test_the_prior_that_a_model_was_trained_with_is_kept(name: str) -> None:
    prior = source_of(name).prior
    assert torch.equal(prior.mean, torch.zeros(3))
    assert torch.equal(prior.stddev, torch.ones(3))


@pytest.mark.parametrize("name", ("AE", "RAE_L2", "RAE_GP"))
def test_a_model_without_a_prior_says_how_to_fit_one(name: str) -> None:
    source, x = PythaeSource(build(name), noise=0.1), torch.rand(40, *SHAPE)
    with pytest.raises(
        ValueError, match=rf"{name} has no prior. Fit one: rebase\(source, fit_mix"
    ):
        NCPrior.for_source(source, x)
    rebased = rebase(source, fit_gaussian(latents_of(source, x)))
    assert NCPrior(rebased, MLPHead((3,))).nce_loss(x).shape == (1,)


def test_pythaes_fitted_sampler_is_a_base() -> None:
    model, x = build("RAE_L2"), torch.rand(60, *SHAPE)
    x[0, 0, 0, 0] = 1.0  # its fit wants a pixel of 1
    sampler = GaussianMixtureSampler(model, GaussianMixtureSamplerConfig(n_components=2))
    sampler.fit(x)
    source = rebase(PythaeSource(model, noise=0.1), GaussianMixture.from_sklearn(sampler.gmm))
    z = torch.randn(9, 3)
    theirs = torch.from_numpy(sampler.gmm.score_samples(z.numpy())).float()
    p = source.group(source.start(9)).prior
    torch.testing.assert_close(p.log_prob(z), theirs, rtol=1e-4, atol=1e-3)
    check_source(source, x[:4])


@pytest.mark.parametrize(
    "pack",
    (
        lambda x: {"labels": torch.zeros(len(x)), "data": x},
        lambda x: DatasetOutput(data=x),
        lambda x: (x, torch.zeros(len(x))),
    ),
)
def test_batches_are_taken_as_loaders_yield_them(pack: Callable[[Tensor], Any]) -> None:
    source, x = source_of("VAE"), torch.rand(4, *SHAPE)
    plain, packed = source.encode(x), source.encode(pack(x))
    assert torch.equal(plain.posterior["Normal"]["loc"], packed.posterior["Normal"]["loc"])
    assert torch.equal(source.observed(pack(x)), x)


def test_heads_train_on_pythaes_own_data_set() -> None:
    model = build("VAE", conv=True)
    before = everything(model)
    data = BaseDataset(torch.rand(60, *SHAPE), torch.zeros(60))
    prior = NCPrior(PythaeSource(model), MLPHead((3,), width=16))
    loader = torch.utils.data.DataLoader(data, batch_size=20)
    with pytest.warns(UserWarning, match="held out"):
        fit(prior, loader, steps=5, progress=False)
    assert everything(model) == before


@pytest.mark.parametrize("name", ("VAE", "VAMP", "RAE_L2"))
def test_a_model_loaded_from_a_folder_is_the_same_source(name: str, tmp_path: Path) -> None:
    model, x = build(name), torch.rand(4, *SHAPE)
    model.save(str(tmp_path))
    sources = []
    for each in (model, zoo.AutoModel.load_from_folder(str(tmp_path)).eval()):
        sources.append(PythaeSource(each, noise=0.2 if name in CODES else None))
    first, second = (source.encode(x).posterior["Normal"]["loc"] for source in sources)
    assert torch.equal(first, second)
    assert sources[0].fingerprint() == sources[1].fingerprint()


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_work_refuse_and_say_why(name: str) -> None:
    with pytest.raises(ValueError, match=f"A {name} cannot be wrapped: .*{REFUSED[name]}"):
        PythaeSource(build(name))


def test_subclasses_are_known_by_their_family() -> None:
    class Mine(zoo.VAE):
        pass

    class Quantised(zoo.VQVAE):
        pass

    config = zoo.VAEConfig(input_dim=SHAPE, latent_dim=3)
    check_source(PythaeSource(Mine(config).eval()), torch.rand(4, *SHAPE))
    with pytest.raises(ValueError, match="VQVAE"):
        PythaeSource(Quantised(zoo.VQVAEConfig(input_dim=SHAPE, latent_dim=3)).eval())


def test_a_model_that_did_not_load_is_told() -> None:
    with pytest.raises(TypeError, match="load_from_hf_hub.*allow_pickle=True"):
        PythaeSource(None)  # type: ignore[arg-type]


def test_other_modules_are_sent_to_single_group() -> None:
    with pytest.raises(TypeError, match="got an object of type Linear.*SingleGroup"):
        PythaeSource(nn.Linear(1, 1).eval())


@pytest.mark.parametrize("noise", (None, 0.0, -1.0, float("nan"), float("inf"), "a", True))
def test_F35_deterministic_codes_need_a_stated_noise(noise: Any) -> None:
    message = "AE encodes x as one code.*noise=|noise must be a number"
    with pytest.raises((TypeError, ValueError), match=message):
        PythaeSource(build("AE"), noise=noise)


@pytest.mark.parametrize("wrong", [zoo.VAE, 3, "vae", nn.Linear(1, 1)])
def test_F32_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes a VAE or an AE of pythae; got .*SingleGroup"):
        PythaeSource(wrong)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_F32_bytes_are_refused(loss: str) -> None:
    source, x = PythaeSource(build("VAE", reconstruction_loss=loss)), torch.rand(4, *SHAPE)
    for data in ((255 * x).byte(), (255 * x).numpy().astype("uint8"), 255 * x, (255 * x).long()):
        for batch in (data, (data, torch.ones(4)), {"data": data}):
            with pytest.raises(ValueError, match="VAE takes x .*got .* x / 255 for bytes"):
                source.encode(batch)
            with pytest.raises(ValueError, match="VAE takes x .*got .* x / 255 for bytes"):
                latents_of(source, [batch])
    with pytest.raises(ValueError, match="x must be finite; got NaN or infinity in 1 of 4 rows"):
        source.encode(x.index_fill(0, torch.tensor([2]), torch.nan))


def test_F25_arrays_are_data() -> None:
    source, x = PythaeSource(build("VAE")), torch.rand(4, *SHAPE)
    expected = source.encode(x).posterior["Normal"]["loc"]
    for array in (x.numpy(), x.double().numpy()):
        assert torch.equal(source.encode(array).posterior["Normal"]["loc"], expected)
    with pytest.raises(TypeError, match="x must be a tensor or an array"):
        source.encode("x")


def test_W4_x_and_z_take_the_dtypes_of_encoder_and_decoder() -> None:
    model, x = build("VAE"), torch.rand(4, *SHAPE)
    decoded = PythaeSource(model).module.decoder(torch.ones(4, 3))["reconstruction"]
    model.register_parameter("codes", nn.Parameter(torch.arange(5), requires_grad=False))
    model._parameters = dict(sorted(model._parameters.items()))  # the first parameter
    source = PythaeSource(model)
    state = source.start(4, source.encode(x))
    assert torch.equal(source.decode(source.advance(state, torch.ones(4, 3))), decoded)
    model.encoder.to(torch.bfloat16)
    _, state = sample_posterior(PythaeSource(model), x)
    assert torch.isfinite(PythaeSource(model).decode(state)).all()


def test_noise_is_for_deterministic_codes_alone() -> None:
    with pytest.raises(ValueError, match="VAE has a posterior of its own: leave out noise=0.1"):
        PythaeSource(build("VAE"), noise=0.1)


@pytest.mark.parametrize(
    ("name", "reason"),
    (("RAE_L2", "encoder is deterministic"), ("VAEGAN", "features of a discriminator")),
)
def test_models_without_a_density_of_x_say_why(name: str, reason: str) -> None:
    source = source_of(name)
    _, state = sample_posterior(source, torch.rand(4, *SHAPE))
    with pytest.raises(ValueError, match=f"{name} knows no p.*{reason}"):
        source.likelihood(state)


def test_training_mode_is_refused() -> None:
    model, x = build("VAMP", conv=True), torch.rand(4, *SHAPE)
    source = PythaeSource(model)
    encoding = source.encode(x)
    model.encoder.layers[1].train()
    for call in (
        lambda: PythaeSource(model),
        lambda: source.encode(x),
        lambda: source.start(4, encoding),
    ):
        with pytest.raises(ValueError, match=r"layers\.1 is in training mode"):
            call()


@pytest.mark.parametrize("shape", ((4, 8, 8), (4, 1, 16, 4), (4, 64)))
def test_x_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"VAE takes x of shape \(B, 1, 8, 8\); got"):
        source_of("VAE").encode(torch.rand(shape))


def test_a_dict_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"item 'data' of a batch; got the items \['image'\]"):
        source_of("VAE").encode({"image": torch.rand(4, *SHAPE)})


def test_an_encoder_without_log_covariance_is_refused() -> None:
    model = build("VAE", conv=True)
    model.encoder.log_var = None
    with pytest.raises(ValueError, match=r"must return 'log_covariance'.*only \['embedding'\]"):
        PythaeSource(model).encode(torch.rand(4, *SHAPE))


def test_an_embedding_of_another_shape_is_refused() -> None:
    model = build("VAE")
    model.latent_dim = 5
    with pytest.raises(
        ValueError, match=r"'embedding' of shape \(4, 5\); got one of shape \(4, 3"
    ):
        PythaeSource(model).encode(torch.rand(4, *SHAPE))


def test_gradients_reach_x_through_posterior_and_decoder() -> None:
    source, x = source_of("VAE"), torch.rand(4, *SHAPE, requires_grad=True)
    z = posterior_of(source.group(source.start(4, source.encode(x)))).rsample()
    loss = source.decode(source.advance(source.start(4), z)).sum()
    assert torch.autograd.grad(loss, x)[0].abs().sum() > 0


def test_an_adversarial_autoencoder_without_its_noise_needs_one() -> None:
    """Its log-variances were never trained."""
    model = build("Adversarial_AE", deterministic_posterior=True)
    with pytest.raises(ValueError, match="encodes x as one code without noise"):
        PythaeSource(model)
    source = PythaeSource(model, noise=0.2)
    x = torch.rand(4, *SHAPE)
    posterior = source.group(source.start(4, source.encode(x))).posterior
    assert posterior is not None and torch.equal(posterior.stddev, torch.full((4, 3), 0.2))
    assert source.prior.sample().shape == (3,)  # N(0, I), to which it was trained
    with pytest.raises(ValueError, match="encoder is deterministic"):
        source.likelihood(sample_posterior(source, x)[1])
