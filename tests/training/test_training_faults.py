"""Callbacks with NumPy, decays within the warm-up, encoders on sorted data and of half-precision decoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup, fit, langevin
from ncprior.heads import MLPHead
from ncprior.heads.checks import noise_of
from ncprior.heads.fast import prepare_head
from ncprior.samplers import tempered_smc
from ncprior.training import fit_encoder
from ncprior.training.schedule import Schedule


def source() -> SingleGroup:
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    return SingleGroup(base, lambda x: Independent(Normal(x, 0.5), 1), lambda z: z)


@pytest.mark.parametrize("kind", [bool, np.bool_, lambda x: torch.tensor(bool(x))])
def test_a_callback_may_answer_with_numpy_or_torch(kind: Any) -> None:
    prior = NCPrior(source(), MLPHead((2,), width=8))
    options: dict[str, Any] = {"steps": 60, "eval_every": 10, "progress": False}
    history = fit(prior, torch.randn(200, 2), callback=lambda row: kind(True), **options)
    assert "callback" in history.stopped and history.rows[-1].step == 10
    history = fit(prior, torch.randn(200, 2), callback=lambda row: kind(False), **options)
    assert history.rows[-1].step == 60


@pytest.mark.parametrize("begin", [5, 10, 50, 150])
def test_a_decay_within_the_warm_up_never_raises_the_rate(begin: int) -> None:
    schedule = Schedule(1.0, None, max_seconds=5.0)
    before = schedule.rate(begin)
    schedule.after_step(begin, late=True)
    rates = [schedule.rate(t) for t in range(begin, schedule.last or 0)]
    assert 0 < rates[0] <= before
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    "module",
    [
        nn.MultiheadAttention(2, 1, dropout=0.5),
        nn.LSTM(2, 2, num_layers=2, dropout=0.5),
        nn.RReLU(),
        nn.Dropout(0.5),
        nn.BatchNorm1d(2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_all_kinds_of_noise_in_training_mode_are_known(module: nn.Module) -> None:
    assert noise_of(nn.Sequential(module)) == type(module).__name__
    assert noise_of(nn.Sequential(module).eval()) == ""


def test_modules_without_noise_may_be_in_training_mode() -> None:
    assert noise_of(nn.Sequential(nn.MultiheadAttention(2, 1), nn.LSTM(2, 2), nn.Dropout(0))) == ""


def test_chains_of_a_prior_in_half_precision_run_in_float32() -> None:
    """No step of 1e-6 moved a chain."""
    prior = Normal(torch.zeros(500).bfloat16(), 3.0)
    draw = langevin(
        prior,
        lambda z: 0 * z,
        num_steps=200,
        step_size=1e-6,
        init=torch.full((500,), 3.0).bfloat16(),
    )
    assert draw.z.dtype == torch.float32
    assert draw.z.var().item() == pytest.approx(2e-4, rel=0.3)


def test_two_particles_are_tempered() -> None:
    """The effective sample size of two is never below a half of them."""
    torch.manual_seed(0)
    prior = Normal(torch.zeros(2000), 1.0)
    draw = tempered_smc(prior, lambda z: 5 * z, num_particles=2)
    assert abs(draw.z.mean() - 5) < 0.5


def test_a_head_that_is_called_again_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large batches are proposed one z at a time, for which the head was never prepared."""
    head = MLPHead((2,), context_shape=(3,), width=8).eval()
    c, z = torch.randn(5, 3), torch.randn(4, 1, 5, 2)
    embedded = []
    head.context.register_forward_pre_hook(lambda *_: embedded.append(1))  # type: ignore[union-attr]
    monkeypatch.setattr("ncprior.heads.fast.is_unmodified", lambda head: True)
    log_r = prepare_head(head, c)
    with torch.no_grad():
        found = torch.cat([log_r(one) for one in z])
        assert len(embedded) == 2  # as a whole, and to be prepared
        torch.testing.assert_close(found, head(z[:, 0], c))


def test_an_encoder_is_standardised_by_all_of_sorted_data() -> None:
    torch.manual_seed(0)
    narrow, wide = 0.01 * torch.randn(1200, 2), 3 * torch.randn(2800, 2)
    x = torch.cat([narrow, wide])
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    likely = SingleGroup(
        base,
        lambda x: Independent(Normal(x, 0.5), 1),
        lambda z: z,
        likelihood=lambda z: Independent(Normal(z, 0.5), 1),
    )
    fitted = fit_encoder(likely, x, held_out=x[::40], steps=1, seed=0, progress=False)
    network: Any = fitted.encoder
    torch.testing.assert_close(network.spread, x.std(0), atol=0.3, rtol=0)


def test_variances_of_an_encoder_stay_numbers() -> None:
    vae = SingleGroup(
        Independent(Normal(torch.zeros(2), torch.ones(2)), 1),
        lambda x: Independent(Normal(x, 0.5), 1),
        lambda z: z,
        likelihood=lambda z: Independent(Normal(z, 0.5), 1),
    )
    extreme = nn.Linear(2, 4)
    nn.init.zeros_(extreme.weight)
    extreme.bias.data = torch.tensor([0.0, 0.0, -300.0, 300.0])
    fitted = fit_encoder(vae, torch.randn(50, 2), steps=0, encoder=extreme, progress=False)
    variance = fitted.encode(torch.zeros(3, 2)).scale.square()
    assert (variance > 0).all() and variance.isfinite().all()
