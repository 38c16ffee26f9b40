"""NCPSampler in the place of pythae's own samplers: its pipeline, its arguments, its files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toys import everything
from imageio.v2 import imread
from pythae.data.datasets import BaseDataset
from pythae.models import AE, VAE, VQVAE, AEConfig, VAEConfig, VQVAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.pipelines import GenerationPipeline
from pythae.samplers import BaseSampler, NormalSampler
from pythae.trainers import BaseTrainerConfig
from torch import Tensor, nn

from ncprior import NCPrior
from ncprior.adapters.pythae import NCPSampler, PythaeSource

SHAPE = (1, 4, 4)
SCALE = 0.1  # of q(z | x)
BRIEFLY: dict[str, Any] = {"max_seconds": 0.05, "progress": False}


@pytest.fixture(autouse=True)
def few_held_out_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncprior.training.held_out._HELD_OUT_DRAWS", 32)


class Encoder(BaseEncoder):
    """The inverse of the decoder, with a small scale."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.linalg.pinv(weight))

    def forward(self, x: Tensor) -> ModelOutput:
        code = x.flatten(1).clamp(1e-4, 1 - 1e-4).logit() @ self.inverse.T
        log_var = torch.full_like(code, 2 * np.log(SCALE))
        return ModelOutput(embedding=code, log_covariance=log_var)


class Decoder(BaseDecoder):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=(z @ self.weight.T).sigmoid().unflatten(1, SHAPE))


def model(kind: Any = VAE, config: Any = VAEConfig) -> Any:
    weight = torch.randn(16, 2, generator=torch.Generator().manual_seed(3)) / 2
    settings = config(input_dim=SHAPE, latent_dim=2)
    return kind(settings, encoder=Encoder(weight), decoder=Decoder(weight))


def data(of: Any, rows: int = 100) -> Tensor:
    """Images of two clusters of codes, at -1 and 1 of the first latent."""
    signs = torch.randint(2, (rows, 1)) * 2.0 - 1
    z = torch.cat([signs, torch.zeros(rows, 1)], 1) + 0.2 * torch.randn(rows, 2)
    return of.decoder(z)["reconstruction"]


def first_codes(of: Any, x: Tensor) -> Tensor:
    return of.encoder(x)["embedding"][:, 0]


def fitted(of: Any, **options: Any) -> Any:
    return NCPSampler(of, **{**BRIEFLY, **options}).fit(data(of, 400))


@pytest.fixture(scope="module")
def sampler() -> Any:
    return fitted(model())


def test_it_is_a_sampler_of_pythae() -> None:
    sampler = NCPSampler(model())
    assert isinstance(sampler, BaseSampler) and isinstance(sampler, NCPSampler)
    assert type(sampler) is type(NCPSampler(model()))
    assert not sampler.is_fitted and not sampler.model.training


def test_it_draws_between_the_clusters_less_often_than_the_models_own_prior() -> None:
    vae = model()
    ours = NCPSampler(vae, max_seconds=3, progress=False).fit(data(vae, 400)).sample(2000)
    theirs = NormalSampler(vae).sample(2000)
    gap, base = ((first_codes(vae, x).abs() < 0.3).float().mean() for x in (ours, theirs))
    assert gap < 0.05 < base


def test_a_pipeline_accepts_it_and_draws_again() -> None:
    vae = model()
    pipeline = GenerationPipeline(vae)
    pipeline.sampler = NCPSampler(vae, **BRIEFLY)
    x = pipeline(num_samples=7, batch_size=3, train_data=data(vae), eval_data=data(vae, 50))
    assert x.shape == (7, *SHAPE) and not x.requires_grad
    prior = pipeline.sampler.prior
    assert pipeline(num_samples=2).shape == (2, *SHAPE) and pipeline.sampler.prior is prior
    assert pipeline(num_samples=2, return_gen=False) is None


