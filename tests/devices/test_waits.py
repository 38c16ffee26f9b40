"""How often the host waits for the device: counted over runs of two lengths, and bounded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from helpers.device_vaes import KINDS, codes, hierarchical
from helpers.emulated_device.waits import Waits
from helpers.toys import stir
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCETrainer, NCPrior, SingleGroup, fit, langevin, sir
from ncprior.bases import (
    Empirical,
    fit_flow,
    fit_flow_matching,
    fit_gaussian,
    fit_mixture,
    rebase,
)
from ncprior.evaluation import log_likelihood
from ncprior.heads import MLPHead
from ncprior.samplers import (
    budgeted_rejection,
    independence,
    rejection,
    smc,
    tempered_smc,
    within_components,
)
from ncprior.training import FitSettings
from ncprior.training.held_out import HeldOut
from ncprior.vaebm import VAEBM, VAEBMTrainer

Count = Callable[[], AbstractContextManager[Waits]]

New = Callable[..., NCPrior]


@pytest.fixture(autouse=True)
def gpu(on: torch.device) -> None:
    if on.type != "cuda":
        pytest.skip("waits are counted on CUDA")


@pytest.fixture
def extra(waits: Count) -> Callable[..., Waits]:
    """Waits of ``run(many)`` beyond those of ``run(few)``, after a first run."""

    def measure(run: Callable[[int], Any], few: int = 2, many: int = 6) -> Waits:
        found = []
        for count in (few, few, many):
            torch.manual_seed(0)
            with waits() as seen:
                run(count)
            found.append(seen)
        return Waits(found[2] - found[1])

    return measure


def test_waits_are_seen_with_their_lines(waits: Count, on: torch.device) -> None:
    x = torch.ones(3, device=on)
    with waits() as seen:
        assert x.sum().item() == 3
        x[x > 0]
        x + 1
    assert seen.total() == 2
    assert all("test_waits.py" in line for line in seen)


def chunks(prior: NCPrior, count: int) -> Any:
    return prior.sample(16, partial(sir, num_proposals=1 + 4 * count, chunk_size=64))


def steps(prior: NCPrior, count: int, **options: Any) -> Any:
    return prior.sample(16, partial(langevin, num_steps=count, step_size=0.01, **options))


BASES: dict[str, Callable[[Tensor], Any]] = {
    "Gaussian": fit_gaussian,
    "mixture": lambda z: fit_mixture(z, 3, starts=1, max_steps=3),
    "diagonal mixture": lambda z: fit_mixture(z, 3, covariance="diagonal", starts=1, max_steps=3),
    "flow": lambda z: fit_flow(z, steps=2, progress=False),
    "flow matching": lambda z: fit_flow_matching(
        z, width=8, depth=1, num_steps=2, steps=2, progress=False
    ),
    "encodings": Empirical,
}


@pytest.mark.parametrize("base", BASES)
def test_sir_waits_for_no_chunk_on_any_base(
    base: str, source: SingleGroup, new: New, z: Tensor, extra: Callable[..., Waits]
) -> None:
    if base == "flow":
        pytest.importorskip("zuko")
    prior = new(rebase(source, BASES[base](z)))
    assert not extra(partial(chunks, prior))


def test_sir_waits_for_no_chunk_of_the_vaes_own_priors(
    prior: NCPrior, on: torch.device, extra: Callable[..., Waits]
) -> None:
    assert not extra(partial(chunks, prior))
    for kind in (hierarchical(on), codes(on)):
        heads = NCPrior.for_source(kind.source, kind.batch, width=8, depth=1)
        assert not extra(partial(chunks, heads))


def test_samplers_within_components_wait_for_no_chunk_and_no_step(
    source: SingleGroup, new: New, z: Tensor, extra: Callable[..., Waits]
) -> None:
    prior = new(rebase(source, BASES["mixture"](z)))

    def within(count: int) -> None:
        prior.sample(
            16, within_components(partial(sir, num_proposals=1 + 4 * count, chunk_size=64))
        )
        prior.sample(16, within_components(partial(langevin, num_steps=count, step_size=0.1)))

    assert not extra(within)


@pytest.mark.parametrize("share", (False, True))
def test_budgeted_rejection_waits_for_no_chunk(
    share: bool, prior: NCPrior, extra: Callable[..., Waits]
) -> None:
    def accept(count: int) -> None:
        few = partial(budgeted_rejection, chunk_size=64, share_proposals=share)
        prior.sample(16, partial(few, num_proposals=1 + 4 * count))

    assert not extra(accept)


@pytest.mark.parametrize("adjusted", (False, True))
def test_langevin_waits_for_no_step(
    adjusted: bool, prior: NCPrior, source: SingleGroup, new: New, z: Tensor, extra: Any
) -> None:
    for heads in (prior, new(rebase(source, BASES["mixture"](z)))):
        assert not extra(partial(steps, heads, adjusted=adjusted))


def test_chains_of_an_energy_wait_for_no_step(
    prior: NCPrior, on: torch.device, extra: Callable[..., Waits]
) -> None:
    model = VAEBM(prior, MLPHead((6,), width=8, depth=1).to(on))
    for adjusted in (False, True):
        run = partial(model.run_chains, model.draw_noise(8), adjusted=adjusted)
        assert not extra(lambda count, run=run: run(num_steps=count))


def test_smc_waits_once_per_temperature(
    new: New, waits: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, heats = stir(new(), 3.0), []
    heat = smc._Particles.heat
    monkeypatch.setattr(smc._Particles, "heat", lambda *a: heats.append(1) or heat(*a))
    with waits() as seen:
        prior.sample(16, partial(tempered_smc, num_particles=16, max_temperatures=200))
    assert len(heats) >= 3
    assert seen.total() <= len(heats) + 3  # the end of the chains, z, and x


def test_a_rejection_waits_once_per_try_and_independence_for_no_chunk(
    prior: NCPrior, extra: Callable[..., Waits]
) -> None:
    def tries(count: int) -> None:
        prior.sample(16, partial(rejection, log_bound=50.0, max_tries=count))

    assert extra(tries).total() <= 4
    assert not extra(
        lambda n: prior.sample(16, partial(independence, num_steps=4 * n, chunk_size=64))
    )


def test_a_step_of_training_waits_once(
    new: New, x: Tensor, on: torch.device, extra: Callable[..., Waits]
) -> None:
    kind = hierarchical(on)
    deep = NCPrior.for_source(kind.source, kind.batch, width=8, depth=1)
    for prior, batch in ((new(), x[:64].to(on)), (deep, kind.batch.to(on))):
        trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters(), lr=1e-4))
        found = extra(lambda n, t=trainer, b=batch: [t.step(b) for _ in range(n)])
        assert found.total() <= 4


@pytest.mark.parametrize("kind", ("nvae", "nvae with flows", "snis", "lars"))
def test_an_adapter_reads_the_pixels_of_its_first_batch_alone(
    kind: str, on: torch.device, extra: Callable[..., Waits]
) -> None:
    made = KINDS[kind](on)
    prior = NCPrior.for_source(made.source, made.batch, width=8, depth=1)
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters(), lr=1e-4))
    found = extra(lambda n: [trainer.step(made.batch) for _ in range(n)])
    assert not [line for line in found if "vae.py" in line or "nvae/source.py" in line]


def test_cells_are_read_twice_per_batch(on: torch.device, extra: Callable[..., Waits]) -> None:
    kind = KINDS["scvi"](on)
    source, x = kind.source, {name: column.to(on) for name, column in kind.batch.items()}
    found = extra(lambda n: [source.start(len(x["X"]), source.encode(x)) for _ in range(n)])
    assert sum(count for line, count in found.items() if "scvi/conditions.py" in line) <= 8


def test_langevin_waits_for_no_step_on_lars(on: torch.device, extra: Callable[..., Waits]) -> None:
    kind = KINDS["lars"](on)
    prior = NCPrior.for_source(kind.source, kind.batch, width=8, depth=1)
    assert not extra(partial(steps, prior))


FORMS: dict[str, dict[str, Any]] = {
    "a cache": {},
    "no cache": {"settings": FitSettings(cache_epochs=None)},
    "score term": {"settings": FitSettings(score_weight=10.0)},
    "importance samples": {"settings": FitSettings(importance_samples=8, cache_epochs=8)},
    "stages": {"stages": 1, "settings": FitSettings(num_draws=2)},
}


@pytest.mark.parametrize("is_loader", (False, True))
@pytest.mark.parametrize("form", FORMS)
def test_fit_waits_once_per_step(
    form: str, is_loader: bool, new: New, x: Tensor, extra: Callable[..., Waits]
) -> None:
    data = DataLoader(TensorDataset(x), 32, drop_last=True) if is_loader else x

    def train(count: int) -> None:
        options: dict[str, Any] = {"batch_size": 32, "eval_every": 10**6, "progress": False}
        fit(new(), data, held_out=x[:40], steps=count, **options, **FORMS[form])

    assert extra(train, 12, 22).total() <= 10  # two epochs of 5 steps


def test_importance_samples_of_each_step_wait_once_more(
    new: New, x: Tensor, extra: Callable[..., Waits]
) -> None:
    chosen = FitSettings(importance_samples=8, cache_epochs=None)

    def train(count: int) -> None:
        options: dict[str, Any] = {"batch_size": 32, "eval_every": 10**6, "progress": False}
        fit(new(), x, held_out=x[:40], steps=count, settings=chosen, **options)

    assert extra(train, 12, 22).total() <= 20


def test_held_out_losses_wait_once_per_evaluation(
    new: New, x: Tensor, on: torch.device, extra: Callable[..., Waits]
) -> None:
    kind = hierarchical(on)
    prior = NCPrior.for_source(kind.source, kind.batch, width=8, depth=1)
    # 4 batches each; 3 groups and 1.
    for measure in (HeldOut(kind.data, prior, 12, 0), HeldOut(x, new(), 40, 0)):
        assert extra(lambda n, m=measure: [m(on) for _ in range(n)]).total() <= 4


def test_a_step_of_an_energy_waits_once(
    prior: NCPrior, x: Tensor, on: torch.device, extra: Callable[..., Waits]
) -> None:
    model = VAEBM(prior, MLPHead((6,), width=8, depth=1).to(on), num_steps=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    trainer = VAEBMTrainer(model, optimizer)
    batch = x[:32].to(on)
    assert extra(lambda n: [trainer.step(batch) for _ in range(n)]).total() <= 4


def test_a_likelihood_waits_once_per_batch(
    prior: NCPrior, x: Tensor, extra: Callable[..., Waits]
) -> None:
    def measure(rows: Tensor, samples: int) -> None:
        log_likelihood(prior, rows, num_samples=samples, num_proposals=9, chunk_size=64)

    assert not extra(partial(measure, x[:16]), 8, 32)
    assert extra(lambda n: measure(x[: 50 * n], 8), 1, 3).total() <= 2
