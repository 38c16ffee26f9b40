"""Training of energies: what is learnt, what stays, how it stops, and exact resume."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import standard_normal
from helpers.toys import VAE, base, everything, same, stir, weights
from helpers.vaebm_problems import LinearGaussian, Quadratic, Slope
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.utils.data import TensorDataset

from ncprior import NCPrior, SingleGroup, fit, sir
from ncprior.heads.networks import MLPHead
from ncprior.saving.tensors import load_tensors, save_tensors
from ncprior.vaebm.fit import EnergyHistory, EnergyRow, fit_vaebm
from ncprior.vaebm.gaussian_decoder import GaussianDecoder
from ncprior.vaebm.model import VAEBM
from ncprior.vaebm.replay import ReplayBuffer
from ncprior.vaebm.settings import EnergySettings
from ncprior.vaebm.trainer import VAEBMTrainer

PROBLEM = LinearGaussian()
QUIET = {"progress": False}


def marginal(source: SingleGroup) -> Any:
    """p(x) of the linear-Gaussian VAE."""
    mean, covariance = PROBLEM.law(Quadratic(3))
    return torch.distributions.MultivariateNormal(mean[2:].float(), covariance[2:, 2:].float())


def data(n: int = 200) -> Tensor:
    """The same x at every call."""
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(12))


def model(source: Any = None, **options: Any) -> VAEBM:
    """A small energy, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        net = stir(NCPrior(PROBLEM.source(), MLPHead((3,), width=8, depth=1)), 0.1).heads[0]
    options = {"num_steps": 3, "step_size": 0.1, **options}
    return VAEBM(PROBLEM.source() if source is None else source, net, **options)


def adam(of: VAEBM, learning_rate: float = 1e-3) -> torch.optim.Adam:
    return torch.optim.Adam(of.parameters(), learning_rate)


# --- what is learnt ---


@pytest.mark.parametrize("buffer_size", [0, 1000])
def test_the_energy_approaches_the_log_ratio(buffer_size: int) -> None:
    """Data are p(x) moved by δ: log p_data / p = δᵀΣ⁻¹x + const, and E is minus that."""
    source = PROBLEM.source()
    p, shift = marginal(source), torch.tensor([0.4, -0.3, 0.5])
    x = p.sample((4000,)) + shift
    energy = Quadratic(3)
    energy.a.requires_grad_(False)
    trained = VAEBM(source, energy, num_steps=16, step_size=0.4)
    history = fit_vaebm(
        *(trained, x),
        steps=100,
        batch_size=128,
        learning_rate=0.1,
        settings=EnergySettings(buffer_size=buffer_size, weight_decay=0.0),
        **QUIET,
    )
    exact = -torch.linalg.solve(p.covariance_matrix, shift)
    # The mean of n data is off by Σ/n, and E by Σ⁻¹ of that; the steps' own noise is averaged out.
    spread = (torch.linalg.inv(p.covariance_matrix).diagonal() / len(x)).sqrt()
    assert ((energy.h - exact).abs() < 4 * spread + 0.04).all()
    assert abs(history.rows[-1].gap) < 0.2
    assert exact.abs().max() > 0.5


def test_over_ncp_the_energy_learns_what_the_heads_leave() -> None:
    """With r the exact ratio of the latents and data of that very model, E stays flat."""
    source, head = PROBLEM.source(), Slope(0.6, 0.0)
    mean, covariance = PROBLEM.law(Quadratic(3), head)
    law = torch.distributions.MultivariateNormal(mean[2:].float(), covariance[2:, 2:].float())
    options: dict[str, Any] = {"steps": 60, "batch_size": 128, "learning_rate": 0.1}
    options["settings"] = EnergySettings(weight_decay=0.0)
    found = []
    for prior in (NCPrior(source, head), source):
        energy = Quadratic(3)
        energy.a.requires_grad_(False)
        trained = VAEBM(prior, energy, num_steps=16, step_size=0.4)
        fit_vaebm(trained, law.sample((4000,)), **options, **QUIET)
        found.append(energy.h.detach().norm().item())
    assert found[0] < 0.2 and found[1] > 0.4


# --- one step ---


