"""`improve`: its choices on problems with known answers, and that nothing else changes."""

import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import Codes, CorrelatedPair, GaussianPair, Ring
from helpers.recipe import make_quick
from helpers.tables import Frame
from helpers.toys import flat
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from ncprior import NCPrior, SingleGroup, fit, improve, sir
from ncprior.adapters.vq import VQSource
from ncprior.bases import (
    CodeNetwork,
    GaussianMixture,
    NoPrior,
    Rebased,
    fit_code_bases,
    fit_code_network,
    rebase,
)
from ncprior.data.encodings import walk_bytes
from ncprior.data.rows import Rows
from ncprior.diagnostics.calibration import Mean
from ncprior.heads import MLPHead
from ncprior.recipe import Choice, base, base_file, caches, heads, judge
from ncprior.recipe import sampler as recipe_sampler
from ncprior.recipe.base import choose_base
from ncprior.recipe.improve import _summary as summary
from ncprior.recipe.judge import Divergences, Gap, in_words, remaining_gap, share_closed
from ncprior.recipe.parts import Parts, parts_of
from ncprior.recipe.record import Record
from ncprior.recipe.sampler import keep_what_helps
from ncprior.recipe.sources import OWN_DRAW
from ncprior.samplers import describe
from ncprior.saving.tensors import load_tensors, save_tensors
from ncprior.training import AmortisedSource, FitSettings, History
from ncprior.utils.fingerprints import base_fingerprint
from ncprior.utils.random_state import seeded


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def improved(problem: GaussianPair | Ring | Codes | CorrelatedPair, rows: int) -> NCPrior:
    torch.manual_seed(0)
    return improve(source_of(problem), problem.data(rows), budget=20, seed=0, progress=False)


def source_of(problem: Any) -> Any:
    """The pretend VAE of a problem, which may be one itself."""
    return problem.source() if hasattr(problem, "source") else problem


def chosen(prior: NCPrior) -> dict[str, str]:
    return {choice.part: choice.chosen for choice in prior.report.choices}


@pytest.mark.usefixtures("quick")
def test_a_gaussian_is_found_by_held_out_likelihood() -> None:
    """The target is a Gaussian: its likelihood is the entropy's, and heads have nothing to add."""
    problem = GaussianPair(kl=2.0)
    prior = improved(problem, 3000)
    assert chosen(prior)["base"] == "Gaussian"
    best = {it.name: it for it in prior.report.choices[0].candidates}
    entropy = 1 + math.log(2 * math.pi)  # nats, of N(mu, I) in two dimensions
    gaussian, own = best["Gaussian"], best["the VAE's own prior"]
    assert gaussian.low < -entropy < gaussian.high
    assert abs(gaussian.score - own.score - problem.kl) < 4 * math.sqrt(2 * problem.kl / 150)
    z = prior.sample(4000).latents[0]
    assert (z.mean(0) - problem.mean).abs().max() < 0.2  # of ±0.02, and of the fit's ±0.02
    assert prior.report.verdict.startswith("Prior hole closed: ")


@pytest.mark.usefixtures("quick")
def test_a_seed_repeats_everything_and_generators_stay() -> None:
    problem, x = Ring(), Ring().data(400)
    state = torch.get_rng_state()
    table = Frame(a=x[:, 0].numpy(), b=x[:, 1].numpy())
    first, second = (
        improve(problem.source(), rows, budget=5, seed=3, progress=False) for rows in (x, table)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.report.columns, second.report.columns) == ((), ("a", "b"))
    assert chosen(first) == chosen(second)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    with seeded(0):
        z = first.sample(64).latents[0]
    with seeded(0):
        assert torch.equal(second.sample(64).latents[0], z)


@pytest.mark.usefixtures("quick")
def test_a_ring_gets_a_mixture_and_draws_are_on_it() -> None:
    prior = improved(Ring(), 3000)
    assert isinstance(prior.source, Rebased)
    assert isinstance(prior.source.prior, GaussianMixture)
    radius = prior.sample(2000).latents[0].norm(dim=1)
    assert abs(radius.mean() - 2.0) < 0.1  # 2.016 in truth; 1.25 for N(0, I)
    assert radius.std() < 0.4  # 0.25 in truth; 0.66 for N(0, I)


