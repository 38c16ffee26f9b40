"""Models of scvi-tools as sources: the laws of a source, the model's own numbers, refusals by name.

On stand-ins with the same attributes; ``test_scvi_tools.py`` has scvi-tools itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from helpers.scvi_standin import PEAKVI, SCANVI, SCVI, TOTALVI, LinearSCVI
from helpers.toys import everything
from torch import Tensor
from torch.distributions import NegativeBinomial

from ncprior import NCPrior, fit, sir
from ncprior.adapters.scvi import SCVISource
from ncprior.adapters.scvi.likelihoods import Proteins, ZeroInflated, negative_binomial
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture_em import fit_gaussian
from ncprior.bases.rebase import rebase
from ncprior.evaluation import log_likelihood
from ncprior.heads.networks import MLPHead
from ncprior.source import posterior_of, sample_posterior, visit
from ncprior.testing import check_source
from ncprior.vaebm import GaussianDecoder


def batch_of(source: Any, count: int = 5) -> dict[str, Tensor]:
    """The first cells."""
    return next(iter(source.loader(batch_size=count)))


def minified(model: Any) -> Any:
    model.minify()
    return model


MODELS: dict[str, Callable[[], Any]] = {
    **{
        "-".join(map(str, options)): partial(
            SCVI, **dict(zip(("likelihood", "batches", "latent"), options, strict=True))
        )
        for options in product(("nb", "poisson", "normal"), (1, 2), ("normal", "ln"))
    },
    "latent library": partial(LinearSCVI, observed=False),
    "SCANVI": SCANVI,
    "SCANVI, latent library": partial(SCANVI, observed=False),
    "TOTALVI": TOTALVI,
    "TOTALVI, zinb": partial(TOTALVI, likelihood="zinb"),
    "TOTALVI, latent library": partial(TOTALVI, observed=False),
    "PEAKVI": PEAKVI,
    "minified": lambda: minified(SCVI()),
    "SCANVI, minified": lambda: minified(SCANVI()),
    "TOTALVI, minified": lambda: minified(TOTALVI()),
}


@pytest.mark.parametrize("name", MODELS)
def test_sources_keep_the_laws(name: str) -> None:
    torch.manual_seed(0)
    source = SCVISource(MODELS[name]())
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


def test_heads_see_the_conditions_that_they_are_given() -> None:
    model = SCVI()
    x = model.cells(5, 6, 2)
    columns = {
        "library": x["X"].sum(1, keepdim=True).log(),
        "batch": torch.eye(2)[x["batch"][:, 0]],
        "labels": torch.eye(3)[x["labels"][:, 0]],
    }
    for given in (("batch",), ("labels", "batch"), ("library", "labels"), None):
        source = SCVISource(model, given=given)
        named = [name for name in columns if name in (given or ("library", "batch"))]
        seen = torch.cat([columns[name] for name in named], -1)
        condition = source.condition(x)
        for state in (source.start(5, source.encode(x)), source.start(5, condition=condition)):
            context = source.group(state).context
            assert context is not None
            torch.testing.assert_close(context, seen)
    source = SCVISource(SCVI(batches=1), given=["batch"])
    assert source.group(source.start(5, source.encode(batch_of(source)))).context is None


def test_one_group_shares_the_standard_normal() -> None:
    source = SCVISource(SCVI())
    prior = source.shared_prior()
    assert prior is not None
    assert torch.equal(prior.mean, torch.zeros(4)) and torch.equal(prior.stddev, torch.ones(4))
    assert SCVISource(SCANVI()).shared_prior() is None


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


@pytest.mark.parametrize("make", (SCVI, TOTALVI, partial(TOTALVI, likelihood="zinb"), PEAKVI))
def test_cells_are_drawn_around_the_mean(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    source = SCVISource(make())
    state = sample_posterior(source, batch_of(source))[1]
    law = source.likelihood(state)
    draws = law.sample((4000,))
    assert torch.equal(draws, draws.round())
    assert not draws.is_inference()
    error = 6 * draws.std(0) / len(draws) ** 0.5  # the background of proteins has heavy tails
    assert ((draws.mean(0) - source.decode(state)).abs() < error).all()


def test_logistic_normal_latents_are_walked_before_their_softmax() -> None:
    source = SCVISource(SCVI(latent="ln"))
    (z,), _ = sample_posterior(source, batch_of(source))
    assert not torch.allclose(z.sum(1), torch.ones(5))


def test_a_latent_library_size_is_a_group_given_z() -> None:
    model = LinearSCVI(observed=False)
    source = SCVISource(model)
    x = batch_of(source)
    assert source.group_names == ("z", "library")
    assert set(source.condition(x)) == {"batch"}
    state = source.start(5, source.encode(x))
    z = torch.randn(5, 4)
    group = source.group(source.advance(state, z))
    batch = x["batch"][:, 0]
    torch.testing.assert_close(group.prior.mean[:, 0], torch.tensor([3.0, 3.5])[batch])
    torch.testing.assert_close(group.prior.stddev[:, 0] ** 2, torch.tensor([0.1, 0.2])[batch])
    ql = model.module.l_encoder(x["X"].log1p())[0]
    assert torch.equal(posterior_of(group).mean, ql.loc)
    assert group.context is not None and torch.equal(group.context[:, :4], z)
    done = source.advance(source.advance(state, z), torch.full((5, 1), 2.0))
    torch.testing.assert_close(source.decode(done).sum(1), torch.full((5,), 2.0).exp())


def test_scanvi_draws_z2_and_then_z1_given_the_label() -> None:
    model = SCANVI()
    source = SCVISource(model)
    x = batch_of(source)
    state = source.start(5, condition=source.condition(x))
    first = source.group(state)
    assert torch.equal(first.prior.mean, torch.zeros(5, 4))
    z2 = first.prior.sample()
    second = source.group(source.advance(state, z2))
    mean, variance = model.module.decoder_z1_z2(z2, source.condition(x)["labels"])
    assert torch.equal(second.prior.mean, mean)
    torch.testing.assert_close(second.prior.variance, variance)
    assert second.context is not None and torch.equal(second.context[:, :4], z2)


def test_scanvis_posterior_is_drawn_from_below() -> None:
    """The joint density of a walk is q(z1 | x) q(z2 | z1, y), at one pair of draws."""
    torch.manual_seed(0)
    model = SCANVI()
    source, module = SCVISource(model), model.module
    x = {name: t[:1].expand(4000, -1) for name, t in batch_of(source).items()}
    encoding = source.encode(x)
    densities = []

    def choose(k: int, group: Any) -> Tensor:
        q = posterior_of(group)
        z = q.sample()
        assert torch.equal(q.sample((2,))[1], z) or k == 0
        densities.append(q.log_prob(z))
        return z

    (z2, z1), _ = visit(source, source.start(4000, encoding), choose)
    q1 = module.z_encoder(x["X"].log1p())[0]
    q2 = module.encoder_z2_z1(z1, x["labels"])[0]
    log_q = q1.log_prob(z1).sum(1) + q2.log_prob(z2).sum(1)
    torch.testing.assert_close(densities[0] + densities[1], log_q)
    noise = torch.cat([(z1 - q1.loc) / q1.scale, (z2 - q2.loc) / q2.scale], 1)
    assert (torch.cov(noise.T) - torch.eye(8)).abs().max() < 5 * (2 / 4000) ** 0.5


def test_unlabelled_cells_get_the_label_that_the_classifier_finds() -> None:
    model = SCANVI()
    source = SCVISource(model)
    x = batch_of(source, 8)
    labels = source.condition(x)["labels"][:, 0]
    found = model.module.classifier(model.module.z_encoder(x["X"].log1p())[0].loc).argmax(1)
    assert torch.equal(labels, torch.where(x["labels"][:, 0] == 3, found, x["labels"][:, 0]))
    assert torch.equal(source.encode(x).condition["labels"][:, 0], labels)


@pytest.mark.parametrize("make", (SCANVI, PEAKVI))
def test_conditions_are_read_without_a_draw(make: Callable[[], Any]) -> None:
    source = SCVISource(make())
    x, before = batch_of(source), torch.get_rng_state()
    source.condition(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_counts_are_validated_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    source, checked = SCVISource(SCVI()), []
    monkeypatch.setattr(source._conditions, "_require_counts", checked.append)
    source.encode(batch_of(source))
    assert len(checked) == 1


def test_categories_are_set_by_name() -> None:
    source = SCVISource(SCANVI())
    x = batch_of(source)
    condition = source.condition(x, batch="stimulated", label="C")
    assert condition["batch"].unique().item() == 1 and condition["labels"].unique().item() == 2
    assert torch.equal(condition["library"], source.condition(x)["library"])
    with pytest.raises(ValueError, match=r"labels must be one of 'A', 'B', 'C'; got '\?'"):
        source.condition(x, label="?")
    with pytest.raises(ValueError, match=r"not depend on 'labels'.*given=.*'labels'\]"):
        SCVISource(SCVI()).condition(x, label="A")
    assert SCVISource(SCVI(), given=["labels"]).condition(x, label="B")["labels"].max() == 1


def test_totalvi_decodes_genes_and_then_proteins_without_a_draw() -> None:
    torch.manual_seed(0)
    model = TOTALVI()
    source = SCVISource(model)
    x = batch_of(source)
    _, state = sample_posterior(source, x)
    before = torch.get_rng_state()
    mean = source.decode(state)
    assert torch.equal(torch.get_rng_state(), before)
    assert mean.shape == (5, 9)
    torch.testing.assert_close(mean[:, :6].sum(1), x["X"].sum(1))


def test_the_background_of_proteins_is_integrated_out() -> None:
    torch.manual_seed(0)
    proteins = Proteins(
        loc=torch.tensor([[1.0, 2.0]]),
        scale=torch.tensor([[0.3, 0.8]]),
        increase=torch.tensor([[4.0, 2.0]]),
        logits=torch.tensor([[1.0, -1.0]]),
        inverse_dispersion=torch.tensor([[3.0, 5.0]]),
    )
    count = 50_000
    b = (proteins.loc + proteins.scale * torch.randn(count, 1, 2)).exp()
    p = torch.sigmoid(proteins.logits)
    for value in (0.0, 3.0, 20.0):
        y = torch.full((1, 2), value)
        absent, there = (
            negative_binomial(mean, proteins.inverse_dispersion).log_prob(y).exp()
            for mean in (b, b * proteins.increase)
        )
        chance = (p * absent + (1 - p) * there)[:, 0]
        error = 5 * chance.std(0) / count**0.5
        assert ((proteins.log_prob(y)[0].exp() - chance.mean(0)).abs() < error).all()
    total = proteins.log_prob(torch.arange(3000.0)[:, None]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2), rtol=1e-4, atol=0)


def test_extra_zeros() -> None:
    counts = NegativeBinomial(torch.tensor([3.0]), logits=torch.tensor([0.5]))
    law = ZeroInflated(counts, torch.tensor([-1.0]))
    zero = torch.sigmoid(torch.tensor(-1.0))
    p = counts.log_prob(torch.tensor([0.0])).exp()
    torch.testing.assert_close(law.log_prob(torch.zeros(1)).exp(), zero + (1 - zero) * p)
    total = law.log_prob(torch.arange(500.0)[:, None]).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


def test_peakvi_regions_are_open_or_closed() -> None:
    model = PEAKVI()
    source = SCVISource(model)
    x = batch_of(source)
    condition = source.condition(x)
    assert set(condition) == {"depth", "batch"}
    torch.testing.assert_close(condition["depth"][:, 0], (x["X"] > 0).float().mean(1))
    z = torch.randn(5, 4)
    law = source.likelihood(source.advance(source.start(5, condition=condition), z))
    p = model.module.generative(z, z)["px"]
    chance = p * condition["depth"] * torch.sigmoid(model.module.region_factors)
    torch.testing.assert_close(law.mean, chance)
    is_open = x["X"] > 0
    log_p = torch.where(is_open, chance.log(), (1 - chance).log()).sum(1)
    torch.testing.assert_close(law.log_prob(x["X"]), log_p)


@pytest.mark.parametrize("make", (SCVI, SCANVI, TOTALVI))
def test_minified_models_are_those_of_the_counts(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make()
    full = SCVISource(model)
    x = batch_of(full)
    want, condition = full.encode(x), full.condition(x)
    model.minify()
    source = SCVISource(model)
    stored = batch_of(source)
    assert not stored["X"].any()
    got = source.encode(stored)
    for name in ("loc", "scale"):
        torch.testing.assert_close(got.q["z"][name], want.q["z"][name])
    known = source.condition(stored)
    torch.testing.assert_close(known["library"], condition["library"])
    latents = [torch.randn(5, 4) for _ in range(source.num_groups)]
    x_of = [
        s.decode(visit(s, s.start(5, condition=c), lambda k, _: latents[k])[1])
        for s, c in ((source, known), (full, condition))
    ]
    torch.testing.assert_close(*x_of)
    assert source.fingerprint() == full.fingerprint()


def test_minified_models_are_fitted_without_counts() -> None:
    torch.manual_seed(0)
    source = SCVISource(minified(SCVI()))
    prior = NCPrior.for_source(source, batch_of(source, 64), width=16)
    history = fit(prior, source.loader(batch_size=20, shuffle=True), steps=5, progress=False,
                  held_out=source.loader())  # fmt: skip
    assert history.best_loss is not None
    condition = source.condition(batch_of(source, 20))
    drawn = prior.sample(20, partial(sir, num_proposals=5), condition=condition, draw_x=True)
    assert drawn.x.shape == (20, 6) and drawn.x.sum() > 0
    with pytest.raises(ValueError, match="minified: its cells are stored latents"):
        source.encode(SCVI.cells(5, 6, 2))


def test_loaders_are_reread_and_fit_the_heads() -> None:
    model = SCVI()
    source = SCVISource(model)
    before = everything(model.module)
    train = source.loader(indices=range(80), batch_size=20, shuffle=True)
    assert [len(b["X"]) for b in train] == [len(b["X"]) for b in train] == [20] * 4
    prior = NCPrior(source, MLPHead((4,), context_shape=(3,), width=16))
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


def test_cells_that_do_not_fit_are_refused() -> None:
    source = SCVISource(SCVI())
    with pytest.raises(ValueError, match=r"do not fit the model\. Pass cells with the genes"):
        source.loader(SCVI.cells(7, 5, 2))
    with pytest.raises(ValueError, match="do not fit the model. The model is minified"):
        SCVISource(minified(SCVI())).loader(SCVI.cells(7, 5, 2))
    for wrong in (torch.ones(5, 6), "cells.h5ad", 3):
        with pytest.raises(TypeError, match="adata must be an AnnData; got"):
            source.loader(wrong)


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


@pytest.mark.parametrize("code", (-1, 2, 0.5))
def test_codes_of_no_category_are_refused(code: float) -> None:
    source = SCVISource(SCVI())
    condition = {**source.condition(batch_of(source)), "batch": torch.full((5, 1), code)}
    with pytest.raises(ValueError, match="'batch' must be whole numbers from 0 to 1; got"):
        source.start(5, condition=condition)


@pytest.mark.parametrize("x", (torch.ones(5, 6), {"counts": torch.ones(5, 6)}))
def test_a_batch_that_is_not_the_loaders_is_refused(x: Any) -> None:
    with pytest.raises(ValueError, match=r"dict with the counts as 'X'.*source\.loader"):
        SCVISource(SCVI()).encode(x)


def test_batches_without_a_column_are_refused() -> None:
    for make, name in ((SCVI, "batch"), (SCANVI, "labels"), (TOTALVI, "proteins")):
        source = SCVISource(make())
        x = {key: t for key, t in batch_of(source).items() if key != name}
        for call in (source.encode, source.condition):
            with pytest.raises(
                ValueError, match=f"takes no cells without {name}. Pass batches of"
            ):
                call(x)


def test_counts_of_other_genes_are_refused() -> None:
    source = SCVISource(SCVI())
    with pytest.raises(ValueError, match=r"\(B, 6\), a column per gene; got \(5, 7\)"):
        source.encode({**batch_of(source), "X": torch.ones(5, 7)})


@pytest.mark.parametrize("wrong", (1.386, -1.0))
def test_numbers_that_are_no_counts_are_refused(wrong: float) -> None:
    for make in (SCVI, SCANVI, TOTALVI, PEAKVI):
        source = SCVISource(make())
        x = batch_of(source)
        x["X"][:] = 1
        x["X"][2, 1] = wrong
        with pytest.raises(ValueError, match=rf"{wrong:g} in row 2, column 1.*1 such.*layer="):
            source.encode(x)
    x["X"][2, 1] = 1.386
    SCVISource(SCVI(likelihood="normal")).encode(x)


def test_cells_without_counts_are_refused() -> None:
    source = SCVISource(SCVI())
    x = batch_of(source)
    x["X"][1] = 0
    with pytest.raises(ValueError, match=r"1 of 5 cells.*filter_cells"):
        source.condition(x)


@pytest.mark.parametrize("make", (SCVI, SCANVI, TOTALVI, PEAKVI))
def test_untrained_models_are_refused(make: Callable[[], Any]) -> None:
    model = make()
    model.is_trained = False
    with pytest.raises(ValueError, match=rf"{make.__name__} .*not trained: call model\.train\(\)"):
        SCVISource(model)


def test_models_without_cells_are_refused() -> None:
    model = SCVI()
    model.adata_manager = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"without its cells.*SCVI\.load\(folder, adata="):
        SCVISource(model)


def test_scanvi_with_a_softmax_is_refused() -> None:
    with pytest.raises(ValueError, match="latent_distribution='ln'.*'normal'"):
        SCVISource(SCANVI(latent="ln"))


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"takes an scvi\.model\.SCVI, .*PEAKVI; got .*Module"):
        SCVISource(SCVI().module)
    for wrong in (None, 3, SCVI):
        with pytest.raises(TypeError, match=r"takes an scvi\.model\.SCVI, .*PEAKVI; got"):
            SCVISource(wrong)


def test_names_of_no_condition_are_refused() -> None:
    with pytest.raises(ValueError, match=r"out of \['library', 'batch', 'labels'\]; got 'donor'"):
        SCVISource(SCVI(), given=["batch", "donor"])
    for wrong in ("batch", 3, {"batch": 1}):
        with pytest.raises(TypeError, match="given must be a list of names"):
            SCVISource(SCVI(), given=wrong)  # type: ignore[arg-type]


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
    assert torch.equal(source.encode(array).q["z"]["loc"], source.encode(x).q["z"]["loc"])


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


def test_decoding_needs_all_latents() -> None:
    for model, name in ((SCVI(), "z"), (SCANVI(), "z2")):
        source = SCVISource(model)
        with pytest.raises(ValueError, match=f"needs {name}; this walk"):
            source.decode(source.start(5, condition=source.condition(batch_of(source))))


def test_minified_cells_have_no_likelihood() -> None:
    """Their counts are stored as zeros, of which it was."""
    source = SCVISource(minified(SCVI()))
    x = batch_of(source)
    with pytest.raises(ValueError, match="A minified model has no counts"):
        log_likelihood(source, [x], num_samples=2)
    with pytest.raises(ValueError, match="A minified model has no counts"):
        GaussianDecoder.fitted(source, [x])


def test_totalvi_has_a_likelihood_of_genes_and_proteins() -> None:
    torch.manual_seed(0)
    source = SCVISource(TOTALVI())
    x = batch_of(source)
    assert source.observed(x).shape == (5, 9)
    found = log_likelihood(source, source.loader(batch_size=50), num_samples=2)["base"]
    assert found.lower.isfinite().all()


def test_the_order_of_given_conditions_is_one_for_all_heads() -> None:
    """Heads that were trained with one order were loaded on another one, in silence."""
    model = SCVI()
    x = model.cells(5, 6, 2)
    orders = (["library", "batch"], ["batch", "library"])
    sources = [SCVISource(model, given=given) for given in orders]
    first, second = (s.group(s.start(5, s.encode(x))).context for s in sources)
    assert torch.equal(first, second)
    assert sources[0].facts() == sources[1].facts() == {"SCVISource.given": orders[0]}
    assert SCVISource(model, given=["batch"]).facts() != sources[0].facts()
