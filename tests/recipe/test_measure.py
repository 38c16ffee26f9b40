"""Measurements for a report: the arms, their rows and conditions, and the verdict."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers.tables import Frame
from helpers.toys import VAE, base, everything, flat, ladder_prior, stir
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCPrior, SingleGroup, sir
from ncprior.bases import fit_gaussian, latents_of, rebase
from ncprior.data.generators import own_generators_restored
from ncprior.diagnostics import GroupReport, Report, Verdict, diagnose
from ncprior.diagnostics.calibration import Mean
from ncprior.heads.networks import MLPHead
from ncprior.recipe import judge, measure, report_on
from ncprior.recipe.choices import DATA
from ncprior.recipe.judge import Divergences, Gap
from ncprior.recipe.parts import parts_for_report
from ncprior.recipe.record import Record
from ncprior.recipe.sources import bases_of

SAMPLER = partial(sir, num_proposals=20)
MADE = Report((GroupReport(0, Verdict.OFF),), 100, 8192, (5, 50))  # spares a diagnosis


def gap(jsd: float, num_steps: int = 1000) -> Gap:
    found = Divergences([Mean(jsd, 0.01)], Mean(jsd, 0.01), 1000)
    return Gap(found, found, num_steps)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps without classifiers, which take seconds."""
    gaps = {"old prior": gap(0.4), "fitted base": gap(0.1), "new prior": gap(0.02)}
    monkeypatch.setattr(measure, "measure_gaps", lambda *_: gaps)


class Identity(SingleGroup):
    """A VAE whose latents are x and whose prior is N(0, I)."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__(base(dim), self._q, self._same)

    @staticmethod
    def _q(x: Tensor) -> Independent:
        return Independent(Normal(x, 1e-3, validate_args=False), 1)

    @staticmethod
    def _same(z: Tensor) -> Tensor:
        return z


def test_a_table_keeps_the_names_of_its_columns(known: None) -> None:
    prior = NCPrior(Identity(), MLPHead((2,), width=8, depth=1))
    table = Frame(age=torch.randn(40).numpy(), height=torch.randn(40).numpy())
    report = report_on(prior, table, sampler=SAMPLER, diagnosis=MADE)
    assert report.columns == ("age", "height")
    assert report._replace(samples={}).to_dict()["columns"] == ["age", "height"]
    assert report_on(prior, torch.randn(40, 2), sampler=SAMPLER, diagnosis=MADE).columns == ()


def test_every_arm_has_its_own_draws_and_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encodings are N(3, I), three standard deviations away from the old prior."""
    monkeypatch.setattr(judge, "_STEPS", 300)
    monkeypatch.setattr(judge, "_CACHED", (500, 2000))
    x = torch.randn(500, 2) + 3
    source = rebase(Identity(), fit_gaussian(x))
    head = MLPHead((2,), width=32, depth=1)
    report = report_on(NCPrior(source, head), x, sampler=SAMPLER, diagnosis=MADE)
    means = {arm: z.mean(0).round().tolist() for arm, z in report.latents.items()}
    shifted = [3.0, 3.0]
    assert means == {
        "old prior": [0.0, 0.0], "fitted base": shifted, "new prior": shifted, "posterior": shifted,
    }  # fmt: skip
    assert list(report.samples) == ["held-out data", *report.latents]
    assert {len(z) for z in (*report.latents.values(), *report.samples.values())} == {500}
    torch.testing.assert_close(
        report.samples["posterior"], report.samples["held-out data"], atol=0.01, rtol=0
    )
    assert list(report.scores) == ["old prior", "fitted base", "new prior"]
    assert report.scores["old prior"].low > 0.5  # of log 2; 0.62 in truth
    assert report.scores["new prior"].low == 0.0
    assert report.scores["new prior"].high < 0.05
    assert report.verdict.startswith("Prior hole closed: ")


def test_without_a_fitted_base_or_heads_there_are_fewer_priors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judge, "remaining_gap", lambda *_, name: gap(len(name)))
    x = torch.randn(60, 2)
    parts = parts_for_report(None, x, 0)
    assert parts is not None

    def measured(prior: NCPrior) -> dict[str, Gap]:
        record = Record(progress=False, max_seconds=None)
        return judge.measure_gaps(prior, SAMPLER, bases_of(prior.source, x), parts, record)

    prior = NCPrior(Identity(), MLPHead((2,)))
    assert list(measured(prior)) == ["old prior", "new prior"]
    prior = NCPrior(rebase(Identity(), fit_gaussian(torch.randn(99, 2))), MLPHead((2,)))
    gaps = measured(prior)
    assert list(gaps) == ["old prior", "fitted base", "new prior"]
    prior.active = [False]
    gaps = measured(prior)
    assert gaps["new prior"] is gaps["fitted base"]
    report = report_on(prior, torch.randn(60, 2), sampler=SAMPLER, diagnosis=MADE)
    assert list(report.scores) == ["old prior", "new prior"] == [*report.latents][:2]