def test_images_and_heads_are_written(sampler: Any, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    x = sampler.sample(5, 2, output_dir=str(folder), save_sampler_config=True)
    names = [f"{i:08d}.png" for i in range(5)]
    assert sorted(path.name for path in folder.glob("*.png")) == names
    written = np.stack([imread(folder / name)[..., 0] for name in names])
    assert (written == (255 * x[:, 0].numpy()).astype("uint8")).all()
    assert json.loads((folder / "sampler_config.json").read_text())
    loaded = NCPrior.from_pretrained(PythaeSource(sampler.model), folder)
    z = torch.randn(4, 2)
    assert torch.equal(loaded.log_ratio([z]), sampler.prior.log_ratio([z]))


def test_pixels_out_of_range_are_clipped_in_files_alone(
    sampler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = lambda z: ModelOutput(reconstruction=3 * z[:, :1, None, None] - 1)
    monkeypatch.setattr(sampler.model.decoder, "forward", wide)
    x = sampler.sample(20, output_dir=tmp_path)
    written = torch.tensor([int(imread(path).flat[0]) for path in sorted(tmp_path.glob("*.png"))])
    assert x.min() < 0 and x.max() > 1
    assert torch.equal(written, (255 * x.clamp(0, 1)).flatten().long())


def test_the_model_stays_as_it_was_and_a_seed_repeats_the_draws() -> None:
    vae = model().eval()
    before = everything(vae)
    sampler, drawn = fitted(vae), []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(sampler.sample(30, 20))
    assert torch.equal(*drawn) and everything(vae) == before


@pytest.mark.parametrize("pack", [Tensor.numpy, lambda x: BaseDataset(x, torch.ones(len(x)))])
def test_data_of_pythae_are_taken(pack: Any) -> None:
    vae = model()
    x = data(vae)
    assert NCPSampler(vae, **BRIEFLY).fit(pack(x), pack(x[:50])).is_fitted


def test_deterministic_codes_get_a_base_and_need_their_noise() -> None:
    ae = model(AE, AEConfig)
    with pytest.raises(ValueError, match="AE encodes x as one code.*pass noise="):
        NCPSampler(ae)
    assert ae.training  # untouched
    x = fitted(ae, noise=0.1, max_seconds=3).sample(200)
    assert (first_codes(ae, x).abs() < 0.3).float().mean() < 0.1
    with pytest.raises(ValueError, match="leave out noise=0.1"):
        NCPSampler(model(), noise=0.1)


@pytest.mark.parametrize("wrong", [nn.Linear(1, 1), None, VAE])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"VAE or an AE of pythae|The model is None"):
        NCPSampler(wrong)


def test_models_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="A VQVAE cannot be wrapped: .*codes of a codebook"):
        NCPSampler(VQVAE(VQVAEConfig(input_dim=(1, 8, 8), latent_dim=3)))


@pytest.mark.parametrize(
    "options", [{"budget": 0}, {"budget": 1}, {"max_seconds": -1.0}, {"progress": 1}]
)
def test_wrong_options_are_refused_before_the_model_changes(options: Any) -> None:
    vae = model()
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))} must be"):
        NCPSampler(vae, **options)
    assert vae.training


def test_calls_in_the_wrong_order_say_what_to_do(tmp_path: Path) -> None:
    vae = model()
    sampler: Any = NCPSampler(vae, **BRIEFLY)
    for call in (sampler.sample, lambda: sampler.save(tmp_path)):
        with pytest.raises(RuntimeError, match=r"Call fit\(train_data\)"):
            call()
    with pytest.raises(TypeError, match="train_data must be data.*got None"):
        sampler.fit(None)
    with pytest.raises(TypeError, match="training_config must be None: .*pythae's flows"):
        sampler.fit(data(vae), training_config=BaseTrainerConfig())
    assert sampler.prior is None


def test_wrong_arguments_of_sample_are_refused(
    sampler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in (
        ({"num_samples": 0}, "num_samples must be"),
        ({"batch_size": 2.0}, "batch_size must be"),
        ({"return_gen": 1}, "return_gen must be"),
        ({"save_sampler_config": True}, "save_sampler_config needs output_dir"),
        ({"output_dir": 3}, "output_dir must be of type str or PathLike"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            sampler.sample(**arguments)
    as_they_are = lambda z: ModelOutput(reconstruction=z)
    monkeypatch.setattr(sampler.model.decoder, "forward", as_they_are)
    with pytest.raises(ValueError, match=r"images of 1 or 3 channels; the samples have .*\(2,\)"):
        sampler.sample(output_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "copied", (copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)))
)
def test_it_is_copied_and_pickled_as_pythaes_own_samplers_are(copied: Any) -> None:
    sampler = fitted(model())
    for one in (NCPSampler(model()), sampler):
        other = copied(one)
        assert type(other) is type(one) and isinstance(other, BaseSampler)
        assert other.options == one.options and other.is_fitted == one.is_fitted
    torch.manual_seed(0)
    x = sampler.sample(5)
    torch.manual_seed(0)
    assert torch.equal(x, other.sample(5))