def test_the_base_of_wide_latents_is_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncprior.bases.mixture_em._MOST_NUMBERS", 4 * 3)  # of 3 full covariances
    parts, record = (
        parts_of(Ring().data(3000), None, seed=0),
        Record(progress=False, max_seconds=None),
    )
    source = choose_base(Ring().source(), parts, record)
    assert not source.shared_prior().is_full
    assert [it.name for it in record.choices[0].candidates][1:3] == [
        "Gaussian",
        "mixture of 10, diagonal",
    ]


@pytest.mark.parametrize(("rows", "largest"), [(19_000, 30), (21_000, 10)])
def test_larger_mixtures_are_tried_where_heads_overfit(rows: int, largest: int) -> None:
    """On 10,000 rows of Fashion-MNIST, a hundred components have 0.8 nats more than ten."""
    parts = parts_of(Ring().data(3000), None, seed=0)._replace(num_train=rows)
    record = Record(progress=False, max_seconds=None)
    choose_base(Ring().source(), parts, record)
    sizes = [it.name for it in record.choices[0].candidates if it.name.startswith("mixture")]
    assert sizes[-1] == f"mixture of {largest}"


@pytest.mark.parametrize(
    ("event", "widths"),
    [((2, 5, 4), (64, 32, 8)), ((32,), (256, 128, 32))],
    ids=["maps", "vectors"],
)
def test_heads_have_fractions_of_their_default_width(
    event: tuple[int, ...], widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of feature maps, 256 channels at every position would take seconds per step."""
    monkeypatch.setattr(heads, "_MOST_STEPS", 1)
    monkeypatch.setattr(heads, "_MOST_WITH_SCORES", 1)
    prior = Independent(Normal(torch.zeros(event), 1.0), len(event))
    source = SingleGroup(prior, lambda x: Independent(Normal(x, 0.1), len(event)), lambda z: z)
    parts, record = (
        parts_of(torch.randn(99, *event), None, seed=0),
        Record(progress=False, max_seconds=None),
    )
    heads.train_heads(source, parts, record, None)
    names = [candidate.name.split(",")[0] for candidate in record.choices[0].candidates]
    assert names == [f"width {width}" for width in widths]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_heads_are_trained_in_the_precision_that_is_fast_here(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def fit_once(*args: Any, settings: FitSettings, **options: Any) -> History:
        seen.append(settings.precision)
        return fit(*args, settings=settings, **options | {"steps": 1})

    monkeypatch.setattr(heads, "fit", fit_once)
    has = precision == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    parts = parts_of(torch.randn(99, 2), None, seed=0)
    identity = SingleGroup(flat().prior, lambda x: Independent(Normal(x, 0.1), 1), lambda z: z)
    heads.train_heads(identity, parts, Record(progress=False, max_seconds=None), None)
    assert seen == [precision] * 3


@pytest.mark.parametrize(
    ("seconds", "end"), [(None, "sure."), (9.0, "in the time that they had.")]
)
def test_a_limit_of_time_is_named_where_no_head_is_kept(seconds: float | None, end: str) -> None:
    prior = NCPrior(flat(), [MLPHead((2,))])
    prior.active = [False]
    record = Record(progress=False, max_seconds=seconds)
    record.add(Choice("base", "Gaussian"))
    assert summary(prior, record).endswith(end)


@pytest.mark.usefixtures("quick")
def test_hierarchies_keep_their_base() -> None:
    prior = improved(CorrelatedPair(), 1000)
    assert chosen(prior)["base"] == "the VAE's own prior"
    assert not isinstance(prior.source, Rebased)
    assert len(prior.sample(64).x) == 64


def test_walks_through_several_groups_are_cached_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nine numbers per row: loc and scale of prior and posterior twice, and a context of one."""
    problem = CorrelatedPair()
    source, data = source_of(problem), problem.data(1000)

    def cached(source: Any, data: Any, seconds: float | None = None) -> dict[str, Any]:
        record = Record(progress=False, max_seconds=seconds)
        return heads._caches(source, parts_of(data, None, seed=0), record)

    assert cached(source, data) == {"cache_epochs": 2}
    assert cached(source, data, seconds=60) == {}  # that a pass over all rows may take
    assert cached(source, TensorDataset(data)) == {}  # rows that may differ from time to time
    assert cached(flat(), data) == {}
    row = walk_bytes(source, data[:5])
    assert row == 9 * 4
    rows = Rows(data).take(torch.arange(750))
    for memory, fits in ((750 * row, True), (750 * row - 1, False)):
        kept = FitSettings(cache_memory=memory / 2**30)
        monkeypatch.setattr(caches, "FitSettings", lambda kept=kept: kept)
        record = Record(progress=False, max_seconds=None)
        settings = caches.walk_cache(source, Parts(rows, rows, rows, 750), record, 2)
        assert settings == ({"cache_epochs": 2} if fits else {})


@pytest.mark.usefixtures("quick")
def test_a_code_gets_its_frequencies() -> None:
    """The target's own table: nothing is left for heads."""
    problem = Codes()
    prior = improved(problem, 3000)
    assert chosen(prior)["base"] == "frequencies of codes"
    assert isinstance(prior.source, Rebased)
    base: Any = prior.source.prior
    error = 4 * (problem.target.probs / 2250).sqrt()
    assert ((base.logits.exp() - problem.target.probs).abs() < error).all()
    assert len(prior.sample(64).x) == 64


def test_a_grid_of_codes_gets_a_network_if_it_is_more_likely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = partial(fit_code_network, width=8, depth=1, steps=200)
    monkeypatch.setattr(base, "fit_code_network", small)
    names = []
    for columns in (1, 2):  # independent codes, and columns that are copies
        x = torch.randint(4, (2000, 2, 3 - columns)).repeat(1, 1, columns)
        source = VQSource(lambda x: x, lambda z: z.float(), num_categories=4)
        record = Record(progress=False, max_seconds=None)
        based = choose_base(source, parts_of(x, None, seed=0), record)
        names.append(type(based.prior).__name__)
        assert len(record.choices[0].candidates) == 2
    assert names == ["CodeFrequencies", "CodeNetwork"]
    record = Record(progress=False, max_seconds=None)
    cached = heads._caches(based, parts_of(x, None, seed=0), record)
    assert cached == {"num_cached_proposals": 3000}


def labelled_codes() -> VQSource:
    """x are codes themselves, with a label of three."""
    return VQSource(
        lambda x: x,
        lambda z: z.float(),
        num_categories=4,
        condition=lambda batch: batch[1],
        context=lambda c: torch.nn.functional.one_hot(c, 3).float(),
    )


@pytest.mark.usefixtures("quick")
def test_codes_get_a_network_that_sees_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """All codes of a row are its label, or all of them are the next number."""
    small = partial(fit_code_network, width=16, depth=1, steps=400)
    monkeypatch.setattr(base, "fit_code_network", small)
    torch.manual_seed(0)
    label = torch.randint(3, (2000,))
    x = (label + (torch.rand(2000) < 0.2)).view(-1, 1, 1).repeat(1, 2, 2)
    source, data = labelled_codes(), TensorDataset(x, label)
    prior = improve(source, data, budget=4, seed=0, progress=False)
    assert chosen(prior)["base"] == "network over codes"
    assert isinstance(prior.source, Rebased)
    record = Record(progress=False, max_seconds=None)
    cached = heads._caches(prior.source, parts_of(data, None, seed=0), record)
    assert cached == {"cache_epochs": math.inf}
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    found = {it.name: it.score for it in prior.report.choices[0].candidates}
    assert -entropy - 0.2 < found["network over codes"] < -entropy + 0.1
    c = torch.arange(3).repeat_interleave(1000)
    z = prior.sample(3000, condition=c).latents[0]
    assert ((z == c.view(-1, 1, 1)).all((1, 2)).float().mean() - 0.8).abs() < 0.08


@pytest.mark.usefixtures("quick")
def test_two_levels_of_codes_are_improved_on_their_fitted_bases() -> None:
    """The VQ-VAE itself has no prior to compare with; the fine codes are copies of the coarse one."""
    torch.manual_seed(0)
    x = torch.randint(3, (600, 1)).repeat(1, 2)
    source: Any = VQSource(
        lambda x: (x[:, :1], x),
        lambda coarse, fine: fine.float(),
        num_categories=[3, 3],
        context=lambda coarse: torch.nn.functional.one_hot(coarse[:, 0], 3).float(),
    )
    source = rebase(source, fit_code_bases(source, x, kind="frequencies"))
    prior = improve(source, x, budget=20, seed=0, progress=False)
    assert "old prior" not in prior.report.scores
    coarse, fine = prior.sample(2000).latents
    assert (fine == coarse).float().mean() > 0.8  # 1/3 on frequencies alone


@pytest.mark.usefixtures("quick")
def test_a_longer_training_draws_no_more_from_a_slow_base(monkeypatch: pytest.MonkeyPatch) -> None:
    data = TensorDataset(torch.randint(4, (400, 2, 2)), torch.randint(3, (400,)))
    source = labelled_codes()
    source = rebase(source, fit_code_bases(source, data, width=8, steps=2, progress=False))
    prior = NCPrior.for_source(source, data[:64], width=8).eval()
    parts, record = parts_of(data, None, seed=0), Record(progress=False, max_seconds=None)
    draw, draws = CodeNetwork.sample, [0]

    def counted(network: CodeNetwork, *shape: Any) -> Tensor:
        draws[-1] += 1
        return draw(network, *shape)

    monkeypatch.setattr(CodeNetwork, "sample", counted)
    for steps in (20, 60):
        monkeypatch.setattr(judge, "_STEPS", steps)
        remaining_gap(prior, OWN_DRAW, parts, record, name="new prior")
        draws.append(0)
    assert draws[0] == draws[1] > 0


@pytest.mark.usefixtures("quick")
def test_heads_that_do_harm_are_rejected_with_the_evidence() -> None:
    """Encodings and base are N(0, I); the head is made to learn log r = 3 z_0 instead of 0."""
    torch.manual_seed(0)
    problem, head = GaussianPair(kl=0.0), MLPHead((2,), width=16)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(200):
        z = 2 * torch.randn(256, 2)
        loss = (head(z) - 3 * z[:, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parts = parts_of(problem.data(3000), None, seed=0)
    record = Record(progress=False, max_seconds=None)
    prior = NCPrior(problem.source(), head).eval()
    prior.sampler = partial(sir, num_proposals=20)
    gaps = keep_what_helps(prior, parts, record)
    assert prior.active == [False]
    assert describe(prior.sampler) == "sir(num_proposals=1)"
    assert gaps["new prior"] is gaps["old prior"]
    choice = record.choices[0]
    found = {candidate.name: candidate for candidate in choice.candidates}
    assert choice.chosen == "the VAE's own prior"
    assert found["heads"].low > found["the VAE's own prior"].high + 0.1


def test_heads_of_groups_that_they_do_not_help_are_off_with_the_evidence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of two groups is worse with its head; once it is off, the evidence is the same."""

    def gap(*groups: float) -> Gap:
        means = [Mean(value, 0.01) for value in groups]
        found = Divergences(means, Mean(sum(groups), 0.01), 99)
        return Gap(found, found, 1000)

    known = {"old prior": gap(0.2, 0.1), "new prior": gap(0.1, 0.3)}
    without = gap(0.1, 0.1)
    monkeypatch.setattr(recipe_sampler, "measure_gaps", lambda *_: dict(known))
    monkeypatch.setattr(recipe_sampler, "bases_of", lambda *_: {"old prior": None})
    monkeypatch.setattr(recipe_sampler, "remaining_gap", lambda *_, **__: without)
    prior = NCPrior(CorrelatedPair(), [MLPHead((1,), width=8) for _ in range(2)]).eval()
    prior.sampler = partial(sir, num_proposals=20)
    record = Record(progress=False, max_seconds=None)
    gaps = keep_what_helps(prior, parts_of(torch.randn(99, 3), None, seed=0), record)
    assert prior.active == [True, False]
    assert gaps["new prior"] is without
    choice = record.choices[0]
    assert choice.chosen == "heads of the groups that they help"
    found = {candidate.name: candidate.score for candidate in choice.candidates}
    assert found == {
        "the VAE's own prior": pytest.approx(0.3),
        "heads": pytest.approx(0.4),
        choice.chosen: pytest.approx(0.2),
    }
    record.choices.clear()
    keep_what_helps(prior, parts_of(torch.randn(99, 3), None, seed=0), record)
    assert (
        record.choices[0].chosen == "heads"
    )  # none was switched off, and nothing is measured anew


def test_a_gap_that_was_not_measured_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (Divergences([mean], mean, 99) for mean in (Mean(0.2, 0.01), Mean(0.0, 0.0)))
    known = {"old prior": Gap(old, old, 1000), "new prior": Gap(new, new, 1)}
    monkeypatch.setattr(recipe_sampler, "measure_gaps", lambda *_: known)
    prior = NCPrior(flat(), MLPHead((2,), width=8)).eval()
    prior.sampler = partial(sir, num_proposals=20)
    record = Record(progress=False, max_seconds=None)
    keep_what_helps(prior, parts_of(torch.randn(99, 3), None, seed=0), record)
    assert prior.active == [True]
    assert [candidate.name for candidate in record.choices[0].candidates] == [
        "the VAE's own prior"
    ]
    assert "too little time" in record.choices[0].reason


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("max_seconds", [None, 600.0])
def test_a_training_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_seconds: float | None
) -> None:
    """With a limit, too: shares of the time that is left are never the same twice."""
    options = {"budget": 5, "seed": 1, "progress": False, "checkpoint": tmp_path / "run"}
    options["max_seconds"] = max_seconds
    x = Ring().data(400)
    whole = improve(Ring().source(), x, **options | {"checkpoint": tmp_path / "other"})

    def broken_off(record: Record, choice: Choice) -> None:
        record.choices.append(choice)
        if choice.part == "heads":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Record, "add", broken_off)
        improve(Ring().source(), x, **options)
    trained = (tmp_path / "run" / "heads-0").stat().st_mtime_ns
    resumed = improve(Ring().source(), x, **options)
    assert (tmp_path / "run" / "heads-0").stat().st_mtime_ns == trained  # not trained again
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("quick")
def test_a_run_goes_on_with_the_base_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device, or less time, would end in another base, to which the heads do not fit."""
    options = {"budget": 5, "seed": 1, "progress": False, "checkpoint": tmp_path}
    x = Ring().data(400)
    whole = improve(Ring().source(), x, **options)
    monkeypatch.setattr(base_file, "choose_base", lambda *_: pytest.fail("it is there"))
    resumed = improve(Ring().source(), x, **options)
    assert base_fingerprint(resumed.source.prior) == base_fingerprint(whole.source.prior)
    assert str(resumed.report.choices[0]) == str(whole.report.choices[0])
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"it belongs to data=.*; got data=.*. Pass the same VAE"):
        improve(Ring().source(), Ring().data(400), **options)
    file = tmp_path / "base.safetensors"
    tensors, config = load_tensors(file)
    for key, wrong in (
        ("choice", {"part": "base"}),
        ("choice", {**config["choice"], "chosen": 3}),
        ("base", {"kind": "Pickle", "config": {}}),
        ("belongs", None),
    ):
        save_tensors(file, tensors, {**config, key: wrong})
        with pytest.raises(ValueError, match="Cannot load"):
            improve(Ring().source(), x, **options)


def test_a_checkpoint_of_another_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "seed.txt").write_text("7")
    options = {"seed": 7, "checkpoint": tmp_path, "progress": False}
    with pytest.raises(
        ValueError, match=r"is of seed 7; got seed=7, max_seconds=5. Pass the same"
    ):
        improve(flat(), torch.randn(99, 3), max_seconds=5, **options)


@pytest.mark.usefixtures("quick")
def test_a_base_of_another_encoder_is_refused(tmp_path: Path) -> None:
    x, decoder = torch.randn(99, 2), SingleGroup(Ring().source().prior, None, lambda z: z)
    record = Record(progress=False, max_seconds=None)
    for bias in (0.0, 5.0):
        encoder = nn.Linear(2, 4)
        nn.init.constant_(encoder.bias, bias)
        source = AmortisedSource(decoder, encoder.eval())
        parts = parts_of(x, None, seed=0)
        with pytest.raises(ValueError, match="belongs to facts=") if bias else nullcontext():
            base_file.saved_base(tmp_path, source, parts, record)


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_of_another_seed_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "seed.txt").write_text("7")
    with pytest.raises(ValueError, match=r"is of seed 7; got seed=8. Pass the same"):
        improve(flat(), torch.randn(99, 3), seed=8, checkpoint=tmp_path, progress=False)