@pytest.mark.parametrize("size", [1, 3, 32])
def test_halves_of_batches_have_all_rows_and_the_loader_is_as_it_was(size: int) -> None:
    """Batches of one row were left out."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(torch.arange(100.0), size, shuffle=True, generator=generator)
    before = generator.get_state()
    with own_generators_restored(loader):
        parts = parts_for_report(None, loader, 0)
    assert torch.equal(generator.get_state(), before)
    assert parts is not None
    rows = [torch.cat(part) for part in (parts.train, parts.choose, parts.judge)]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(100.0))
    assert abs(len(rows[0]) - 50) <= 1 and abs(len(rows[1]) - 25) <= 2


@pytest.mark.usefixtures("known")
def test_a_report_repeats_itself_with_a_loader_that_shuffles() -> None:
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(torch.randn(64, 3), 16, shuffle=True, generator=generator)
    prior = stir(NCPrior(flat(), MLPHead((2,), width=4, depth=1))).eval()
    first, second = (
        report_on(prior, loader, sampler=SAMPLER, diagnosis=MADE, seed=3) for _ in range(2)
    )
    assert torch.equal(first.latents["posterior"], second.latents["posterior"])
    assert generator.initial_seed() == 0
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_a_gap_that_there_was_no_time_to_measure_is_no_result() -> None:
    gaps = {"old prior": gap(0.0, num_steps=1), "new prior": gap(0.0)}
    assert judge.verdict(gaps).startswith("The prior hole was not measured. There was time for 1 ")
    gaps["old prior"] = gap(0.0)
    assert judge.verdict(gaps).startswith("No prior hole was found.")
    gaps["old prior"] = gap(0.4)
    assert judge.verdict(gaps).startswith("Prior hole closed: 100 %")


@pytest.mark.usefixtures("known")
def test_the_new_prior_is_that_of_the_sampler() -> None:
    prior = stir(NCPrior(flat(), MLPHead((2,), width=4, depth=1))).eval()
    x = torch.randn(40, 3)
    first, second = (
        report_on(prior, x, sampler=partial(sir, num_proposals=m), diagnosis=MADE)
        for m in (1, 200)
    )
    assert not torch.equal(first.latents["new prior"], second.latents["new prior"])
    assert (first.sampler, second.sampler) == ("sir(num_proposals=1)", "sir(num_proposals=200)")


@pytest.mark.usefixtures("known")
def test_rows_are_random_of_all_data_and_images_few() -> None:
    """Data may be in the order of its classes."""
    image = torch.arange(5000.0)[:, None, None, None].expand(-1, 1, 2, 2)
    numbers = TensorDataset(image.contiguous())
    vae = SingleGroup(
        base(4),
        lambda x: Independent(Normal(x.flatten(1), 1e-3), 1),
        lambda z: z.reshape(-1, 1, 2, 2),
    )
    prior = NCPrior(vae, MLPHead((4,)))
    data = DataLoader(numbers, batch_size=999)
    report = report_on(prior, data, sampler=SAMPLER, diagnosis=MADE, num_rows=300)
    z, shown = report.latents["posterior"][:, 0], report.samples["held-out data"][:, 0, 0, 0]
    assert (len(z), len(shown)) == (300, 64)
    assert len(z.round().unique()) == 300
    for found in (z, shown):  # the mean of n of 0, …, 4999, within 4 standard errors
        assert abs(found.mean() - 2499.5) < 4 * 1443.4 / len(found) ** 0.5
    assert not torch.equal(shown, shown.sort().values)
    assert torch.equal(report.samples["posterior"][:, 0, 0, 0].round(), shown)


@pytest.mark.usefixtures("known")
def test_draws_have_the_conditions_of_the_data() -> None:
    vae = VAE(condition=1)
    source = SingleGroup(
        base(), vae.posterior, lambda z, c: c.expand(-1, 3), condition=lambda b: b[1]
    )
    prior = NCPrior(source, MLPHead((2,), context_shape=(1,)))
    x, c = torch.randn(100, 3), torch.arange(100.0)[:, None]
    report = report_on(prior, TensorDataset(x, c), sampler=SAMPLER, diagnosis=MADE)
    for arm in ("old prior", "new prior", "posterior"):
        assert (report.samples[arm][:, 0].sort().values == c[:, 0]).all()


@pytest.mark.usefixtures("known")
def test_groups_are_concatenated_and_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, x = ladder_prior(num_groups=3), torch.randn(40, 3)
    report = report_on(prior, x, sampler=SAMPLER, diagnosis=MADE)
    assert report.latents["new prior"].shape == (40, 6)
    monkeypatch.setattr(measure, "_MOST_NUMBERS", 3)
    report = report_on(prior, x, sampler=SAMPLER, diagnosis=MADE)
    assert report.latents["new prior"].shape == (40, 3)
    assert report.details["Groups"] == "3"


@pytest.mark.usefixtures("known")
def test_changes_nothing_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "diagnose", partial(diagnose, num_draws=64, fresh_steps=2))
    prior = stir(NCPrior(flat(), MLPHead((2,), width=4, depth=1, dropout=0.5))).train()
    x = torch.randn(40, 3)
    before, state = torch.get_rng_state(), everything(prior)
    vae = everything(prior.source.module)
    first, second = (report_on(prior, x, sampler=SAMPLER, budget=10) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert everything(prior) == state and everything(prior.source.module) == vae
    assert first.diagnosis is not None and first.diagnosis.num_proposals == (1, 10)
    assert first._replace(seconds=0).to_dict() == second._replace(seconds=0).to_dict()
    assert all(torch.equal(z, second.latents[arm]) for arm, z in first.latents.items())
    other = report_on(prior, x, sampler=SAMPLER, diagnosis=MADE, seed=1)
    assert not torch.equal(other.latents["old prior"], first.latents["old prior"])


@pytest.mark.usefixtures("known")
def test_a_prior_without_heads_needs_no_sampler() -> None:
    prior = NCPrior(flat(), MLPHead((2,)))
    prior.active = [False]
    assert report_on(prior, torch.randn(30, 3), diagnosis=MADE).latents


@pytest.mark.usefixtures("known")
def test_data_are_shown_as_the_decoder_returns_them() -> None:
    """A VAE may see normalised images, and decode others."""

    class Halved(SingleGroup):
        def observed(self, batch: Any) -> Tensor:
            return 0.5 * super().observed(batch)

    vae = flat()
    prior = NCPrior(Halved(vae.prior, vae._posterior, vae._decoder), MLPHead((2,)))
    report = report_on(prior, torch.ones(30, 3), sampler=SAMPLER, diagnosis=MADE)
    assert (report.samples[DATA] == 0.5).all()


@pytest.mark.usefixtures("known")
def test_few_rows_have_no_verdict_but_a_page() -> None:
    prior = NCPrior(flat(), MLPHead((2,)))
    report = report_on(prior, torch.randn(30, 3), sampler=SAMPLER, diagnosis=MADE)
    assert not report.scores
    assert "too few" in report.verdict
    assert "too few" in report.to_html()


@pytest.mark.usefixtures("known")
def test_wrong_arguments_and_rows_are_named() -> None:
    prior, x = NCPrior(flat(), MLPHead((2,))), torch.randn(40, 3)
    with pytest.raises(ValueError, match="has no sampler yet"):
        report_on(prior, x)
    with pytest.raises(TypeError, match="diagnosis must be of type Report"):
        report_on(prior, x, sampler=SAMPLER, diagnosis={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_rows must be a whole number in"):
        report_on(prior, x, sampler=SAMPLER, num_rows=1)
    with pytest.raises(ValueError, match="must be finite; got NaN or infinity in 1 of 40 rows"):
        bad = torch.cat([x[:39], x[:1] * torch.nan])
        report_on(NCPrior(Identity(3), MLPHead((3,))), bad, sampler=SAMPLER, diagnosis=MADE)
    with pytest.raises(TypeError, match="prior must be of type NCPrior"):
        report_on(flat(), x, sampler=SAMPLER)  # type: ignore[arg-type]


@pytest.mark.usefixtures("known")
def test_latents_of_the_base_are_those_of_the_data() -> None:
    """The arm of the base draws from the prior that was put on, not from the VAE's."""
    source, x = flat(), torch.randn(300, 3)
    closer = rebase(source, fit_gaussian(latents_of(source, x)))
    report = report_on(NCPrior(closer, MLPHead((2,))), x, sampler=SAMPLER, diagnosis=MADE)
    spread = {arm: z.std(0).mean() for arm, z in report.latents.items()}
    assert abs(spread["fitted base"] - spread["posterior"]) < 0.2 * spread["posterior"]
    assert report.details["VAE"] == "SingleGroup"