def test_a_step_is_that_of_the_contrast_and_its_penalty() -> None:
    of, x = model(), data(16)
    trainer = VAEBMTrainer(
        of, torch.optim.SGD(of.parameters(), 0.1), spectral_weight=0.02, max_grad_norm=None
    )
    other = model()
    torch.manual_seed(3)
    chains = other.sample(16)
    gap = other.energy(x).mean() - other.energy(chains.x).mean()
    singular = torch.stack(
        [torch.linalg.matrix_norm(p, 2) for p in other.parameters() if p.ndim > 1]
    ).sum()
    gradients = torch.autograd.grad(gap + 0.02 * singular, list(other.parameters()))
    torch.manual_seed(3)
    metrics = trainer.step(x)
    assert torch.equal(metrics.gap, gap.detach())
    assert metrics.spectral.item() == pytest.approx(singular.detach().item(), rel=1e-3)
    assert metrics.energy.item() == pytest.approx(other.energy(x).mean().detach().item())
    for p, before, g in zip(of.parameters(), other.parameters(), gradients, strict=True):
        assert torch.allclose(p, before - 0.1 * g, atol=1e-4)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert metrics.grad_norm.item() == pytest.approx(norm.item(), rel=1e-2)


def test_gradients_are_clipped() -> None:
    of = model()
    before = weights(of)
    optimizer = torch.optim.SGD(of.parameters(), 1.0)
    metrics = VAEBMTrainer(of, optimizer, max_grad_norm=1e-3).step(data(16))
    moved = sum((t - before[name]).square().sum() for name, t in of.state_dict().items())
    assert metrics.grad_norm > 1e-3
    assert float(moved) ** 0.5 == pytest.approx(1e-3, rel=1e-2)


def test_the_mean_may_be_contrasted_instead_of_x() -> None:
    of, x = model(), data(16)
    torch.manual_seed(3)
    chains = of.sample(16)
    for contrast, drawn in (("x", chains.x), ("mean", chains.mean)):
        gap = (of.energy(x).mean() - of.energy(drawn).mean()).item()
        torch.manual_seed(3)
        trainer = VAEBMTrainer(of, torch.optim.SGD(of.parameters(), 0.0), contrast=contrast)
        torch.manual_seed(3)
        assert trainer.step(x).gap.item() == pytest.approx(gap, abs=1e-6)


def test_data_as_noisy_as_the_decoder_are_told_from_its_draws_by_nothing() -> None:
    """Of data that are means, E = |x|² is 3σ² below that of draws; two means err by sd(E)·√(2/n)."""
    n, energy = 20_000, Quadratic(3, a=2.0)
    models = [
        VAEBM(PROBLEM.source(), energy, num_steps=0, data_noise=sigma)
        for sigma in (0.0, PROBLEM.sigma)
    ]
    torch.manual_seed(1)
    means, x = models[0].sample(n).mean, models[0].sample(n).x
    gaps = [
        VAEBMTrainer(of, torch.optim.SGD(of.parameters(), 0.0)).step(means).gap for of in models
    ]
    error = energy(x).std().item() * (2 / n) ** 0.5
    assert abs(gaps[0] + 3 * PROBLEM.sigma**2) < 4 * error
    assert abs(gaps[1]) < 4 * error < 3 * PROBLEM.sigma**2