def test_a_checkpoint_of_a_long_seed_is_its_own(tmp_path: Path) -> None:
    module = sys.modules["ncprior.recipe.improve"]
    arguments = "1718000000000, max_seconds=86400.123"
    (tmp_path / "seed.txt").write_text(arguments)
    module._require_arguments(tmp_path / "seed.txt", arguments)
    with pytest.raises(ValueError, match=r"is of seed 1718000000000, max_seconds=86400.123; got"):
        module._require_arguments(tmp_path / "seed.txt", arguments + "4")


def test_an_error_of_the_decoder_comes_before_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["ncprior.recipe.improve"]  # the name is that of the function, too
    monkeypatch.setattr(module, "saved_base", lambda *_: pytest.fail("too late"))
    for prior in (flat().prior, NoPrior("It has none.")):
        source = SingleGroup(prior, flat()._posterior, lambda z: Normal(z, 1.0))
        with pytest.raises(TypeError, match="The decoder must return the mean"):
            improve(source, torch.randn(99, 3), progress=False)


@pytest.mark.parametrize("validates", [False, True])  # torch.compile switches it off for good
def test_rows_that_are_not_finite_are_found_before_the_base(
    monkeypatch: pytest.MonkeyPatch, *, validates: bool
) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", validates)
    module = sys.modules["ncprior.recipe.improve"]
    monkeypatch.setattr(module, "saved_base", lambda *_: pytest.fail("too late"))
    x, base = torch.randn(99, 3), Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
    identity = SingleGroup(base, lambda x: Independent(Normal(x, 0.1), 1), lambda z: z)
    for i in range(8):  # about half of them are for choices, the others for the report
        held_out = torch.randn(40, 3)
        held_out[5 * i, 1] = torch.nan
        with pytest.raises(ValueError, match="x has NaN or infinity"):
            improve(identity, x, held_out=held_out, seed=0, progress=False)
    masked = SingleGroup(base, lambda x: Independent(Normal(x.nan_to_num(), 0.1), 1), lambda z: z)
    with pytest.raises(pytest.fail.Exception, match="too late"):  # this VAE takes such rows
        improve(masked, x, held_out=held_out, seed=0, progress=False)


