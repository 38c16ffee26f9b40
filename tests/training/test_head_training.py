"""Training of heads: gradients everywhere, the best weights from step 0 on, what a checkpoint compares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.problems import GaussianPair
from helpers.toys import VAE, base, flat, ladder_prior, same, stir, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ncprior import NCETrainer, NCPrior, SingleGroup, fit
from ncprior.bases import FlowMatching, GaussianMixture, VelocityNet, rebase
from ncprior.heads.networks import MLPHead
from ncprior.saving.codec import pack, unpack
from ncprior.saving.tensors import load_tensors, save_tensors
from ncprior.training import Row
from ncprior.training.stage_runs import _adamw

QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def few_held_out_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncprior.training.held_out._HELD_OUT_DRAWS", 32)


def data(seed: int = 12) -> Tensor:
    return torch.randn(200, 3, generator=torch.Generator().manual_seed(seed))


def small(seed: int = 1) -> NCPrior:
    torch.manual_seed(seed)
    return stir(ladder_prior(2))


# --- gradients, whatever is switched off outside ---

OFF: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("stages", [1, 2])
def test_F3_W2_fit_trains_as_usual_where_gradients_are_off(off: str, stages: int) -> None:
    problem = GaussianPair()
    ends = []
    for context in (torch.enable_grad, OFF[off]):
        torch.manual_seed(1)
        prior = NCPrior(problem.source(), MLPHead((2,), width=8))
        with context():
            x = problem.data(200)
            fit(prior, x, steps=4, stages=stages, learning_rate=0.01, batch_size=32, **QUIET)
        ends.append(weights(prior))
        assert not any(p.is_inference() for p in prior.parameters())
    assert same(*ends)
    assert prior.heads[0].state_dict()  # and it can be trained on
    fit(prior, data()[:, :2], steps=1, **QUIET)


@pytest.mark.parametrize("off", OFF)
def test_F3_W2_a_step_trains_as_usual_where_gradients_are_off(off: str) -> None:
    ends = []
    for context in (torch.enable_grad, OFF[off]):
        prior = small()
        trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters()))
        with context():
            assert (trainer.step(data() + 0).grad_norm > 0).all()
        ends.append(weights(prior))
    assert same(*ends)


class Detached(MLPHead):
    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(z, context).detach()


def test_F3_a_head_whose_loss_has_no_gradient_is_refused() -> None:
    """Weight decay alone moved it before."""
    prior = stir(NCPrior(flat(), Detached((2,), width=8)))
    before = weights(prior)
    with pytest.raises(ValueError, match=r"loss of group 0 has no gradient.*detach\(\)"):
        fit(prior, data(), steps=2, **QUIET)
    assert same(weights(prior), before)


def test_W2_heads_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        head = MLPHead((2,), width=8)
    with pytest.raises(ValueError, match="made under torch.inference_mode"):
        fit(NCPrior(flat(), head), data(), steps=2, **QUIET)


def test_G_M4_adamw_is_fused_on_every_device_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says, and not a list of ours, in which MPS was missing."""
    prior, made = small(), torch.optim.AdamW
    assert _adamw(prior, 0.1, 0.5).param_groups[0]["fused"]

    def not_fused(*args: Any, fused: bool = False, **options: Any) -> torch.optim.AdamW:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be on another device")
        return made(*args, **options)

    monkeypatch.setattr(torch.optim, "AdamW", not_fused)
    optimizer = _adamw(prior, 0.1, 0.5)
    assert not optimizer.param_groups[0]["fused"]
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.1, 0.5)


# --- the best weights, from step 0 on ---


@pytest.mark.parametrize("rate", [1e9, 1e30])
def test_F16_heads_that_diverge_before_the_first_evaluation_are_as_they_were(rate: float) -> None:
    prior = small()
    before = weights(prior)
    with pytest.raises(FloatingPointError):
        fit(prior, data(), steps=50, learning_rate=rate, **QUIET)
    assert same(weights(prior), before)