def test_chains_go_on_from_the_buffer() -> None:
    of = model()
    buffer = ReplayBuffer(16, fraction=1.0)
    trainer = VAEBMTrainer(of, torch.optim.SGD(of.parameters(), 0.0), buffer=buffer)
    trainer.step(data(16))
    ends = buffer.kept
    assert [tuple(part.shape) for part in ends] == [(16, 2), (16, 3)]
    of.num_steps = 0
    for start, end in zip(trainer.chains(data(16)).noise, ends, strict=True):
        distance = torch.cdist(start, end, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.amin(1).max() == 0


def test_chains_start_from_the_sampler_of_the_heads() -> None:
    prior = NCPrior(PROBLEM.source(), Slope(3.0, 0.0))
    of = model(prior, num_steps=0)
    sampler = partial(sir, num_proposals=100)
    trainers = [VAEBMTrainer(of, adam(of), sampler=s) for s in (None, sampler)]
    plain, drawn = (trainer.chains(data(500)).latents[0].mean().item() for trainer in trainers)
    assert plain < 0.6 and drawn > 2.0


def test_a_step_leaves_vae_and_heads_as_they_were() -> None:
    vae = VAE()
    vae.decoder[0].weight.grad = torch.ones_like(vae.decoder[0].weight)
    source = SingleGroup(
        *(base(), vae.posterior, vae.decode),
        module=vae,
        likelihood=lambda z: Independent(Normal(vae.decode(z), 0.3), 1),
    )
    prior = NCPrior(source, stir(NCPrior(source, MLPHead((2,), width=8))).heads)
    before = everything(vae), everything(prior.heads)
    of = model(prior)
    VAEBMTrainer(of, adam(of), sampler=partial(sir, num_proposals=5)).step(data(16))
    fit_vaebm(of, data(), steps=3, **QUIET)
    assert (everything(vae), everything(prior.heads)) == before
    vae.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        VAEBMTrainer(of, adam(of)).step(data(16))


def test_a_batch_may_be_a_tuple_with_a_condition_in_it() -> None:
    source = SingleGroup(
        standard_normal(2),
        lambda x, c: Independent(Normal(x[:, :2], 1.0), 1),
        lambda z, c: PROBLEM.decode(z) + c,
        likelihood=lambda z, c: Independent(Normal(PROBLEM.decode(z) + c, 0.1), 1),
        condition=lambda batch: batch[1],
    )
    of, batch = model(source), (data(16), torch.full((16, 1), 50.0))
    trainer = VAEBMTrainer(of, adam(of), condition=lambda batch: batch[1])
    assert trainer.chains(batch).mean.min() > 40
    assert torch.isfinite(trainer.step(batch).gap)
    history = fit_vaebm(
        *(of, TensorDataset(data(), torch.zeros(200, 1))),
        steps=2,
        condition=lambda batch: batch[1],
        **QUIET,
    )
    assert history.stopped == "all 2 steps taken"
    with pytest.raises(ValueError, match="needs a condition"):
        VAEBMTrainer(of, adam(of)).step(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": "y"}, "contrast must be one of 'x', 'mean'"),
        ({"spectral_weight": -1.0}, r"spectral_weight must be .* in \[0, inf\)"),
        ({"spectral_weight": float("nan")}, r"spectral_weight must be .* in \[0, inf\)"),
        ({"condition": len, "buffer": ReplayBuffer(3, 0.5)}, "Leave out one of the two"),
    ],
)
def test_options_of_a_step_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    of = model()
    with pytest.raises(ValueError, match=message):
        VAEBMTrainer(of, adam(of), **options)


def test_means_are_not_set_against_noisy_data() -> None:
    of = model(data_noise=0.1)
    with pytest.raises(
        ValueError, match="Means have no noise, and data of this model have σ = 0.1"
    ):
        VAEBMTrainer(of, adam(of), contrast="mean")


def test_bad_batches_and_optimizers_are_refused() -> None:
    of = model()
    trainer = VAEBMTrainer(of, adam(of))
    with pytest.raises(ValueError, match=r"must have one shape; got \(16, 2\) and \(16, 3\)"):
        trainer.step(data(16)[:, :2])
    other = torch.nn.Linear(3, 1)
    with pytest.raises(ValueError, match="not the energy's; the VAE stays frozen"):
        VAEBMTrainer(of, torch.optim.Adam(other.parameters()))
    assert trainer.steps == 0


def test_bytes_are_no_images_of_a_decoder_in_0_to_1() -> None:
    """They were set against images in [0, 1], and the energy learned the scale."""
    base = Independent(Normal(torch.zeros(3), 1.0), 1)

    def likelihood(z: Tensor) -> Independent:
        return Independent(Normal(z.sigmoid(), 0.1, validate_args=False), 1)

    source = SingleGroup(
        base, lambda x: likelihood(x.float()), torch.sigmoid, likelihood=likelihood
    )
    of = VAEBM(source, MLPHead((3,), width=8))
    trainer = VAEBMTrainer(of, adam(of))
    x = torch.randint(256, (16, 3), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"at most 1; got whole numbers up to \d+\. .* x / 255"):
        trainer.step(x)
    trainer.step(x > 127)  # binary images
    trainer.step(x / 255)


@pytest.mark.parametrize("where", ["data", "chains"])
def test_a_step_that_is_not_finite_changes_nothing(where: str) -> None:
    of, buffer = model(), ReplayBuffer(50, 0.5)
    trainer = VAEBMTrainer(of, adam(of), buffer=buffer)
    trainer.step(data(16))
    before, kept = weights(of), [part.clone() for part in buffer.kept]
    if where == "chains":
        of.step_size = 1e30
    x = data(16) * torch.nan if where == "data" else data(16)
    message = "gap is nan with .* at step 1" if where == "data" else "not finite at step"
    with pytest.raises(FloatingPointError, match=message):
        trainer.step(x)
    assert same(weights(of), before) and trainer.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(buffer.kept, kept, strict=True))