def test_a_warning_names_the_line_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SingleGroup(flat().prior, flat()._posterior, lambda z: z * torch.nan)
    module = sys.modules["ncprior.recipe.improve"]
    monkeypatch.setattr(module, "saved_base", lambda *_: int("the rest is not of interest"))
    nan = pytest.warns(UserWarning, match="The decoder has returned NaN")
    with nan as caught, suppress(ValueError):
        improve(source, torch.randn(99, 3), progress=False)
    assert caught[0].filename == __file__


def test_parts_are_disjoint_and_cover_the_data() -> None:
    for count, held_out in ((100, 25), (3000, 750), (20_000, 2000), (200_000, 10_000)):
        parts = parts_of(torch.arange(count), None, seed=0)
        rows = [_rows(part) for part in parts[:3]]
        assert torch.equal(torch.cat(rows).sort().values, torch.arange(count))
        assert len(rows[1]) + len(rows[2]) == held_out
        assert abs(len(rows[1]) - len(rows[2])) <= 1


def test_held_out_data_of_batches_is_halved() -> None:
    batches = [torch.arange(10), torch.arange(10, 30)]
    parts = parts_of(torch.arange(50), batches, seed=0)
    halves = torch.cat([torch.cat(list(part)) for part in parts[1:3]])
    assert torch.equal(halves.sort().values, torch.arange(30))
    assert parts.num_train == 50