def test_F16_without_held_out_data_heads_do_not_end_as_nan() -> None:
    prior = small()
    before = weights(prior)
    with pytest.warns(UserWarning, match="held out"), pytest.raises(FloatingPointError):
        fit(prior, list(data().split(50)), steps=50, learning_rate=1e38, **QUIET)
    assert all(t.isfinite().all() for t in weights(prior).values()), before


def test_F16_weights_that_no_step_has_improved_are_kept() -> None:
    prior = NCPrior(GaussianPair().source(), Offset())
    history = fit(prior, GaussianPair().data(300), steps=3, learning_rate=10.0, **QUIET)
    assert (history.best_step, prior.heads[0].offset.item()) == ([0], 0.0)
    assert history.best_loss is not None and len(history.rows) == 1


class Offset(nn.Module):
    """Exact but for an offset, which starts at its best value."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return GaussianPair().log_r(z) + self.offset


def test_M6_a_vae_that_counts_its_calls_is_found_after_the_first_step() -> None:
    vae = VAE()
    vae.register_buffer("calls", torch.zeros(()))

    def posterior(x: Tensor) -> Any:
        vae.calls += 1
        return vae.posterior(x)

    prior, rows = (
        NCPrior(SingleGroup(base(), posterior, vae.decode, module=vae), MLPHead((2,))),
        [],
    )
    before = weights(prior)
    with pytest.raises(RuntimeError, match="has changed during the first step.*counter"):
        fit(prior, data(), steps=99, eval_every=1, callback=rows.append, **QUIET)
    assert not rows
    assert same(weights(prior), before)


# --- what a checkpoint compares ---

OPTIONS: dict[str, Any] = {"steps": 8, "eval_every": 2, "batch_size": 16, "checkpoint_every": 2}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("make", [Tensor.clone, lambda x: list(x.split(16)), Tensor.numpy])
def test_F8_W7_a_checkpoint_of_other_data_of_equal_length_is_refused(
    finished: bool, make: Callable[[Tensor], Any], tmp_path: Path
) -> None:
    path, held_out = tmp_path / "c", data(5)[:50]
    options = {**OPTIONS, "held_out": held_out, "checkpoint": path}
    stop = None if finished else stopping_at(4)
    fit(small(), make(data()), callback=stop, **options, **QUIET)
    other = small(2)
    before = weights(other)
    with pytest.raises(ValueError, match=r"training with data=\w+; got data=\w+.*another check"):
        fit(other, make(5 + 9 * data()), **options, **QUIET)
    assert same(weights(other), before)


def stopping_at(step: int) -> Callable[[Row], bool]:
    return lambda row: row.step == step


def test_F8_a_checkpoint_of_other_held_out_data_or_patience_is_refused(tmp_path: Path) -> None:
    options = {**OPTIONS, "checkpoint": tmp_path / "c", "held_out": data(5)[:50]}
    fit(small(), data(), **options, **QUIET)
    for changed in ({"held_out": data(6)[:50]}, {"held_out": None}, {"patience": 3}):
        name = next(iter(changed))
        with pytest.raises(ValueError, match=f"training with {name}=.*; got {name}="):
            fit(small(), data(), **{**options, **changed}, **QUIET)


def test_F8_a_training_that_the_callback_stopped_goes_on(tmp_path: Path) -> None:
    """Bit for bit as one that was never stopped; a callback that stops ends further stages too."""
    expected = small()
    torch.manual_seed(3)
    uninterrupted = fit(expected, data(), stages=1, **OPTIONS, **QUIET)
    path, prior = tmp_path / "c", small()
    torch.manual_seed(3)
    for step in (2, 6):
        history = fit(
            prior, data(), checkpoint=path, callback=stopping_at(step), **OPTIONS, **QUIET
        )
        assert history.stopped == f"stopped by the callback at step {step}"
    history = fit(prior, data(), checkpoint=path, **OPTIONS, **QUIET)
    assert same(weights(prior), weights(expected))
    assert [row[:4] for row in history.rows] == [row[:4] for row in uninterrupted.rows]
    assert history.stopped == "all 8 steps taken"


def test_F8_more_stages_resume_from_the_checkpoint_of_one(tmp_path: Path) -> None:
    """Why `stages` is not compared: the first stage does not depend on it."""
    problem = GaussianPair()
    x, histories = problem.data(100), []
    for stages in (1, 2):
        prior = NCPrior(problem.source(), MLPHead((2,), width=8))
        path = tmp_path / "c"
        histories.append(fit(prior, x, stages=stages, checkpoint=path, **OPTIONS, **QUIET))
    assert histories[0].rows == histories[1].rows
    assert len(histories[1].stages) == 1


def test_F8_a_further_stage_is_of_the_heads_that_it_multiplies(tmp_path: Path) -> None:
    problem = GaussianPair()

    def run(seed: int, path: Path) -> None:
        torch.manual_seed(1)
        x = problem.data(200)
        torch.manual_seed(seed)
        prior = NCPrior(problem.source(), MLPHead((2,), width=8))
        fit(prior, x, stages=2, checkpoint=path, learning_rate=0.1, **OPTIONS, **QUIET)

    run(1, tmp_path / "a")
    run(2, tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "a")  # the second stage of a is of other heads
    with pytest.raises(ValueError, match="training with heads so far="):
        run(2, tmp_path / "a")


def test_F4_a_checkpoint_beyond_its_last_step_ends_or_is_refused(tmp_path: Path) -> None:
    """It never ended before: step 100 of 8 is not the last one."""
    path = tmp_path / "c"
    fit(small(), data(), checkpoint=path, callback=stopping_at(4), **OPTIONS, **QUIET)
    tensors, metadata = load_tensors(path)
    state = unpack(metadata["state"], tensors)
    assert (state["steps"], state["stopped"]) == (4, None)
    tree, tensors = pack({**state, "steps": 99})
    save_tensors(path, tensors, {"kind": "checkpoint", "state": tree})
    with suppress(ValueError):
        assert fit(small(), data(), checkpoint=path, **OPTIONS, **QUIET).rows[-1].step == 100


def velocity(bias: float) -> VelocityNet:
    net = VelocityNet(2, width=4, depth=0)
    nn.init.constant_(net.out.bias, bias)
    return net


BASES: dict[str, Callable[[Tensor], Any]] = {
    "mixture": lambda z: GaussianMixture(torch.zeros(1), z[:1], torch.ones(1, 2)),
    "flow matching": lambda z: FlowMatching(velocity(z[0, 0].item()), z[0], torch.ones(2)),
}


@pytest.mark.parametrize("kind", BASES)
def test_heads_are_not_resumed_on_another_base(kind: str, tmp_path: Path) -> None:
    """Heads of one base are wrong on another; it has the same VAE and the same data."""
    problem, path = GaussianPair(), tmp_path / "c"
    x = problem.data(100)
    first, second = (
        NCPrior(rebase(problem.source(), BASES[kind](z)), MLPHead((2,), width=8))
        for z in torch.randn(2, 9, 2)
    )
    fit(first, x, checkpoint=path, **OPTIONS, **QUIET)
    before = weights(second)
    with pytest.raises(ValueError, match=r"belongs to a training with base=\w+:.*; got base="):
        fit(second, x, checkpoint=path, **OPTIONS, **QUIET)
    assert same(weights(second), before)
    fit(first, x, checkpoint=path, **OPTIONS, **QUIET)


def test_held_out_losses_leave_the_generator_of_the_training_data_alone() -> None:
    """With one generator for both loaders, every epoch began in the same order."""
    generator, orders = torch.Generator().manual_seed(0), []

    class Rows(Dataset[Tensor]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Tensor:
            orders.append(i)
            return data()[i]

    loader: Any = partial(DataLoader, batch_size=10, shuffle=True, generator=generator)
    options = {"steps": 32, "eval_every": 4, **QUIET}
    fit(small(), loader(Rows()), held_out=loader(data()[:40]), **options)
    epochs = {tuple(orders[i : i + 40]) for i in range(0, 320, 40)}
    assert len(epochs) == 8
