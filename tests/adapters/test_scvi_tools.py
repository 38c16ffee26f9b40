"""Sources of the models of scvi-tools itself: the laws of a source, and the library's own numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toys import everything
from torch import Tensor

from ncprior import NCPrior, fit, sir
from ncprior.adapters.scvi import SCVISource
from ncprior.heads.networks import MLPHead
from ncprior.source import posterior_of, sample_posterior
from ncprior.testing import check_source

scvi = pytest.importorskip("scvi")
pytestmark = pytest.mark.filterwarnings("ignore")  # its warnings are its own


def cells(count: int = 96, genes: int = 20, batches: int = 2) -> Any:
    """An AnnData of Poisson counts."""
    anndata, pandas = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    torch.manual_seed(0)
    adata = anndata.AnnData(1 + torch.poisson(torch.full((count, genes), 3.0)).numpy())
    adata.obs["batch"] = [f"b{i % batches}" for i in range(count)]
    adata.obs["label"] = [("A", "B", "C", "?")[i % 4] for i in range(count)]
    adata.obs["depth"] = torch.rand(count).numpy()
    adata.obs["size"] = 10 + torch.rand(count).numpy()
    adata.obs["donor"] = [f"d{i % 3}" for i in range(count)]
    proteins = torch.poisson(torch.full((count, 7), 5.0)).numpy()
    adata.obsm["proteins"] = pandas.DataFrame(proteins, index=adata.obs_names).add_prefix("p")
    return adata


def real(
    adata: Any, *, kind: str = "SCVI", setup: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A model of scvi-tools, trained for one epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = getattr(scvi.model, kind)
        needed: dict[str, Any] = {
            "SCANVI": {"labels_key": "label", "unlabeled_category": "?"},
            "TOTALVI": {"protein_expression_obsm_key": "proteins"},
        }.get(kind, {})
        cls.setup_anndata(adata, **needed, **({"batch_key": "batch"} if setup is None else setup))
        model = cls(adata, **{"n_latent": 4, "n_hidden": 16, **options})
        model.train(max_epochs=1, enable_progress_bar=False, accelerator="cpu")
    return model


def minified(model: Any) -> Any:
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = (
        model.get_latent_representation(return_dist=True)
    )
    model.minify_adata()
    return model


def batch_of(source: Any, count: int = 5) -> dict[str, Tensor]:
    """The first cells."""
    return next(iter(source.loader(batch_size=count)))


COVARIATES = {
    "batch_key": "batch",
    "labels_key": "donor",
    "continuous_covariate_keys": ["depth"],
    "categorical_covariate_keys": ["donor"],
}


def models() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and makers of models."""
    for likelihood, latent in product(("nb", "zinb", "poisson", "normal"), ("normal", "ln")):
        options = {"gene_likelihood": likelihood, "latent_distribution": latent}
        yield f"{likelihood}-{latent}", lambda o=options: real(cells(), **o)
    yield "one batch", lambda: real(cells(batches=1))
    for options in (
        {"dispersion": "gene-batch"},
        {"encode_covariates": True},
        {"use_observed_lib_size": False},
    ):
        yield f"{options}", lambda o=options: real(cells(), **o)
    yield "size factors", lambda: real(cells(), setup={"size_factor_key": "size"})
    deep = {"dispersion": "gene-label", "encode_covariates": True}
    yield "covariates", lambda: real(cells(), setup=COVARIATES, **deep)
    yield "minified", lambda: minified(real(cells()))
    yield "LinearSCVI", lambda: real(cells(), kind="LinearSCVI")
    yield (
        "LinearSCVI, minified",
        lambda: minified(real(cells(), kind="LinearSCVI", use_observed_lib_size=True)),
    )
    yield "SCANVI", lambda: real(cells(), kind="SCANVI")
    yield "SCANVI, minified", lambda: minified(real(cells(), kind="SCANVI"))
    for options in ({}, {"gene_likelihood": "zinb", "use_observed_lib_size": False}):
        yield f"TOTALVI {options}", lambda o=options: real(cells(), kind="TOTALVI", **o)
    yield "TOTALVI, minified", lambda: minified(real(cells(), kind="TOTALVI"))
    for options in ({}, {"model_depth": False, "region_factors": False}):
        yield f"PEAKVI {options}", lambda o=options: real(cells(), kind="PEAKVI", **o)