class _Endless(IterableDataset[Tensor]):
    """Rows whose number is not known."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(99.0))


def test_rows_of_batches_are_counted_where_they_can_be() -> None:
    """Few rows are few however they come."""
    held_out, rows = torch.arange(50), TensorDataset(torch.randn(70, 2))
    chosen = SubsetRandomSampler(range(30))
    counts = [
        ([torch.randn(9, 2), torch.randn(8, 2)], 17),
        (DataLoader(rows, batch_size=8, shuffle=True), 70),
        (DataLoader(rows, batch_size=8, sampler=chosen), 30),
        (DataLoader(rows, batch_sampler=BatchSampler(chosen, 8, drop_last=False)), 70),
        (DataLoader(rows, batch_size=None), None),  # each row may be a batch
        (DataLoader(_Endless(), batch_size=8), None),
    ]
    for data, count in counts:
        parts = parts_of(data, held_out, seed=0)
        assert parts.num_train == count
        assert parts.is_small == (count is not None)


def test_batches_whose_rows_take_turns_are_halved_at_random() -> None:
    batches = [torch.arange(100) % 2]
    halves = parts_of(torch.arange(50), batches, seed=0)[1:3]
    assert all(20 <= int(torch.cat(list(half)).sum()) <= 30 for half in halves)


def _rows(part: object) -> Tensor:
    rows: Tensor = part[torch.arange(len(part))] if not isinstance(part, Tensor) else part  # type: ignore[index, arg-type]
    return rows


def test_data_without_rows_needs_held_out() -> None:
    with pytest.raises(ValueError, match=r"cannot hold out rows of list. Pass held_out=."):
        improve(flat(), [torch.randn(9, 3)], progress=False)


def test_few_rows_are_counted_in_the_message() -> None:
    with pytest.raises(ValueError, match="need 8 or more held-out rows each; got 2") as caught:
        improve(flat(), torch.randn(16, 3), progress=False)
    assert "split off 16 rows of data: pass 64 or more, or 16 or more other" in str(caught.value)
    with pytest.raises(ValueError, match="each; got 7. They are split off 63 rows"):
        parts_of(torch.randn(63, 3), None, 0)
    with pytest.raises(ValueError, match="each; got 7. Pass 16 or more rows as held_out="):
        parts_of(torch.randn(63, 3), torch.randn(15, 3), 0)
    for data, held_out in ((64, None), (9, torch.randn(16, 3))):
        parts = parts_of(torch.randn(data, 3), held_out, 0)
        assert len(parts.choose) == len(parts.judge) == 8


def test_a_checkpoint_needs_a_seed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A checkpoint needs a seed"):
        improve(flat(), torch.randn(99, 3), checkpoint=tmp_path, progress=False)


def test_the_share_that_is_closed_has_the_error_of_a_ratio() -> None:
    share, low, high = share_closed(Mean(0.4, 0.0), Mean(0.1, 0.01))
    assert (share, high - low) == (pytest.approx(0.75), pytest.approx(2 * 1.96 * 0.01 / 0.4))
    share, low, high = share_closed(Mean(0.4, 0.04), Mean(0.4, 0.03))
    assert (share, high - low) == (pytest.approx(0.0), pytest.approx(2 * 1.96 * 0.125))
    share, low, high = share_closed(Mean(0.4, 0.02), Mean(0.0, 1e-5))  # finds nothing
    assert (share, high - low) == (pytest.approx(1.0), pytest.approx(2 * 1.96 * 0.05))
    assert in_words(Mean(0.4, 0.01), Mean(0.1, 0.01)).startswith(
        "Prior hole closed: 75 % (70–80)."
    )
    assert in_words(Mean(0.001, 0.01), Mean(0.0, 0.0)).startswith("No prior hole was found.")
    assert in_words(Mean(0.001, 0.01), Mean(0.4, 0.01)).startswith(
        "No prior hole was found before, but the new prior has one."
    )
    assert in_words(Mean(0.4, 0.0), Mean(0.5, 0.02)).startswith(
        "The prior hole has grown by 25 % (15 to 35)."
    )


def test_a_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would choose by itself, with other rows."""
    monkeypatch.setattr(sys.modules["ncprior.recipe.improve"], "num_ranks", lambda: 2)
    with pytest.raises(
        ValueError, match=r"got a process group of 2 ranks. Call it in one process"
    ):
        improve(flat(), torch.randn(99, 3), progress=False)


