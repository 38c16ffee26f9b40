from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import CorrelatedPair, GaussianPair
from helpers.toys import VAE, Ladder, base, everything, flat, ladder_prior, same, stir, weights
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ncprior import NCPrior, SingleGroup, fit
from ncprior.heads.networks import MLPHead
from ncprior.saving.tensors import load_tensors, save_tensors
from ncprior.trainer import NCETrainer
from ncprior.training import FitSettings, History, Row, gate
from ncprior.training.held_out import HeldOut, mean_and_error

QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def few_held_out_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses of 32 draws instead of 2,048: what is tested here is not their precision."""
    monkeypatch.setattr("ncprior.training.held_out._HELD_OUT_DRAWS", 32)


def small() -> NCPrior:
    """The same small prior at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return ladder_prior()


def data(rows: int = 200) -> Tensor:
    """The same x at every call."""
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(12))


def scramble(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def lines(history: History) -> list[tuple[Any, ...]]:
    """A history without its seconds."""
    return [tuple(row[:4]) for row in history.rows]


# --- data ---


class Pairs(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 200

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return data()[i], i


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.randn(3)


class Epochs(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from data()


def forever() -> Iterator[Tensor]:
    while True:
        yield torch.randn(16, 3)


WITH_ROWS: dict[str, Callable[[], Any]] = {
    "tensor": data,
    "array": lambda: data().numpy(),
    "dataset": lambda: TensorDataset(data()),
    "pairs": Pairs,
}
WITHOUT_ROWS: dict[str, Callable[[], Any]] = {
    "loader": lambda: DataLoader(Pairs(), 16, shuffle=True),
    "loader of an iterable": lambda: DataLoader(Epochs(), 16),
    "iterable dataset": Epochs,
    "endless dataset": Endless,
    "list of batches": lambda: list(data().split(16)),
    "generator": forever,
}


@pytest.mark.parametrize("name", WITH_ROWS)
def test_five_percent_of_rows_are_held_out(name: str) -> None:
    prior = small()
    history = fit(prior, WITH_ROWS[name](), steps=20, eval_every=5, batch_size=16, **QUIET)
    assert [row.step for row in history.rows] == [5, 10, 15, 20]
    assert all(len(row.held_out) == len(row.loss) == 3 for row in history.rows)
    assert history.best_loss is not None and len(history.best_loss) == 3
    assert history.stopped.startswith("all 20 steps taken")


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_data_without_rows_trains_without_held_out_and_says_so(name: str) -> None:
    prior = small()
    with pytest.warns(UserWarning, match="Nothing is held out of .*Pass held_out=") as record:
        history = fit(prior, WITHOUT_ROWS[name](), steps=20, eval_every=5, batch_size=16, **QUIET)
    assert record[0].filename == __file__
    assert [row.step for row in history.rows] == [5, 10, 15, 20]
    assert all(row.held_out is None for row in history.rows)
    assert (history.best_step, history.best_loss) == ([20] * 3, None)


@pytest.mark.parametrize("name", [*WITH_ROWS, *WITHOUT_ROWS])
def test_held_out_may_be_given(name: str) -> None:
    make = {**WITH_ROWS, **WITHOUT_ROWS}[name]
    kinds = [
        data(50),
        DataLoader(Pairs(), 64),
        list(data(50).split(16)),
        Epochs(),
        data(50).numpy(),
    ]
    for held_out in kinds:
        history = fit(small(), make(), held_out=held_out, steps=2, batch_size=16, **QUIET)
        assert len(history.rows[-1].held_out) == 3


def test_no_held_out_row_is_trained_on() -> None:
    seen: list[int] = []

    class Rows(Dataset[Tensor]):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, i: int) -> Tensor:
            seen.append(i)
            return data()[i]

    fit(small(), Rows(), steps=60, eval_every=60, batch_size=5, **QUIET)
    trained, held_out = set(seen[5:305]), {*seen[:5], *seen[305:]}  # step 0 is evaluated too
    assert len(trained) == 95 and len(held_out) == 5
    assert trained.isdisjoint(held_out)


def test_held_out_that_can_be_read_once_is_refused() -> None:
    with pytest.raises(TypeError, match="read many times; got a one-shot"):
        fit(small(), data(), held_out=forever(), steps=1, **QUIET)
    with pytest.raises(ValueError, match="held-out data has no batches"):
        fit(small(), data(), held_out=[], steps=1, **QUIET)


@pytest.mark.parametrize("batches", [0, 3, 10, 12])
def test_a_used_up_iterator_stops_with_a_row(batches: int) -> None:
    iterator = iter(data(16 * 12).split(16)[:batches])
    prior = small()

    def run() -> History:
        return fit(
            prior, iterator, held_out=data(50), steps=50, eval_every=5, patience=None, **QUIET
        )

    if batches == 0:
        with pytest.raises(ValueError, match="no batches"):
            run()
        return
    history = run()
    assert history.stopped == f"data used up after {batches} of 50 steps"
    steps = [row.step for row in history.rows]
    assert steps == {3: [3], 10: [5, 10], 12: [5, 10, 12]}[batches]
    assert all(loss > 0.5 for row in history.rows for loss in row.loss)
    assert history.best_loss is not None


def test_float64_arrays_of_a_float32_vae_are_named() -> None:
    """The usual NumPy array is float64: either it works, or the error says which dtypes meet."""
    array = data().double().numpy()
    try:
        fit(small(), array, steps=1, **QUIET)
    except (TypeError, ValueError, RuntimeError) as error:
        assert "float64" in str(error) or "Double" in str(error)


# --- what training does ---


def rates(steps: int) -> list[float]:
    """Linear from a step of the warm-up, of a tenth of the steps, and to 0 in the last fifth."""
    warm_up, decay = max(1, steps // 10), steps // 5
    up = [min(1.0, (t + 1) / warm_up) for t in range(steps - decay)]
    return up + [n / (decay + 1) for n in range(decay, 0, -1)]


def test_it_is_adamw_on_the_nce_loss_with_warm_up_and_decay() -> None:
    """fit equals a loop of one's own, bit for bit."""
    steps, x = 24, list(data(16 * 24).split(16))
    prior, other = small(), small()
    scramble(3)
    settings = FitSettings(weight_decay=0.1, noise_weight=2.0, max_grad_norm=0.5, ema_decay=0.0)
    options = {"learning_rate": 1e-2, "settings": settings}
    history = without_warning(prior, x, steps=steps, eval_every=4, **options)
    scramble(3)
    torch.randint(2**31, (2,))  # the seeds of the split and of the data's own randomness
    optimizer = torch.optim.AdamW(other.parameters(), 1e-2, weight_decay=0.1, fused=True)
    trainer = NCETrainer(other, optimizer, noise_weight=2.0, max_grad_norm=0.5)
    other.train()
    losses = []
    for t, batch in enumerate(x):
        optimizer.param_groups[0]["lr"] = 1e-2 * rates(steps)[t]
        losses.append(trainer.step(batch).loss)
    assert same(weights(prior), weights(other))  # decay 0: the average is the last weights
    for i, row in enumerate(history.rows):
        expected = torch.stack(losses[4 * i : 4 * i + 4]).mean(0)
        torch.testing.assert_close(torch.tensor(row.loss), expected)
        assert row.learning_rate == pytest.approx(1e-2 * rates(steps)[4 * i + 3])


def without_warning(prior: NCPrior, x: Any, **options: Any) -> History:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Nothing is held out")
        return fit(prior, x, **options, **QUIET)


def test_the_kept_weights_are_an_exponential_moving_average() -> None:
    decay, x = 0.5, list(data(16 * 6).split(16))
    prior, other = small(), small()
    scramble(3)
    without_warning(prior, x, steps=6, settings=FitSettings(ema_decay=decay))
    scramble(3)
    torch.randint(2**31, (2,))
    optimizer = torch.optim.AdamW(other.parameters(), 1e-3, weight_decay=1e-2)
    trainer = NCETrainer(other, optimizer)
    other.train()
    average = weights(other)
    for t, batch in enumerate(x):
        optimizer.param_groups[0]["lr"] = 1e-3 * rates(6)[t]
        trainer.step(batch)
        now = min(decay, (2 + t) / (11 + t))  # reached after a warm-up
        average = {
            name: now * average[name] + (1 - now) * w for name, w in other.state_dict().items()
        }
    for name, tensor in prior.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-7)
    assert not same(weights(prior), weights(other))


def test_the_loss_falls_to_its_least_and_the_ratio_is_right() -> None:
    problem = CorrelatedPair()
    x = problem.data(20_000)
    prior = NCPrior.for_source(problem, x[:512], width=32, depth=1)
    history = fit(
        prior,
        x,
        steps=600,
        batch_size=512,
        learning_rate=5e-3,
        settings=FitSettings(ema_decay=0.98),
        eval_every=50,
        **QUIET,
    )
    assert history.best_loss is not None
    least = [2 * math.log(2), 2 * math.log(2) - 2 * problem.jsd]
    for best, bound in zip(history.best_loss, least, strict=True):
        assert bound - 0.06 < best < bound + 0.06  # 2,048 draws or so: a few hundredths
    z = problem.data(2000)
    truth = problem.log_r(z[:, 1:], z[:, :1])
    residual = prior.log_ratio([z[:, :1], z[:, 1:]])[:, 1].detach() - truth
    assert residual.var() / truth.var() < 0.05


def test_it_ends_in_evaluation_mode_with_no_gradients() -> None:
    prior = small()
    prior.eval()
    modes = []
    hook = prior.heads[0].register_forward_hook(lambda head, *_: modes.append(head.training))
    fit(prior, data(), steps=3, eval_every=3, batch_size=16, **QUIET)
    hook.remove()
    assert modes == [False, *[True] * 3, False]  # held-out losses around the training
    assert not prior.training and not any(head.training for head in prior.heads)
    assert all(p.grad is None and p.requires_grad for p in prior.parameters())
    assert {p.device for p in prior.parameters()} == {torch.device("cpu")}


def test_held_out_losses_are_of_the_averaged_weights_without_dropout() -> None:
    """Taken again with the kept weights, at no learning rate, the best loss is the same."""
    prior = stir(ladder_prior(dropout=0.5))
    options = {"held_out": data(64), "steps": 1, "settings": FitSettings(ema_decay=0.0)}
    scramble(3)
    history = fit(prior, data(), learning_rate=0.1, **options, **QUIET)
    scramble(3)  # the same draws of z
    again = fit(prior, data(), learning_rate=0.0, **options, **QUIET)
    assert again.best_loss == history.best_loss


def test_held_out_losses_have_the_same_draws_every_time() -> None:
    """At no learning rate they do not move, though training draws in between."""
    history = fit(stir(small()), data(), steps=4, eval_every=1, learning_rate=0.0, **QUIET)
    assert all(row.held_out == history.rows[0].held_out for row in history.rows)


@pytest.mark.parametrize("kind", ["a module", "flat"])
def test_the_vae_is_unchanged(kind: str) -> None:
    vae = Ladder() if kind == "a module" else VAE()
    context = (8,) if isinstance(vae, Ladder) else None
    source = vae if isinstance(vae, Ladder) else flat(vae)
    heads = [MLPHead((2,), context_shape=context, width=8) for _ in range(source.num_groups)]
    before = everything(vae)
    fit(NCPrior(source, heads), data(), steps=5, batch_size=16, **QUIET)
    assert everything(vae) == before


def test_a_vae_that_changes_itself_is_noticed() -> None:
    vae = VAE()

    def posterior(x: Tensor) -> Any:
        with torch.no_grad():
            vae.encoder[0].weight += 1e-3
        return vae.posterior(x)

    prior = NCPrior(SingleGroup(base(), posterior, vae.decode, module=vae), MLPHead((2,), width=8))
    with pytest.raises(RuntimeError, match="The VAE has changed during the first step"):
        fit(prior, data(), steps=2, **QUIET)


def test_a_history_and_nothing_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    history = fit(small(), data(), steps=4, eval_every=2, **QUIET)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    seconds = [row.seconds for row in history.rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert all(isinstance(row, Row) for row in history.rows)
    fit(small(), data(), steps=4, eval_every=2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err and "held out" in captured.err


def test_a_training_can_be_repeated() -> None:
    runs = []
    for _ in range(2):
        scramble(5)
        prior = stir(ladder_prior(dropout=0.2))
        history = fit(prior, data(), steps=10, eval_every=3, batch_size=16, **QUIET)
        runs.append((weights(prior), lines(history)))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


# --- early stopping ---


class Scripted:
    """Stands in for the held-out loss: what it says is given, one list of losses per evaluation."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, losses: list[list[float]], error: float = 0.0
    ) -> None:
        self.losses, self.weights, self.error = iter(losses), [], error
        self.started = False
        monkeypatch.setattr(import_module("ncprior.training.stage_runs"), "HeldOut", self._made)

    def _made(self, data: Any, prior: NCPrior, *_: Any, **__: Any) -> Scripted:
        self.prior = prior
        return self

    def __call__(self, device: torch.device) -> Tensor:
        """Losses of two rows with the given mean and standard error."""
        if not self.started:  # the weights before the first step
            self.started = True
            return torch.full((len(self.prior.heads), 2), 99.0, dtype=torch.float64)
        self.weights.append(weights(self.prior.heads))
        means = torch.tensor(next(self.losses), dtype=torch.float64)
        return torch.stack([means - self.error, means + self.error], 1)

    def errors(self, losses: Tensor) -> list[float]:
        return mean_and_error(losses)[1]


def test_each_group_keeps_its_own_best(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(
        monkeypatch, [[3.0, 1.0, 2.0], [2.0, 2.0, 2.0], [1.0, 3.0, 2.5], [4.0, 4.0, 1.0]]
    )
    prior = small()
    settings = FitSettings(ema_decay=0.5)
    history = fit(prior, data(), steps=8, eval_every=2, patience=None, settings=settings, **QUIET)
    assert (history.best_step, history.best_loss) == ([6, 2, 8], [1.0, 1.0, 1.0])
    for k, evaluation in enumerate((2, 0, 3)):
        for name, tensor in prior.heads[k].state_dict().items():
            assert torch.equal(tensor, script.weights[evaluation][f"{k}.{name}"])
    assert not same(script.weights[0], script.weights[1])


def test_patience_counts_evaluations_since_the_last_improvement_of_any_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Group 2 improves at step 8: the plateau is found at step 14, and the decay takes 3 steps."""
    losses = [[5.0, 5.0, 5.0], [6.0, 4.0, 6.0], [6.0, 4.0, 6.0], [6.0, 6.0, 4.9], *[[4.9] * 3] * 9]
    Scripted(monkeypatch, losses)
    history = fit(small(), data(), steps=100, eval_every=2, patience=3, **QUIET)
    assert history.stopped == "held-out loss has not improved since step 10; decayed over 4 steps"
    assert [row.step for row in history.rows] == [*range(2, 21, 2)]
    assert history.best_step == [10, 4, 8]


def test_losses_that_have_risen_stop_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [[5.0] * 3, *[[7.0] * 3] * 9])
    history = fit(small(), data(), steps=100, eval_every=2, patience=3, **QUIET)
    assert history.stopped == "held-out loss has risen since step 2"
    assert [row.step for row in history.rows] == [2, 4, 6, 8]
    assert history.best_step == [2, 2, 2]


def test_batches_of_a_loaders_own_mapping_can_be_held_out() -> None:
    """As pythae's data sets yield them: a subclass of OrderedDict is no pytree to torch."""

    class Output(OrderedDict[str, Tensor]):
        pass

    vae = VAE()
    source = SingleGroup(
        base(), lambda batch: vae.posterior(batch["data"]), vae.decode, module=vae
    )
    batches = [Output(data=torch.randn(16, 3)) for _ in range(4)]
    history = fit(NCPrior(source, MLPHead((2,))), batches, held_out=batches, steps=2, **QUIET)
    assert history.best_loss is not None


def test_gating_switches_off_heads_that_learnt_nothing_that_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of standard error 0.01, a loss must be below 2 log 2 - 0.03."""
    ceiling = 2 * math.log(2)
    Scripted(monkeypatch, [[ceiling - 0.029, ceiling - 0.031, ceiling + 0.5]], error=0.01)
    prior = small()
    history = fit(prior, data(), steps=2, eval_every=2, **QUIET)
    assert prior.active == [True] * 3
    assert gate(prior, history) == (0, 2)
    assert prior.active == [False, True, False]
    staged = history._replace(stages=(history._replace(kept=(True, False, False)),))
    prior.active = [True, False, True]
    assert gate(prior, staged) == (2,)  # a further stage has learnt something in group 0
    assert prior.active == [True, False, False]  # and a group that is off stays off


def test_gating_without_held_out_losses_is_refused() -> None:
    prior = small()
    history = without_warning(prior, list(data().split(16)), steps=2)
    with pytest.raises(ValueError, match="needs held-out losses.*Pass held_out= to fit"):
        gate(prior, history)
    assert prior.active == [True] * 3


def test_the_standard_error_of_held_out_losses_is_that_of_repeated_draws() -> None:
    """Batches of unequal size included: the squares of 200 z-scores average to 1 ± 0.1."""

    problem, prior = CorrelatedPair(), NCPrior(CorrelatedPair(), CorrelatedPair().heads())
    exact = 2 * math.log(2) - 2 * problem.jsd
    scores = []
    for seed in range(200):
        x = problem.data(16 * 12)
        sizes = [8] * 8 + [16] * 8
        held_out = HeldOut(list(x.split(sizes)), prior, 16, seed)
        loss, error = mean_and_error(held_out(torch.device("cpu")))
        scores.append((loss[1] - exact) / error[1])
    # 16 batches: a Student of about 15 degrees of freedom, of variance 15/13.
    assert 0.85 < torch.tensor(scores).square().mean() / (15 / 13) < 1.3


@pytest.mark.parametrize("rows", [50, 300])
def test_the_standard_error_is_that_of_other_rows_not_of_further_draws(rows: int) -> None:
    problem, prior = CorrelatedPair(), NCPrior(CorrelatedPair(), CorrelatedPair().heads())
    exact = 2 * math.log(2) - 2 * problem.jsd
    scores = []
    for seed in range(200):
        held_out = HeldOut(problem.data(rows), prior, 256, seed)
        loss, error = mean_and_error(held_out(torch.device("cpu")))
        scores.append((loss[1] - exact) / error[1])
    assert 0.7 < torch.tensor(scores).square().mean() < 1.3


def test_gating_leaves_a_base_that_matches_and_keeps_a_head_that_helps() -> None:
    """Group 1 of the correlated pair has a hole, and group 0 has none."""
    problem = CorrelatedPair()
    torch.manual_seed(0)
    heads = [MLPHead((1,), width=16), MLPHead((1,), context_shape=(1,), width=16)]
    prior = NCPrior(problem, heads)
    history = fit(prior, problem.data(4000), held_out=problem.data(4000), steps=300, **QUIET)
    assert gate(prior, history) == (0,)
    assert prior.active == [False, True]


def test_without_patience_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [[1.0] * 3, *[[2.0] * 3] * 99])
    history = fit(small(), data(), steps=40, eval_every=2, patience=None, **QUIET)
    assert history.stopped == "all 40 steps taken"
    assert history.best_step == [2] * 3


def test_memorising_heads_are_stopped() -> None:
    """Ten rows for a wide head: the held-out loss rises, and the kept weights are the early ones."""
    problem = GaussianPair(kl=1.0, dim=16, width=0.1)
    prior = NCPrior.for_source(problem.source(), problem.data(64), width=64, depth=1)
    history = fit(
        prior,
        problem.data(10),
        held_out=problem.data(500),
        steps=400,
        learning_rate=1e-2,
        eval_every=20,
        patience=3,
        settings=FitSettings(ema_decay=0.5),
        **QUIET,
    )
    assert history.stopped.startswith("held-out loss has risen since step")
    assert history.best_step[0] < history.rows[-1].step
    assert history.best_loss[0] <= min(row.held_out[0] for row in history.rows)
    assert history.rows[-1].loss[0] < history.best_loss[0]


def test_a_callback_sees_every_row_and_stops() -> None:
    rows: list[Row] = []

    def callback(row: Row) -> bool:
        rows.append(row)
        return row.step >= 9

    history = fit(small(), data(), steps=30, eval_every=3, callback=callback, **QUIET)
    assert history.stopped == "stopped by the callback at step 9"
    assert history.rows == rows and [row.step for row in rows] == [3, 6, 9]


def test_a_callback_that_returns_something_else_does_not_stop() -> None:
    for value in (None, False, 0, 1, "stop"):
        history = fit(
            small(), data(), steps=4, eval_every=2, callback=lambda _, v=value: v, **QUIET
        )
        assert history.stopped == "all 4 steps taken"


def test_a_non_finite_held_out_loss_stops_and_names_the_group() -> None:
    held_out = data(50)
    held_out[3] = torch.nan
    with pytest.raises(FloatingPointError, match="held.out.*group 0|group 0.*held.out"):
        fit(small(), data(), held_out=held_out, steps=4, eval_every=2, **QUIET)


# --- errors keep the last good state ---


class Bomb:
    """Batches, of which the n-th is not finite, or raises; or where they end."""

    def __init__(self, n: int, what: BaseException | str) -> None:
        self.n, self.what = n, what

    def __iter__(self) -> Iterator[Tensor]:
        yield from data(16 * self.n).split(16)
        if isinstance(self.what, BaseException):
            raise self.what
        if self.what == "nan":
            yield torch.full((16, 3), torch.nan)


@pytest.mark.parametrize("what", ["nan", KeyboardInterrupt(), OSError("disk")], ids=repr)
@pytest.mark.parametrize("held_out", [None, data(50)], ids=["average", "best"])
def test_an_error_leaves_the_last_good_weights(
    what: BaseException | str, held_out: Tensor | None
) -> None:
    """After 6 good steps: the average of all 6, or the best of the held-out loss of step 4."""
    options = {"held_out": held_out, "steps": 1000, "eval_every": 4}
    options["settings"] = FitSettings(ema_decay=0.5)
    expected, prior = small(), small()
    scramble(3)
    last = 6 if held_out is None else 4
    without_warning(expected, iter(Bomb(last, "end")), **options)
    scramble(3)
    kind = FloatingPointError if isinstance(what, str) else type(what)
    match = r"group 0 is nan .* at step 6\b" if isinstance(what, str) else None
    with pytest.raises(kind, match=match):
        without_warning(prior, Bomb(6, what), **options)
    assert same(weights(prior), weights(expected))
    assert not prior.training
    assert all(p.grad is None for p in prior.parameters())


def test_an_interrupt_in_the_callback_keeps_the_best_weights() -> None:
    def interrupt(row: Row) -> None:
        if row.step == 6:
            raise KeyboardInterrupt

    prior, expected = small(), small()
    scramble(3)
    with pytest.raises(KeyboardInterrupt):
        fit(prior, data(), steps=1000, eval_every=3, callback=interrupt, **QUIET)
    scramble(3)
    fit(expected, data(), steps=1000, eval_every=3, callback=lambda row: row.step == 6, **QUIET)
    assert same(weights(prior), weights(expected))
    assert not prior.training


def test_wrong_arguments_are_refused() -> None:
    for name in ("steps", "batch_size", "eval_every", "checkpoint_every", "patience"):
        with pytest.raises(ValueError, match=rf"{name} must be a whole number in \[1, .*got 0"):
            fit(small(), data(), **{name: 0}, **QUIET)
    for name in ("num_draws", "num_cached_proposals", "cache_epochs"):
        with pytest.raises(ValueError, match=rf"{name} must be a .*number in \[1, .*got 0"):
            FitSettings(**{name: 0})
    with pytest.raises(ValueError, match="1 rows cannot be split"):
        fit(small(), data(1), **QUIET)
    with pytest.raises(TypeError, match="got 3"):
        without_warning(small(), 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_weight", 0.0),
        ("weight_decay", -1.0),
        ("max_grad_norm", 0.0),
        ("ema_decay", 1.5),
        ("ema_decay", -0.5),
        ("cache_memory", -1.0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*; got {value}"):
        FitSettings(**{name: value})


def test_a_learning_rate_out_of_range_is_refused_at_once() -> None:
    prior = small()
    with pytest.raises(ValueError, match="learning.rate"):
        fit(prior, data(), learning_rate=-1.0, steps=2, eval_every=1, **QUIET)
    assert same(weights(prior), weights(small()))


def test_settings_are_immutable_and_compared_by_what_changes_the_result() -> None:
    settings = FitSettings(num_draws=2)
    with pytest.raises(FrozenInstanceError):
        settings.num_draws = 3  # type: ignore[misc]
    assert replace(settings, cache_memory=1.0) == settings
    assert replace(settings, num_draws=3) != settings


# --- resume ---


class Noisy(Dataset[Tensor]):
    """Rows with noise of torch's, NumPy's and Python's generators."""

    def __init__(self) -> None:
        self.x, self.reads, self.stop_at = data(), 0, math.inf

    def __len__(self) -> int:
        return 200

    def __getitem__(self, i: int) -> Tensor:
        self.reads += 1
        if self.reads > self.stop_at:
            raise Stop
        return self.x[i] + 0.1 * (torch.randn(3) + np.random.randn() + random.gauss(0, 1))


class Stop(Exception):
    """Stands in for a crash."""


def with_generator(seed: int | None = None) -> DataLoader[Tensor]:
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    return DataLoader(Noisy(), 16, shuffle=True, generator=torch.Generator().manual_seed(seed))


def held_out_rows() -> Tensor:
    return data(50)


FITS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "tensor": (data, lambda: None),
    "array": (lambda: data().numpy(), lambda: None),
    "noisy dataset": (Noisy, lambda: None),
    "noisy loader": (lambda: DataLoader(Noisy(), 16, shuffle=True), held_out_rows),
    "loader with its generator": (with_generator, held_out_rows),
    "list of batches": (lambda: list(data().split(16)), held_out_rows),
    "iterable dataset": (Epochs, held_out_rows),
    "noisy held-out": (data, Noisy),
    "shuffled held-out": (data, lambda: DataLoader(Noisy(), 16, shuffle=True)),
    "held-out with its generator": (data, lambda: with_generator(7)),
}
SETTINGS: dict[str, Any] = {
    "steps": 30,
    "batch_size": 16,
    "eval_every": 4,
    "checkpoint_every": 5,
    "learning_rate": 1e-2,
    "settings": FitSettings(ema_decay=0.9),
}


def new_prior(source: Ladder | None = None) -> NCPrior:
    """Random heads with dropout."""
    prior = stir(ladder_prior(2, dropout=0.2))
    return prior if source is None else NCPrior(source, prior.heads)


def crash_at(step: int) -> Callable[[Row], None]:
    def callback(row: Row) -> None:
        if row.step >= step:
            raise Stop

    return callback


@pytest.mark.parametrize("crash", [8, 16, 28])
@pytest.mark.parametrize("name", FITS)
def test_a_resumed_training_equals_the_uninterrupted_one(
    name: str, crash: int, tmp_path: Path
) -> None:
    make, make_held_out = FITS[name]
    scramble(1)
    source, x, held_out = Ladder(2), make(), make_held_out()
    prior = new_prior(source)
    expected = fit(prior, x, held_out=held_out, **SETTINGS, **QUIET)
    path = tmp_path / "checkpoint"
    scramble(1)
    _, x, held_out = Ladder(2), make(), make_held_out()
    with pytest.raises(Stop):
        fit(
            new_prior(source),
            x,
            held_out=held_out,
            checkpoint=path,
            callback=crash_at(crash),
            **SETTINGS,
            **QUIET,
        )
    scramble(2)  # another process
    x, held_out = make(), make_held_out()
    resumed_prior = new_prior(source)
    resumed = fit(resumed_prior, x, held_out=held_out, checkpoint=path, **SETTINGS, **QUIET)
    assert same(weights(resumed_prior), weights(prior))
    assert lines(resumed) == lines(expected)
    assert resumed[1:] == expected[1:]
    seconds = [row.seconds for row in resumed.rows]
    assert seconds == sorted(seconds)


def test_the_generators_end_where_they_would_have(tmp_path: Path) -> None:
    ends = []
    for crash in (False, True):
        scramble(1)
        prior, path = new_prior(), tmp_path / f"{crash}"
        if crash:
            with pytest.raises(Stop):
                fit(prior, Noisy(), checkpoint=path, callback=crash_at(16), **SETTINGS, **QUIET)
            scramble(2)
        fit(prior, Noisy(), checkpoint=path, **SETTINGS, **QUIET)
        ends.append((torch.rand(()).item(), np.random.rand(), random.random()))
    assert ends[0] == ends[1]


def test_several_stops_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    path, source = tmp_path / "checkpoint", Ladder(2)
    scramble(1)
    prior = new_prior(source)
    expected = fit(prior, Noisy(), **SETTINGS, **QUIET)
    for seed, stop_at in ((1, 301), (2, 302), (3, 503)):
        noisy = Noisy()
        noisy.stop_at = stop_at
        scramble(seed)
        with pytest.raises(Stop):
            fit(new_prior(source), noisy, checkpoint=path, **SETTINGS, **QUIET)
        assert path.exists()
    resumed_prior = new_prior(source)
    resumed = fit(resumed_prior, Noisy(), checkpoint=path, **SETTINGS, **QUIET)
    assert same(weights(resumed_prior), weights(prior))
    assert lines(resumed) == lines(expected)


SCRIPT = """
    import os, random, signal, sys
    import numpy as np
    import torch
    torch.set_num_threads(1)
    from test_fit import Noisy, SETTINGS, QUIET, new_prior, scramble, weights
    import ncprior.training.held_out
    from ncprior import fit
    from ncprior.saving import save_tensors

    ncprior.training.held_out._HELD_OUT_DRAWS = 32

    path, out, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])

    class Killer(Noisy):
        def __getitem__(self, i):
            if kill_at and self.reads == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(i)

    scramble(1)
    prior = new_prior()
    scramble(3 if kill_at else 4)
    history = fit(prior, Killer(), checkpoint=path, **SETTINGS, **QUIET)
    save_tensors(out, weights(prior), {"rows": [list(row[:4]) for row in history.rows]})
"""


# In the quick suite, tests/test_kills.py kills a training of this kind.
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    script, path, out = tmp_path / "script.py", tmp_path / "checkpoint", tmp_path / "out"
    script.write_text(textwrap.dedent(SCRIPT))
    tests = Path(__file__).parents[1]

    def run(kill_at: int) -> int:
        python_path = os.pathsep.join([str(tests), str(Path(__file__).parent), *sys.path])
        command = [sys.executable, str(script), str(path), str(out), str(kill_at)]
        environment = {**os.environ, "PYTHONPATH": python_path}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert run(kill_at=500) == -signal.SIGKILL  # its reads are of training and held-out rows
    assert path.exists() and not out.exists()
    assert run(kill_at=0) == 0
    scramble(1)
    prior = new_prior()
    scramble(3)
    history = fit(prior, Noisy(), **SETTINGS, **QUIET)
    tensors, metadata = load_tensors(out)
    assert same(tensors, weights(prior))
    assert metadata["rows"] == [list(row[:4]) for row in history.rows]


def test_a_finished_checkpoint_is_not_trained_again(tmp_path: Path) -> None:
    path, prior = tmp_path / "checkpoint", small()
    scramble(1)
    expected = fit(prior, data(), checkpoint=path, steps=10, eval_every=4, **QUIET)
    before = path.read_bytes()
    again = small()
    history = fit(again, data(), checkpoint=path, steps=10, eval_every=4, **QUIET)
    assert same(weights(again), weights(prior))
    assert history == expected
    assert path.read_bytes() == before
    assert not again.training


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    settings = {"steps": 10, "eval_every": 4, "batch_size": 16}
    fit(small(), data(), checkpoint=path, **settings, **QUIET)
    main = {"steps": 20, "batch_size": 8, "learning_rate": 0.1, "eval_every": 5}
    other = {
        "weight_decay": 0.1,
        "max_grad_norm": None,
        "ema_decay": 0.5,
        "noise_weight": 2.0,
        "num_draws": 2,
        "cache_epochs": 3,
        "precision": torch.bfloat16,
        "group_parallel": True,
    }
    changes = {name: {name: value} for name, value in main.items()}
    changes |= {name: {"settings": FitSettings(**{name: other[name]})} for name in other}
    for name, change in changes.items():
        prior = stir(small())
        before = weights(prior)
        with pytest.raises(
            ValueError, match=rf"training with {name}=.*got {name}=.*another check"
        ):
            fit(prior, data(), checkpoint=path, **{**settings, **change}, **QUIET)
        assert same(weights(prior), before), name
    with pytest.raises(ValueError, match="training with rows=200; got rows=100"):
        fit(small(), data(100), checkpoint=path, **settings, **QUIET)
    elsewhere = FitSettings(cache_memory=1.0)  # which changes nothing
    fit(small(), data(), checkpoint=path, settings=elsewhere, **settings, **QUIET)


def test_a_checkpoint_of_other_heads_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    fit(small(), data(), checkpoint=path, steps=4, **QUIET)
    for other in (ladder_prior(width=16), ladder_prior(2), ladder_prior(4), ladder_prior(depth=2)):
        before = weights(stir(other))
        with pytest.raises(ValueError, match="checkpoint.*other heads|heads.*checkpoint"):
            fit(other, data(), checkpoint=path, steps=4, **QUIET)
        assert same(weights(other), before)


def test_a_checkpoint_of_another_vae_is_refused(tmp_path: Path) -> None:
    """The fingerprint is at hand: going on with other latents would be a silent mistake."""
    path = tmp_path / "checkpoint"
    fit(NCPrior(flat(VAE()), MLPHead((2,))), data(), checkpoint=path, steps=4, **QUIET)
    with pytest.raises(ValueError, match="(?i)training with vae="):
        fit(NCPrior(flat(VAE()), MLPHead((2,))), data(), checkpoint=path, steps=4, **QUIET)


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    fit(small(), data(), checkpoint=path, steps=4, **QUIET)
    whole = path.read_bytes()
    prior = stir(small())
    before = weights(prior)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", b"x" * 100, bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Cannot read .*checkpoint: "):
            fit(prior, data(), checkpoint=path, steps=4, **QUIET)
        assert path.read_bytes() == damaged
    save_tensors(path, {}, {"kind": "heads"})
    with pytest.raises(ValueError, match="is not a checkpoint of fit. Pass another file"):
        fit(prior, data(), checkpoint=path, steps=4, **QUIET)
    assert same(weights(prior), before)


def test_a_one_shot_iterator_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="read again from its start; got a one-shot generator"):
        fit(small(), forever(), held_out=data(50), checkpoint=tmp_path / "c", steps=4, **QUIET)
    assert not list(tmp_path.iterdir())


def test_checkpoints_are_made_when_due_and_at_the_end(tmp_path: Path) -> None:
    path, steps = tmp_path / "folder" / "checkpoint", []

    def callback(row: Row) -> None:
        steps.append(load_tensors(path)[1]["state"] is not None if path.exists() else False)

    fit(
        small(),
        data(),
        checkpoint=path,
        checkpoint_every=4,
        steps=10,
        eval_every=1,
        callback=callback,
        **QUIET,
    )
    assert steps == [False] * 4 + [True] * 6
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint"]  # no temporary files


def test_checkpoints_change_nothing(tmp_path: Path) -> None:
    runs = []
    for options in ({}, {"checkpoint": tmp_path / "c", "checkpoint_every": 1}):
        scramble(1)
        prior = new_prior()
        fit(prior, Noisy(), steps=10, eval_every=3, batch_size=16, **options, **QUIET)
        runs.append(weights(prior))
    assert same(*runs)
