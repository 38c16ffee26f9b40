"""A TVAE as a source: the rules of a source, the model's own numbers, tables, and wrong objects.

On a stand-in with the same attributes; and on ctgan itself where it is installed.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tvae_standin as standin
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from ncprior import NCPrior, sir
from ncprior.adapters.tvae import TVAESource, capture_encoder
from ncprior.heads import MLPHead
from ncprior.saving.identity import facts_of_draws, source_facts
from ncprior.source import posterior_of, sample_posterior
from ncprior.testing import check_source
from ncprior.training import fit_encoder


@pytest.fixture
def fake_ctgan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in in the place of ctgan."""
    for name in ("ctgan", "ctgan.synthesizers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ctgan.synthesizers.tvae", standin)


def source_of(model: Any = None) -> TVAESource:
    """A source with an encoder."""
    model = standin.fitted() if model is None else model
    return TVAESource(model, standin.Encoder(6, (8,), 4).eval())


def test_the_source_keeps_the_rules() -> None:
    source = source_of()
    x = source.rows(standin.table())
    assert x.shape == (60, 6)
    check_source(source, x[:5])
    check_source(fit_encoder(TVAESource(source.model), x, steps=2, progress=False), x[:5])


def given(source: TVAESource, z: Tensor) -> Distribution:
    """p(x | z)."""
    return source.likelihood(source.advance(source.start(len(z)), z))


def test_log_p_is_the_sum_over_places_and_one_hot_spans() -> None:
    source, z = source_of(), torch.randn(60, 4)
    x, (output, sigma) = source.rows(standin.table()), source.module(z)
    log_p = Normal(output[:, 0].tanh(), sigma[0]).log_prob(x[:, 0])
    for span in (slice(1, 3), slice(3, 6)):
        log_p = log_p + (output[:, span].log_softmax(1) * x[:, span]).sum(1)
        torch.testing.assert_close(given(source, z).mean[:, span], output[:, span].softmax(1))
    torch.testing.assert_close(given(source, z).log_prob(x), log_p)


def test_draws_have_the_mean_and_are_rows() -> None:
    p = given(source_of(), torch.randn(2, 4))
    x = p.sample((4000,))
    assert x.shape == (4000, 2, 6)
    for span in (slice(1, 3), slice(3, 6)):
        assert torch.equal(x[..., span].sum(-1), torch.ones(4000, 2))
    sd = (p.mean * (1 - p.mean)).abs().sqrt()
    sd[:, 0] = 0.1
    assert ((x.mean(0) - p.mean).abs() < 4 * sd / math.sqrt(4000)).all()


def test_a_table_comes_back() -> None:
    source, table = source_of(), standin.table()
    again = source.table(source.rows(table))
    np.testing.assert_allclose(again[:, 0].astype(float), table[:, 0].astype(float), atol=1e-5)
    assert (again[:, 1] == table[:, 1]).all()
    prior = NCPrior(source, MLPHead((4,), width=4, depth=1))
    drawn = source.table(prior.sample(5, partial(sir, num_proposals=5), draw_x=True).x)
    assert drawn.shape == (5, 2) and set(drawn[:, 1]) <= set(standin.NAMES)


def test_rows_are_drawn_from_the_generator_of_torch() -> None:
    source, table = source_of(), standin.table()
    torch.manual_seed(3)
    numpy_state = np.random.get_state()[1].copy()
    first = source.rows(table)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert not torch.equal(first, source.rows(table))
    torch.manual_seed(3)
    np.random.seed(9)
    assert torch.equal(first, source.rows(table))


def test_the_model_may_be_trained_again() -> None:
    model = standin.fitted()
    source, x = source_of(model), torch.randn(5, 4)
    before = source.module(x)[0]
    with torch.no_grad():
        model.decoder.seq[0].weight.zero_()
    assert torch.equal(source.module(x)[0], before)
    assert model.decoder.training and not source.module.training


def test_the_encoder_does_not_count_for_the_fingerprint() -> None:
    model = standin.fitted()
    assert source_of(model).fingerprint() == TVAESource(model).fingerprint()


