"""scVI models as sources: the laws of a source, the model's own numbers, and refusals by name.

On a stand-in with the same attributes; and on scvi-tools itself where it is installed.
"""

from __future__ import annotations

import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scvi_standin import SCVI
from helpers.toys import everything
from torch import Tensor

from ncprior import NCPrior, fit, sir
from ncprior.adapters.scvi import SCVISource
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture_em import fit_gaussian
from ncprior.bases.rebase import rebase
from ncprior.heads.networks import MLPHead
from ncprior.source import posterior_of, sample_posterior
from ncprior.testing import check_source


def batch_of(source: Any, count: int = 5) -> dict[str, Tensor]:
    """The first cells."""
    return next(iter(source.loader(batch_size=count)))


@pytest.mark.parametrize(
    ("likelihood", "batches", "latent"),
    [*product(("nb", "poisson"), (1, 2), ("normal", "ln"))],
)
def test_sources_keep_the_laws(likelihood: str, batches: int, latent: str) -> None:
    source = SCVISource(SCVI(likelihood=likelihood, batches=batches, latent=latent))
    x = batch_of(source)
    check_source(source, x, condition=source.condition(x))


def test_covariates_are_part_of_the_condition() -> None:
    source = SCVISource(SCVI(dispersion="gene-label", size_factor=True))
    x = batch_of(source)
    condition = source.condition(x)
    assert set(condition) == {"library", "batch", "labels", "size_factor"}
    check_source(source, x, condition=condition)
    for name in condition:
        rest = {key: t for key, t in condition.items() if key != name}
        with pytest.raises(ValueError, match=f"missing: {name}"):
            source.start(5, condition=rest)


def test_the_context_is_the_batch_one_hot_where_there_are_several() -> None:
    for batches in (1, 2):
        source = SCVISource(SCVI(batches=batches))
        x = batch_of(source)
        for state in (
            source.start(5, source.encode(x)),
            source.start(5, condition=source.condition(x)),
        ):
            context = source.group(state).context
            if batches == 1:
                assert context is None
            else:
                assert torch.equal(context, torch.eye(2)[x["batch"][:, 0]])


def test_the_library_size_is_the_log_of_the_total_count() -> None:
    source = SCVISource(SCVI())
    x = batch_of(source)
    condition = source.condition(x)
    torch.testing.assert_close(condition["library"].exp()[:, 0], x["X"].sum(1))
    state = source.advance(source.start(5, condition=condition), torch.randn(5, 4))
    torch.testing.assert_close(source.decode(state).sum(1), x["X"].sum(1))


@pytest.mark.parametrize("latent", ("normal", "ln"))
def test_a_walk_is_the_models_own(latent: str) -> None:
    model = SCVI(latent=latent)
    source, module = SCVISource(model), model.module
    x = batch_of(source)
    inferred = module.inference(**module._get_inference_input(x))
    group = source.group(source.start(5, source.encode(x)))
    assert torch.equal(posterior_of(group).mean, inferred["qz"].loc)
    assert torch.equal(posterior_of(group).stddev, inferred["qz"].scale)
    assert torch.equal(group.prior.mean, torch.zeros(5, 4))
    assert torch.equal(group.prior.stddev, torch.ones(5, 4))
    u = group.prior.sample()
    inferred["z"] = module.z_encoder.z_transformation(u)
    theirs = module.generative(**module._get_generative_input(x, inferred))["px"]
    state = source.advance(source.start(5, condition=source.condition(x)), u)
    torch.testing.assert_close(source.decode(state), theirs.mean)
    log_p = source.likelihood(state).log_prob(x["X"])
    torch.testing.assert_close(log_p, theirs.log_prob(x["X"]).sum(-1))


def test_counts_are_drawn_around_the_mean() -> None:
    source = SCVISource(SCVI())
    state = sample_posterior(source, batch_of(source))[1]
    law = source.likelihood(state)
    draws = law.sample((4000,))
    assert torch.equal(draws, draws.round())
    assert not draws.is_inference()
    error = 5 * draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - source.decode(state)).abs() < error).all()


def test_logistic_normal_latents_are_walked_before_their_softmax() -> None:
    source = SCVISource(SCVI(latent="ln"))
    (z,), _ = sample_posterior(source, batch_of(source))
    assert not torch.allclose(z.sum(1), torch.ones(5))


def test_loaders_are_reread_and_fit_the_heads() -> None:
    model = SCVI()
    source = SCVISource(model)
    before = everything(model.module)
    train = source.loader(indices=range(80), batch_size=20, shuffle=True)
    assert [len(b["X"]) for b in train] == [len(b["X"]) for b in train] == [20] * 4
    prior = NCPrior(source, MLPHead((4,), context_shape=(2,), width=16))
    held_out = source.loader(indices=range(80, 100))
    history = fit(prior, train, held_out=held_out, steps=20, progress=False)
    assert history.best_loss is not None and history.best_loss[0] < 1.4
    condition = source.condition(next(iter(held_out)))
    drawn = prior.sample(20, partial(sir, num_proposals=10), condition=condition)
    assert drawn.x.shape == (20, 6)
    assert everything(model.module) == before