MODELS = dict(models())


@pytest.mark.parametrize("name", MODELS)
def test_scvi_tools_keeps_the_laws(name: str) -> None:
    source = SCVISource(MODELS[name]())
    x = batch_of(source)
    check_source(source, x, condition=source.condition(x))


@pytest.mark.parametrize("latent", ("normal", "ln"))
def test_scvi_tools_own_numbers_come_out(latent: str) -> None:
    model = real(cells(), latent_distribution=latent)
    source, module = SCVISource(model), model.module
    x = batch_of(source, 30)
    with torch.no_grad():
        inferred = module.inference(**module._get_inference_input(x))
        made = module.generative(**module._get_generative_input(x, inferred))
        loss = module.loss(x, inferred, made)
        encoding = source.encode(x)
        q = posterior_of(source.group(source.start(30, encoding)))
        assert torch.equal(q.mean, inferred["qz"].loc)
        assert torch.equal(encoding.condition["library"], inferred["library"])
        if latent == "normal":
            state = source.advance(source.start(30, encoding), inferred["z"])
            log_p = source.likelihood(state).log_prob(x["X"])
            (theirs,) = loss.reconstruction_loss.values()
            torch.testing.assert_close(-log_p, theirs)
            assert torch.equal(source.decode(state), made["px"].mean)


def test_scanvis_own_posterior_and_prior() -> None:
    """The terms of SCANVI's loss, for the label of every cell."""
    model = real(cells(), kind="SCANVI")
    source, module = SCVISource(model), model.module
    x = {name: t[:3] for name, t in batch_of(source).items()}
    with torch.no_grad():
        encoding = source.encode(x)
        z1 = encoding.q["z"]["drawn"]
        state = source.start(3, encoding)
        z2 = posterior_of(source.group(state)).sample()
        theirs = module.encoder_z2_z1(z1, x["labels"])[0]
        ours = posterior_of(source.group(state))
        torch.testing.assert_close(ours.log_prob(z2), theirs.log_prob(z2).sum(1))
        group = source.group(source.advance(state, z2))
        mean, variance = module.decoder_z1_z2(z2, x["labels"])
        prior = torch.distributions.Normal(mean, variance.sqrt())
        torch.testing.assert_close(group.prior.log_prob(z1), prior.log_prob(z1).sum(1))
        assert torch.equal(posterior_of(group).sample(), z1)