@pytest.mark.usefixtures("fake_ctgan")
def test_the_encoder_is_captured_and_the_class_is_as_it_was() -> None:
    build = standin.Encoder.__init__
    model, table = standin.TVAE(), standin.table()
    with capture_encoder() as captured:
        model.fit(table)
    assert standin.Encoder.__init__ is build
    source = TVAESource(model, captured.encoder)
    x = source.rows(table)
    torch.testing.assert_close(
        posterior_of(source.group(source.start(60, source.encode(x)))).mean, captured.encoder(x)[0]
    )
    with capture_encoder() as captured, pytest.raises(TypeError):
        model.fit(None)
    assert standin.Encoder.__init__ is build


@pytest.mark.usefixtures("fake_ctgan")
@pytest.mark.parametrize("fits", [0, 2])
def test_one_model_is_fitted_while_its_encoder_is_captured(fits: int) -> None:
    with capture_encoder() as captured:
        for _ in range(fits):
            standin.fitted()
    with pytest.raises(RuntimeError, match=f"got {fits}"):
        captured.encoder  # noqa: B018


def test_capturing_needs_ctgan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctgan.synthesizers.tvae", None)
    with pytest.raises(ImportError, match=r"\.\[tables\]"), capture_encoder():
        pass


class TVAESynthesizer:
    """The name of SDV's."""

    _model = None


class CTGAN:
    """The name of ctgan's GAN."""


@pytest.mark.parametrize(
    ("model", "kind", "match"),
    [
        (standin.TVAE(), ValueError, r"not fitted: call model.fit"),
        (standin.TVAE, TypeError, "the class TVAE"),
        (TVAESynthesizer(), TypeError, r"synthesizer\._model"),
        (CTGAN(), TypeError, "GAN"),
        (nn.Linear(2, 2), TypeError, "not its networks"),
    ],
)
def test_wrong_models_are_named(model: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        TVAESource(model)


def unseen() -> np.ndarray:
    table = standin.table()
    table[3, 1] = "mauve"
    return table


def test_wrong_tables_and_rows_are_named() -> None:
    source, table = source_of(), standin.table()
    frame = SimpleNamespace(columns=["0"], to_numpy=lambda: table)
    for wrong, kind, match in (
        ([[1.0, "red"]], TypeError, "an array"),
        (table[:, :1], ValueError, r"\(N, 2\)"),
        (table[:0], ValueError, "1 or more rows"),
        (unseen(), ValueError, "'1' has, in 1 rows"),
    ):
        with pytest.raises(kind, match=match):
            source.rows(wrong)
    for x, kind, match in (
        (frame, TypeError, r"source\.rows\(table\)"),
        (torch.zeros(5, 3), ValueError, r"\(N, 6\)"),
        (torch.zeros(5, 6, dtype=torch.long), ValueError, "floats"),
        ("x", TypeError, "tensor or an array"),
    ):
        for method in (source.encode, source.table):
            with pytest.raises(kind, match=match):
                method(x)
    with pytest.raises(TypeError, match="captured"):
        TVAESource(source.model, "encoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fit_encoder"):
        TVAESource(source.model).encode(torch.zeros(5, 6))
    source.model.transformer.dataframe = True
    source = source_of(source.model)
    with pytest.raises(TypeError, match="a DataFrame"):
        source.rows(table)
    with pytest.raises(ValueError, match=r"\['1'\] are missing"):
        source.rows(frame)


# --- ctgan itself


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any, Any]:
    """A TVAE of ctgan after one epoch, its captured encoder, and its table."""
    ctgan, pd = pytest.importorskip("ctgan"), pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    count = 300
    number = np.where(rng.random(count) < 0.5, rng.normal(-3, 1, count), rng.normal(3, 0.5, count))
    colour = np.array(standin.NAMES)[(number > 0) + rng.integers(2, size=count)]
    table = pd.DataFrame(
        {"number": number, "colour": colour, "whole": rng.integers(9, size=count)}
    )
    model = ctgan.TVAE(embedding_dim=4, epochs=1, batch_size=50, enable_gpu=False)
    model.set_random_state(0)
    with capture_encoder() as captured:
        model.fit(table, ["colour"])
    return model, captured.encoder, table