def test_a_base_with_a_density_for_all_rows_beats_one_without() -> None:
    """-∞ - x is no number, and the base of probability 0 stayed."""
    known, unknown = torch.randn(50) - 3, torch.randn(50)
    unknown[7] = -math.inf
    assert base._is_better(known, unknown) and not base._is_better(unknown, known)


@pytest.mark.usefixtures("quick")
def test_samples_of_the_report_have_no_graph() -> None:
    x, vae = torch.randn(200, 2), nn.Linear(2, 2).eval()
    nn.init.eye_(vae.weight)
    prior = Independent(Normal(torch.zeros(2), 1.0), 1)

    def posterior(x: Tensor) -> Independent:
        return Independent(Normal(vae(x), 0.1, validate_args=False), 1)

    source = SingleGroup(prior, posterior, vae, module=vae)
    report = improve(source, x, budget=np.int64(5), seed=np.int64(0), progress=False).report
    assert not any(x.requires_grad for x in {**report.samples, **report.latents}.values())
    assert json.loads(report.to_json())["budget"] == 5


@pytest.mark.usefixtures("quick")
def test_the_strength_is_matched_on_rows_and_not_on_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of small batches, a few rows were taken; warnings of the user's code are shown."""
    counts = []

    def noted(prior: NCPrior, batches: Any, *_: Any, **__: Any) -> float:
        counts.append(sum(map(len, batches)))
        warnings.warn("of the encoder", stacklevel=1)
        return 1.0

    monkeypatch.setattr(recipe_sampler, "match_strength", noted)
    prior = NCPrior(flat(), MLPHead((2,), width=8)).eval()
    prior.sampler = partial(sir, num_proposals=20)
    parts = parts_of(torch.randn(900, 3), None, seed=0)
    parts = parts._replace(choose=list(torch.randn(600, 3).split(4)))
    record = Record(progress=False, max_seconds=None)
    with pytest.warns(UserWarning, match="of the encoder"):
        recipe_sampler.choose_strength(prior, parts, record)
    assert counts == [600]
    assert record.choices[-1].reason.startswith("the mean log r")