@pytest.mark.parametrize("likelihood", ("nb", "zinb"))
def test_totalvis_own_genes_and_proteins(likelihood: str) -> None:
    model = real(cells(), kind="TOTALVI", gene_likelihood=likelihood)
    source, module = SCVISource(model), model.module
    x = batch_of(source)
    with torch.no_grad():
        (z,), state = sample_posterior(source, x)
        law = source.likelihood(state)
        inferred = {"z": z, "library_gene": x["X"].sum(1, keepdim=True)}
        made = module.generative(**module._get_generative_input(x, inferred))
        genes, _ = module.get_reconstruction_loss(
            x["X"], x["proteins"], made["px_"], made["py_"], None, made["per_batch_efficiency"]
        )
        both = torch.cat([x["X"], x["proteins"]], 1)
        proteins = law.proteins.log_prob(x["proteins"])
        torch.testing.assert_close(law.genes.log_prob(x["X"]).sum(1), -genes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(law.log_prob(both), proteins.sum(1) - genes)
        y, efficiency = made["py_"], made["per_batch_efficiency"]
        noise = torch.randn(4000, *y["back_alpha"].shape)
        back = efficiency * (y["back_alpha"] + y["back_beta"] * noise).exp()
        theirs = scvi.distributions.NegativeBinomialMixture(
            mu1=back, mu2=back * y["fore_scale"], theta1=y["r"], mixture_logits=y["mixing"]
        )
        chance = theirs.log_prob(x["proteins"]).exp()
        error = 6 * chance.std(0) / len(chance) ** 0.5
        assert ((proteins.exp() - chance.mean(0)).abs() < error).all()


def test_peakvis_own_regions() -> None:
    adata = cells()
    adata.X = (adata.X > 4).astype(np.float32)
    model = real(adata, kind="PEAKVI")
    source, module = SCVISource(model), model.module
    x = batch_of(source)
    with torch.no_grad():
        inferred = module.inference(**module._get_inference_input(x))
        made = module.generative(**module._get_generative_input(x, inferred))
        loss = module.loss(x, inferred, made)
        state = source.advance(source.start(5, condition=source.condition(x)), inferred["z"])
        (theirs,) = loss.reconstruction_loss.values()
        torch.testing.assert_close(-source.likelihood(state).log_prob(x["X"]), theirs)


@pytest.mark.parametrize("kind", ("SCVI", "SCANVI", "TOTALVI"))
def test_minified_models_decode_as_the_models_of_the_counts(kind: str) -> None:
    model = real(cells(), kind=kind)
    full = SCVISource(model)
    x = batch_of(full)
    want, condition = full.encode(x), full.condition(x)
    source = SCVISource(minified(model))
    stored = batch_of(source)
    assert not stored["X"].any()
    got = source.encode(stored)
    for name in ("loc", "scale"):
        torch.testing.assert_close(
            got.q["z"][name], want.q["z"][name].detach(), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(source.condition(stored)["library"], condition["library"])
    assert source.fingerprint() == full.fingerprint()


def test_minified_models_come_back_from_disk(tmp_path: Path) -> None:
    model = minified(real(cells()))
    model.save(tmp_path / "model", save_anndata=True)
    loaded = SCVISource(scvi.model.SCVI.load(tmp_path / "model", accelerator="cpu"))
    assert loaded.fingerprint() == SCVISource(model).fingerprint()
    prior = NCPrior.for_source(loaded, batch_of(loaded, 64), width=16)
    fit(prior, loaded.loader(shuffle=True), held_out=loaded.loader(), steps=3, progress=False)
    condition = loaded.condition(batch_of(loaded, 20), batch="b1")
    sampler = partial(sir, num_proposals=5)
    assert prior.sample(20, sampler, condition=condition, draw_x=True).x.sum() > 0


def test_held_out_cells_are_loaded_and_the_model_stays() -> None:
    adata = cells(120)
    model = real(adata[:100].copy())
    source = SCVISource(model)
    before = everything(model.module)
    prior = NCPrior(source, MLPHead((4,), context_shape=(3,), width=16))
    held_out = source.loader(adata[100:].copy())
    fit(prior, source.loader(shuffle=True), held_out=held_out, steps=5, progress=False)
    condition = source.condition(next(iter(held_out)))
    assert prior.sample(20, partial(sir, num_proposals=5), condition=condition).x.shape == (20, 20)
    assert everything(model.module) == before


def test_models_and_cells_that_cannot_work_are_refused(tmp_path: Path) -> None:
    adata = cells()
    scvi.model.SCVI.setup_anndata(adata)
    with pytest.raises(ValueError, match="not trained"):
        SCVISource(scvi.model.SCVI(adata))
    model = real(cells())
    with pytest.raises(TypeError, match=r"scvi\.model\.SCVI, .*got an object of type VAE"):
        SCVISource(model.module)
    source = SCVISource(model)
    for wrong in (cells(genes=19), cells(batches=3)):
        with pytest.raises(ValueError, match="do not fit the model. Pass cells with the genes"):
            source.loader(wrong)
    fractions = cells()
    fractions.X = np.log1p(fractions.X)
    with pytest.raises(ValueError, match="SCVI is a model of whole numbers.*layer="):
        source.encode(next(iter(source.loader(fractions))))
    with pytest.raises(ValueError, match="do not fit the model. The model is minified"):
        SCVISource(minified(real(cells()))).loader(cells(40))
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"without its cells.*adata="):
        SCVISource(scvi.model.SCVI.load(tmp_path / "model", adata=False, accelerator="cpu"))