def test_another_set_of_cells_can_be_loaded() -> None:
    source = SCVISource(SCVI())
    cells = SCVI.cells(7, 6, 2)
    assert torch.equal(next(iter(source.loader(cells)))["X"], cells["X"])


def test_a_base_can_be_fitted() -> None:
    source = SCVISource(SCVI())
    rebased = rebase(source, fit_gaussian(latents_of(source, source.loader())))
    x = batch_of(source)
    check_source(rebased, x, condition=source.condition(x))


def test_a_walk_without_x_needs_its_condition_by_name() -> None:
    source = SCVISource(SCVI())
    with pytest.raises(
        ValueError, match=r"library, batch: .*missing: library, batch.*condition\("
    ):
        source.start(5)
    with pytest.raises(ValueError, match="missing: library"):
        source.start(5, condition={"batch": torch.zeros(5, 1, dtype=torch.long)})


@pytest.mark.parametrize("shape", ((4, 1), (5,), (5, 2)))
def test_a_condition_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    source = SCVISource(SCVI())
    condition = {**source.condition(batch_of(source)), "library": torch.ones(shape)}
    with pytest.raises(ValueError, match="walk has 5 rows, and its condition 'library' shape"):
        source.start(5, condition=condition)


@pytest.mark.parametrize("x", (torch.ones(5, 6), {"counts": torch.ones(5, 6)}))
def test_a_batch_that_is_not_the_loaders_is_refused(x: Any) -> None:
    with pytest.raises(ValueError, match=r"dict with the counts as 'X'.*source\.loader"):
        SCVISource(SCVI()).encode(x)


def test_counts_of_other_genes_are_refused() -> None:
    source = SCVISource(SCVI())
    with pytest.raises(ValueError, match=r"\(B, 6\), a column per gene; got \(5, 7\)"):
        source.encode({**batch_of(source), "X": torch.ones(5, 7)})


def test_untrained_models_are_refused() -> None:
    model = SCVI()
    model.is_trained = False
    with pytest.raises(ValueError, match=r"not trained: call model\.train\(\)"):
        SCVISource(model)


def test_minified_models_are_refused() -> None:
    model = SCVI()
    model.minified_data_type = "latent_posterior_parameters"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"minified \(latent_posterior_parameters\)"):
        SCVISource(model)


def test_latent_library_sizes_are_refused() -> None:
    model = SCVI()
    model.module.use_observed_lib_size = False
    with pytest.raises(ValueError, match="second latent.*use_observed_lib_size=True"):
        SCVISource(model)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"takes an scvi\.model\.SCVI; got .*Module"):
        SCVISource(SCVI().module)
    for wrong in (None, 3, SCVI):
        with pytest.raises(TypeError, match=r"takes an scvi\.model\.SCVI; got"):
            SCVISource(wrong)


def test_F26_counts_and_conditions() -> None:
    source = SCVISource(SCVI())
    for wrong in ({"batch_size": 2.5}, {"shuffle": 1}):
        with pytest.raises(TypeError, match="must be"):
            source.loader(**wrong)
    for condition in (3, torch.zeros(5, 1), {"library": [1.0], "batch": 0}):
        with pytest.raises(TypeError, match="must be of type .*source.condition"):
            source.start(5, condition=condition)


def test_F25_arrays_are_counts() -> None:
    source = SCVISource(SCVI())
    x = batch_of(source)
    array = {**x, "X": x["X"].numpy()}
    assert torch.equal(source.encode(array).loc, source.encode(x).loc)


def test_training_mode_is_refused() -> None:
    model = SCVI()
    source = SCVISource(model)
    x = batch_of(source)
    condition = source.condition(x)
    model.module.z_encoder.dropout.train()
    for call in (
        lambda: SCVISource(model),
        lambda: source.encode(x),
        lambda: source.start(5, condition=condition),
    ):
        with pytest.raises(ValueError, match="dropout is in training mode"):
            call()


def test_decoding_needs_z() -> None:
    source = SCVISource(SCVI())
    with pytest.raises(ValueError, match="needs z"):
        source.decode(source.start(5, condition=source.condition(batch_of(source))))


# With scvi-tools itself. Its own warnings are its own.


def cells(count: int = 120, genes: int = 20, batches: int = 2) -> Any:
    """An AnnData of Poisson counts."""
    anndata = pytest.importorskip("anndata")
    adata = anndata.AnnData(1 + torch.poisson(torch.full((count, genes), 3.0)).numpy())
    adata.obs["batch"] = [f"b{i % batches}" for i in range(count)]
    adata.obs["depth"] = torch.rand(count).numpy()
    adata.obs["size"] = 10 + torch.rand(count).numpy()
    adata.obs["donor"] = [f"d{i % 3}" for i in range(count)]
    return adata