# --- the loop ---


def test_the_loop_is_adam_with_cosine_on_the_steps() -> None:
    batches = list(data(16 * 6).split(16))
    of, other = model(), model()
    torch.manual_seed(3)
    history = fit_vaebm(
        *(of, batches),
        steps=6,
        eval_every=3,
        learning_rate=1e-2,
        settings=EnergySettings(ema_decay=0.0),
        **QUIET,
    )
    torch.manual_seed(3)
    trainer = VAEBMTrainer(other, torch.optim.Adam(other.parameters(), 1e-2, weight_decay=3e-5))
    torch.randint(2**31, ())  # the seed of the data's own randomness
    gaps = []
    for t, x in enumerate(batches):
        trainer.optimizer.param_groups[0]["lr"] = 0.5 * 1e-2 * (1 + np.cos(np.pi * t / 6))
        gaps.append(trainer.step(x).gap.item())
    assert same(weights(of), weights(other))  # decay 0: the average is the last weights
    assert [row.step for row in history.rows] == [3, 6]
    assert history.rows[0].gap == pytest.approx(sum(gaps[:3]) / 3, rel=1e-4)
    assert history.rows[1].gap == pytest.approx(sum(gaps[3:]) / 3, rel=1e-4)
    assert history.stopped == "all 6 steps taken" and history.kept_step == 6
    assert not of.training and all(p.grad is None for p in of.parameters())


def test_the_kept_weights_are_an_average() -> None:
    last, mean = model(), model()
    for of, decay in ((last, 0.0), (mean, 0.9)):
        torch.manual_seed(3)
        settings = EnergySettings(ema_decay=decay)
        fit_vaebm(of, data(), steps=10, learning_rate=0.05, settings=settings, **QUIET)
    start = weights(model())
    moved = [
        sum((t - start[name]).abs().sum().item() for name, t in of.state_dict().items())
        for of in (last, mean)
    ]
    assert 0 < moved[1] < moved[0]


def test_a_run_away_gap_stops_it_with_the_weights_of_the_row_before() -> None:
    of = VAEBM(PROBLEM.source(), Quadratic(3), num_steps=1, step_size=1e-4)  # which cannot follow
    seen: list[dict[str, Tensor]] = []
    history = fit_vaebm(
        *(of, data() + 3.0),
        steps=200,
        eval_every=5,
        learning_rate=0.2,
        settings=EnergySettings(max_gap=30.0, ema_decay=0.0),
        callback=lambda row: seen.append(weights(of)),
        **QUIET,
    )
    assert history.diverged and history.stopped.startswith(
        f"diverged at step {history.rows[-1].step}: the energy gap is -"
    )
    assert abs(history.rows[-1].gap) > 30 >= abs(history.rows[-2].gap)
    assert history.kept_step == history.rows[-2].step
    assert same(weights(of), seen[-2])


def test_what_is_not_finite_stops_it_with_the_weights_of_the_row_before() -> None:
    x = list(data(16 * 10).split(16))
    x[7] = x[7] * torch.nan
    of, seen = model(), []
    history = fit_vaebm(
        *(of, x),
        steps=10,
        eval_every=3,
        settings=EnergySettings(ema_decay=0.0),
        callback=lambda row: seen.append(weights(of)),
        **QUIET,
    )
    assert history.diverged and "diverged at step 7: The energy gap is nan" in history.stopped
    assert [row.step for row in history.rows] == [3, 6, 7] and history.kept_step == 6
    assert same(weights(of), seen[1])
    worst = model()
    start = weights(worst)
    none = fit_vaebm(worst, [x[7]], steps=5, **QUIET)
    assert none.diverged and none.rows == [] and none.kept_step == 0
    assert same(weights(worst), start)
    assert str(none).startswith("weights of step 0; diverged at step 0")