def test_the_real_source_keeps_the_rules(real: tuple[Any, Any, Any]) -> None:
    model, encoder, table = real
    source = TVAESource(model, encoder)
    x = source.rows(table)
    check_source(source, x[:5])
    latents, _ = sample_posterior(source, x[:5])
    assert latents[0].shape == (5, 4)


def test_log_p_is_that_of_the_loss_of_ctgan(real: tuple[Any, Any, Any]) -> None:
    from ctgan.synthesizers.tvae import _loss_function

    model, encoder, table = real
    source = TVAESource(model, encoder)
    x, z = source.rows(table), torch.randn(300, 4)
    mean, scale, log_var = encoder(x)
    output, sigma = model.decoder(z)
    spans = model.transformer.output_info_list
    theirs, kl = _loss_function(output, x, sigma, mean, log_var, spans, 1)
    state = source.advance(source.start(300), z)
    constant = 0.5 * math.log(2 * math.pi) * sum(len(column) == 2 for column in spans)
    ours = -source.likelihood(state).log_prob(x).mean() - constant
    torch.testing.assert_close(ours, theirs)
    group = source.group(source.start(300, source.encode(x)))
    p, q = (Normal(d.mean, d.stddev) for d in (group.prior, posterior_of(group)))
    torch.testing.assert_close(torch.distributions.kl_divergence(q, p).sum(1).mean(), kl)
    assert torch.equal(mean, q.mean) and torch.equal(scale, q.stddev)


def test_tables_are_those_of_its_own_sample(real: tuple[Any, Any, Any]) -> None:
    """Its sample is N(0, I), the mean of p(x | z), noise on places and the likeliest categories.

    This decoder has no logit above 9, where its tanh would be 1 for several categories.
    """
    model, encoder, _ = real
    source = TVAESource(model, encoder)
    model.random_states = None
    torch.manual_seed(1)
    np.random.seed(1)
    theirs = model.sample(20)
    torch.manual_seed(1)
    np.random.seed(1)
    z = torch.normal(torch.zeros(50, 4), 1.0)[:20]
    mean = source.decode(source.advance(source.start(20), z)).detach()
    ours = model.transformer.inverse_transform(mean.numpy(), model.decoder.sigma.detach().numpy())
    assert ours.equals(theirs)
    assert source.table(mean)["colour"].equals(theirs["colour"])


def test_a_real_table_comes_back_whole(real: tuple[Any, Any, Any]) -> None:
    model, encoder, table = real
    source = TVAESource(model, encoder)
    table = table.sample(600, replace=True, random_state=0, ignore_index=True)  # in this process
    torch.manual_seed(0)
    x = source.rows(table)
    torch.manual_seed(0)
    assert torch.equal(x, source.rows(table))
    again = source.table(x)
    assert list(again.columns) == list(table.columns) and again["colour"].equals(table["colour"])
    close = np.isclose(again["number"], table["number"], atol=1e-3)
    assert close.mean() > 0.98  # a place beyond 4 standard deviations is clipped
    unseen = table.assign(colour="mauve")
    with pytest.raises(ValueError, match="'colour' has, in 600 rows"):
        source.rows(unseen)
    with pytest.raises(ValueError, match="missing"):
        source.rows(table[["colour"]])


def test_an_encoder_is_trained_where_it_was_not_captured(real: tuple[Any, Any, Any]) -> None:
    model, _, table = real
    source = TVAESource(model)
    x = source.rows(table)
    options = {"steps": 100, "progress": False, "seed": 0, "kl_weight": 1 / model.loss_factor}
    fitted = fit_encoder(source, x, **options)
    untrained = fit_encoder(source, x, **{**options, "steps": 0})
    assert fitted.elbo is not None and untrained.elbo is not None
    assert fitted.elbo > untrained.elbo


def test_a_checkpoint_knows_the_encoder() -> None:
    """Encodings of one and heads of another were taken for one training."""
    model = standin.fitted()
    torch.manual_seed(0)
    first, second = (source_of(model) for _ in range(2))
    assert source_facts(first) != source_facts(second)
    assert source_facts(first) == source_facts(TVAESource(model, first.encoder))
    assert facts_of_draws(first, draw_x=True) == facts_of_draws(second, draw_x=True)