def test_a_failed_call_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Its seed.txt refused the next call with other arguments."""
    x = torch.randn(99, 3)
    with pytest.raises(ValueError, match="NaN"):
        improve(flat(), x.log(), seed=0, checkpoint=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


class Curved:
    """An own prior in 16 dimensions that no mixture fits, without a density."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        self.first = 1.5 * torch.randn(8, 8, generator=draws)
        self.second = torch.randn(8, 16, generator=draws)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        angle = 6 * torch.rand(*sample_shape, 4)
        h = torch.sin(2 * torch.cat([angle.sin(), angle.cos()], -1) @ self.first)
        return h @ self.second / 2 + 0.02 * torch.randn(*sample_shape, 16)


def test_an_own_prior_without_a_density_stays_where_it_is_closer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No likelihood tells that mixtures are worse; the prior that replaced it was, by its own report."""
    make_quick(monkeypatch, steps=100)
    monkeypatch.setattr(judge, "_STEPS", 400)
    torch.manual_seed(0)
    x = Curved().sample((3000,))
    source = SingleGroup(
        Curved(), lambda x: Independent(Normal(x, 1e-3, validate_args=False), 1), lambda z: z
    )
    prior = improve(source, x, budget=10, seed=0, progress=False)
    assert chosen(prior)["keep"] == "the VAE's own prior"
    assert prior.source is source and prior.active == [False]
    assert "The new prior: the VAE's own prior, as all that was tried" in prior.report.verdict
    assert prior.sample(5).x.shape == (5, 16)