def test_a_callback_stops_it() -> None:
    rows: list[EnergyRow] = []

    def callback(row: EnergyRow) -> bool:
        rows.append(row)
        return row.step >= 4

    history = fit_vaebm(model(), data(), steps=50, eval_every=2, callback=callback, **QUIET)
    assert history.stopped == "stopped by the callback at step 4" and history.rows == rows
    used_up = fit_vaebm(model(), iter(data().split(50)), steps=50, **QUIET)
    assert used_up.stopped == "data used up after 4 of 50 steps"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "^steps must be .*; got 0"),
        ({"batch_size": 0}, "batch_size must be .*; got 0"),
        ({"eval_every": 0}, "eval_every must be .*; got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be .*; got 0"),
        ({"ema_decay": 1.5}, "ema_decay must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be"),
        ({"buffer_size": -1}, "buffer_size must be .*; got -1"),
        ({"max_gap": 0.0}, "max_gap must be .*; got 0.0"),
        ({"max_gap": float("nan")}, "max_gap must be .*; got nan"),
        ({"contrast": "nothing"}, "contrast must be one of"),
        ({"buffer_size": 5, "replay_fraction": 2.0}, "replay_fraction must be .*; got 2.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    of = model()
    before = weights(of)
    with pytest.raises(ValueError, match=message):
        fit_vaebm(of, data(), **sorted_out(options), **QUIET)
    assert same(weights(of), before)


def sorted_out(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `fit_vaebm`, with those of `EnergySettings` put into one."""
    names = {part.name for part in fields(EnergySettings)}
    given = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return {**rest, "settings": EnergySettings(**given)}


# --- checkpoints ---

SETTINGS: dict[str, Any] = {
    "steps": 12,
    "batch_size": 16,
    "eval_every": 3,
    "checkpoint_every": 2,
    "learning_rate": 1e-2,
    "settings": EnergySettings(buffer_size=40, ema_decay=0.9),
}


class Stop(Exception):
    """Stands in for a crash."""


def scramble(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def lines(history: EnergyHistory) -> list[tuple[Any, ...]]:
    """A history without its seconds."""
    return [tuple(row[:-1]) for row in history.rows]


def crash_at(step: int) -> Any:
    def callback(row: EnergyRow) -> None:
        if row.step >= step:
            raise Stop

    return callback


@pytest.mark.parametrize("crash", [3, 6, 12])
def test_a_resumed_training_equals_the_uninterrupted_one(crash: int, tmp_path: Path) -> None:
    scramble(1)
    whole = model()
    expected = fit_vaebm(whole, data(), **SETTINGS, **QUIET)
    path = tmp_path / "checkpoint"
    scramble(1)
    with pytest.raises(Stop):
        fit_vaebm(model(), data(), checkpoint=path, callback=crash_at(crash), **SETTINGS, **QUIET)
    scramble(2)  # another process
    resumed = stirred_model()
    history = fit_vaebm(resumed, data(), checkpoint=path, **SETTINGS, **QUIET)
    assert same(weights(resumed), weights(whole))
    assert lines(history) == lines(expected) and history[1:] == expected[1:]
    again = fit_vaebm(stirred_model(), data(), checkpoint=path, **SETTINGS, **QUIET)
    assert lines(again) == lines(expected)  # a finished one does not go on


def stirred_model() -> VAEBM:
    of = model()
    with torch.no_grad():
        for p in of.parameters():
            p.add_(torch.randn_like(p))
    return of


def test_a_training_that_diverged_is_taken_up_as_such(tmp_path: Path) -> None:
    x = list(data(16 * 12).split(16))
    x[7] = x[7] * torch.nan
    found = []
    for of in (model(), stirred_model()):
        history = fit_vaebm(of, x, checkpoint=tmp_path / "checkpoint", **SETTINGS, **QUIET)
        found.append(
            (lines(history), history[1:], {n: t.tolist() for n, t in weights(of).items()})
        )
    assert found[0] == found[1] and found[0][1][2]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 13},
        {"buffer_size": 0},
        {"spectral_weight": 0.5},
        {"data_noise": 0.5},
        {"step_size": 0.2},
        {"heads": True},
        {"rows": 100},
        {"langevin_target": "official"},
        {"precision": torch.bfloat16},
        {"sigma": 0.9},
        {"strength": 0.5},
        {"sampler": partial(sir, num_proposals=2)},
        {"own sampler": partial(sir, num_proposals=2)},
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    over = None
    if change.keys() & {"strength", "sampler", "own sampler"}:
        over = NCPrior(PROBLEM.source(), Slope(0.1, 0.0))
    fit_vaebm(model(over), data(), checkpoint=path, **SETTINGS, **QUIET)
    settings = {**SETTINGS, **{k: v for k, v in change.items() if k in ("steps", "sampler")}}
    other = {k: v for k, v in change.items() if k in ("buffer_size", "spectral_weight")}
    settings["settings"] = replace(SETTINGS["settings"], **other)
    if "heads" in change:
        over = NCPrior(PROBLEM.source(), Slope(0.1, 0.0))
    if "sigma" in change:
        over = GaussianDecoder(PROBLEM.source(), change["sigma"])
    if "strength" in change:
        over.strength = change["strength"]
    if "own sampler" in change:
        over.sampler = change["own sampler"]
    of_chains = ("step_size", "langevin_target", "data_noise", "precision")
    chains = {k: v for k, v in change.items() if k in of_chains}
    of = model(over, **chains)
    before = weights(of)
    with pytest.raises(ValueError, match="The checkpoint belongs to a training with"):
        fit_vaebm(of, data(change.get("rows", 200)), checkpoint=path, **settings, **QUIET)
    assert same(weights(of), before)


@pytest.mark.parametrize("at", [6, SETTINGS["steps"]])
def test_a_training_that_a_callback_stopped_goes_on(at: int, tmp_path: Path) -> None:
    """A stop at the last step is its end."""
    path, of, end = tmp_path / "checkpoint", model(), f"all {SETTINGS['steps']} steps taken"
    stopped = fit_vaebm(
        of, data(), checkpoint=path, callback=lambda row: row.step == at, **SETTINGS, **QUIET
    )
    assert stopped.stopped == ("stopped by the callback at step 6" if at == 6 else end)
    for _ in range(2):
        history = fit_vaebm(of, data(), checkpoint=path, **SETTINGS, **QUIET)
        assert history.stopped == end
        assert history.rows[: len(stopped.rows)] == stopped.rows
        assert history.rows[-1].step == SETTINGS["steps"]


def test_checkpoints_of_heads_and_of_energies_are_not_mixed_up(tmp_path: Path) -> None:
    prior = NCPrior(PROBLEM.source(), MLPHead((2,), width=8))
    fit(prior, data(), steps=2, checkpoint=tmp_path / "heads", **QUIET)
    with pytest.raises(ValueError, match="belongs to a training with"):
        fit_vaebm(model(), data(), steps=2, checkpoint=tmp_path / "heads", **QUIET)
    fit_vaebm(model(), data(), steps=2, checkpoint=tmp_path / "energy", **QUIET)
    with pytest.raises(ValueError):
        fit(prior, data(), steps=2, checkpoint=tmp_path / "energy", **QUIET)
    save_tensors(tmp_path / "other", {}, {"kind": "heads"})
    with pytest.raises(ValueError, match="is not a checkpoint"):
        fit_vaebm(model(), data(), checkpoint=tmp_path / "other", **QUIET)
    with pytest.raises(TypeError, match="read again from its start"):
        fit_vaebm(model(), iter([data()]), checkpoint=tmp_path / "new", **QUIET)


SCRIPT = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    from test_vaebm_fit import QUIET, SETTINGS, data, lines, model, scramble, weights
    from ncprior.saving import save_tensors
    from ncprior.vaebm import fit_vaebm

    path, out, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    scramble(1)
    of = model()
    forward, calls = of.energy.forward, []

    def counting(x):
        calls.append(1)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(x)

    of.energy.forward = counting
    scramble(3 if kill_at else 4)
    history = fit_vaebm(of, data(), checkpoint=path, **SETTINGS, **QUIET)
    save_tensors(out, weights(of), {"rows": [list(line) for line in lines(history)]})
"""


# In the quick suite, tests/test_kills.py kills a training of this kind.
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    path, out = tmp_path / "checkpoint", tmp_path / "weights"

    def run(kill_at: int) -> int:
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(SCRIPT),
            str(path),
            str(out),
            str(kill_at),
        ]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])
        }
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert run(kill_at=31) == -signal.SIGKILL  # four evaluations a step: in the chains of the 8th
    assert path.exists() and not out.exists()
    assert run(kill_at=0) == 0
    scramble(3)
    whole = model()
    expected = fit_vaebm(whole, data(), **SETTINGS, **QUIET)
    tensors, metadata = load_tensors(out)
    assert same(tensors, weights(whole))
    assert [tuple(row) for row in metadata["rows"]] == lines(expected)


def test_several_processes_are_sent_to_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncprior.vaebm.fit.num_ranks", lambda: 2)
    with pytest.raises(RuntimeError, match="one process. In several, call VAEBMTrainer.step"):
        fit_vaebm(VAEBM(PROBLEM.source(), MLPHead((3,))), torch.randn(9, 3), progress=False)