def real(adata: Any, *, setup: dict[str, Any] | None = None, **options: Any) -> Any:
    """A model of scvi-tools, trained for one epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi = pytest.importorskip("scvi")
        scvi.model.SCVI.setup_anndata(
            adata, **({"batch_key": "batch"} if setup is None else setup)
        )
        model = scvi.model.SCVI(adata, **{"n_latent": 4, "n_hidden": 16, **options})
        quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
        model.train(max_epochs=1, **quiet)
    return model


REAL = [
    {"gene_likelihood": likelihood, "latent_distribution": latent}
    for likelihood, latent in product(("nb", "zinb", "poisson", "normal"), ("normal", "ln"))
]
REAL += [{"dispersion": "gene-batch"}, {"encode_covariates": True}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batches", (1, 2))
@pytest.mark.parametrize("options", REAL, ids=lambda options: "-".join(map(str, options.values())))
def test_scvi_tools_keeps_the_laws(options: dict[str, Any], batches: int) -> None:
    source = SCVISource(real(cells(batches=batches), **options))
    x = batch_of(source)
    check_source(source, x, condition=source.condition(x))


@pytest.mark.filterwarnings("ignore")
def test_scvi_tools_with_covariates_keeps_the_laws() -> None:
    setup = {
        "batch_key": "batch",
        "labels_key": "donor",
        "continuous_covariate_keys": ["depth"],
        "categorical_covariate_keys": ["donor"],
    }
    model = real(cells(), setup=setup, dispersion="gene-label", encode_covariates=True)
    source = SCVISource(model)
    x = batch_of(source)
    condition = source.condition(x)
    assert set(condition) == {
        "library", "batch", "labels", "extra_continuous_covs", "extra_categorical_covs"
    }  # fmt: skip
    check_source(source, x, condition=condition)


@pytest.mark.filterwarnings("ignore")
def test_scvi_tools_with_size_factors_keeps_the_laws() -> None:
    source = SCVISource(real(cells(), setup={"size_factor_key": "size"}))
    x = batch_of(source)
    check_source(source, x, condition=source.condition(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("latent", ("normal", "ln"))
def test_scvi_tools_own_numbers_come_out(latent: str) -> None:
    model = real(cells(), latent_distribution=latent)
    source, module = SCVISource(model), model.module
    x = batch_of(source, 30)
    with torch.no_grad():
        torch.manual_seed(1)
        inferred = module.inference(**module._get_inference_input(x))
        made = module.generative(**module._get_generative_input(x, inferred))
        loss = module.loss(x, inferred, made)
        torch.manual_seed(1)
        encoding = source.encode(x)
        u = inferred["qz"].loc
        q = posterior_of(source.group(source.start(30, encoding)))
        assert torch.equal(q.mean, u)
        assert torch.equal(encoding.condition["library"], inferred["library"])
        if latent == "normal":
            state = source.advance(source.start(30, encoding), inferred["z"])
            log_p = source.likelihood(state).log_prob(x["X"])
            (theirs,) = loss.reconstruction_loss.values()
            torch.testing.assert_close(-log_p, theirs)
            assert torch.equal(source.decode(state), made["px"].mean)


@pytest.mark.filterwarnings("ignore")
def test_scvi_tools_held_out_cells_are_loaded_and_the_model_stays() -> None:
    adata = cells()
    model = real(adata[:100].copy())
    source = SCVISource(model)
    before = everything(model.module)
    prior = NCPrior(source, MLPHead((4,), context_shape=(2,), width=16))
    held_out = source.loader(adata[100:].copy())
    fit(prior, source.loader(shuffle=True), held_out=held_out, steps=5, progress=False)
    condition = source.condition(next(iter(held_out)))
    assert prior.sample(20, partial(sir, num_proposals=5), condition=condition).x.shape == (20, 20)
    assert everything(model.module) == before


@pytest.mark.filterwarnings("ignore")
def test_scvi_tools_models_that_cannot_work_are_refused(tmp_path: Path) -> None:
    scvi = pytest.importorskip("scvi")
    with pytest.raises(ValueError, match="second latent"):
        SCVISource(real(cells(), use_observed_lib_size=False))
    adata = cells()
    scvi.model.SCVI.setup_anndata(adata)
    with pytest.raises(ValueError, match="not trained"):
        SCVISource(scvi.model.SCVI(adata))
    model = real(cells())
    model.save(tmp_path / "model", save_anndata=True)
    check_loaded = SCVISource(scvi.model.SCVI.load(tmp_path / "model", accelerator="cpu"))
    assert check_loaded.fingerprint() == SCVISource(model).fingerprint()
    model.adata.obsm["X_qzm"], model.adata.obsm["X_qzv"] = model.get_latent_representation(
        return_dist=True
    )
    model.minify_adata(use_latent_qzm_key="X_qzm", use_latent_qzv_key="X_qzv")
    with pytest.raises(ValueError, match="minified"):
        SCVISource(model)
