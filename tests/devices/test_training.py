"""Sources, steps and `fit` in its forms: what is given lies anywhere, what comes back on the VAE's device."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.device_vaes import flat, normal, strays
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCETrainer, NCPrior, SingleGroup, fit
from ncprior.bases import GaussianMixture, fit_gaussian, rebase
from ncprior.heads import MLPHead
from ncprior.source import device_of, sample_posterior
from ncprior.testing import check_source
from ncprior.training import FitSettings, calibrate_heads, gate
from ncprior.utils.random_state import random_state, set_random_state

New = Callable[..., NCPrior]

QUICK: dict[str, Any] = {"steps": 4, "eval_every": 2, "batch_size": 64, "progress": False}


class Batch(dict[str, Tensor]):
    """A mapping of a type of its own, as pythae's data sets yield it."""


def test_the_source_is_where_its_base_is(source: SingleGroup, on: torch.device) -> None:
    assert device_of(source) == on


def test_sources_and_losses_take_data_from_anywhere(
    source: SingleGroup, new: New, x: Tensor, on: torch.device
) -> None:
    check_source(source, x[:8])
    prior = NCPrior.for_source(source, x[:64], width=8)
    found = (*prior.parameters(), sample_posterior(source, x[:8])[0], prior.nce_loss(x[:8]))
    assert not strays(found, on)


def test_steps_take_data_from_anywhere(new: New, x: Tensor, on: torch.device) -> None:
    prior = new()
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters(), lr=1e-3, fused=True))
    metrics = [trainer.step(b) for b in (x[:64], x[:64].to(on), [x[:64].cpu().numpy()])]
    assert not strays((metrics, *prior.parameters()), on)


class Posterior:
    """The posterior of the VAE for batches with names."""

    def __init__(self, source: SingleGroup) -> None:
        self.parts = source.shared_prior(), source.module

    def source(self) -> SingleGroup:
        base, vae = self.parts
        return SingleGroup(base, lambda b: vae.posterior(b["x"]), vae.decode, module=vae)


FORMS: dict[str, Callable[[Tensor], tuple[Any, Any]]] = {
    "data set": lambda x: (TensorDataset(x), None),
    "loader": lambda x: (DataLoader(TensorDataset(x), 64, shuffle=True), x[:40]),
    "list": lambda x: (list(x.split(50)), [x[:20], x[20:40]]),
    "array": lambda x: (x.cpu().numpy(), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_fit_takes_data_in_every_form(form: str, new: New, x: Tensor, on: torch.device) -> None:
    prior, (data, held_out) = new(), FORMS[form](x)
    history = fit(prior, data, held_out=held_out, **QUICK)
    assert len(history.rows) == 2
    assert not strays(list(prior.parameters()), on)


@pytest.mark.parametrize("kind", (dict, Batch, UserDict))
def test_fit_takes_mappings(kind: type, source: SingleGroup, x: Tensor, on: torch.device) -> None:
    named = Posterior(source).source()
    batches = [kind(x=rows) for rows in x.split(50)]
    prior = NCPrior.for_source(named, batches[0], width=8, depth=1)
    fit(prior, batches, held_out=batches[:1], **QUICK)
    assert not strays(list(prior.parameters()), on)


def test_fit_copies_from_pinned_memory(new: New, x: Tensor, on: torch.device) -> None:
    if on.type != "cuda":
        pytest.skip("pinned memory is CUDA's")
    loader = DataLoader(TensorDataset(x.cpu()), 64, pin_memory=True)
    fit(new(), loader, held_out=x[:40], **QUICK)


SETTINGS: dict[str, dict[str, Any]] = {
    "no cache": {"cache_epochs": None},
    "a cache on disk": {"cache_epochs": 2, "cache_memory": 0.0},
    "proposals of a cache": {"num_cached_proposals": 100},
    "bfloat16 and draws": {"precision": torch.bfloat16, "num_draws": 3},
    "score term": {"score_weight": 10.0, "precision": torch.bfloat16},
    "importance samples": {"importance_samples": 16},
    "importance samples of each step": {"importance_samples": 16, "cache_epochs": None},
    "no average, no clipping": {"ema_decay": 0.0, "max_grad_norm": None, "noise_weight": 3.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_fit_with_settings(name: str, new: New, x: Tensor, on: torch.device) -> None:
    prior = new()
    fit(prior, x, settings=FitSettings(**SETTINGS[name]), **QUICK)
    assert not strays(list(prior.parameters()), on)


@pytest.mark.parametrize("stages", (2, "auto"))
def test_fit_in_stages(stages: Any, new: New, x: Tensor, on: torch.device) -> None:
    prior = new()
    fit(prior, x, held_out=x[:40], stages=stages, **QUICK)
    assert not strays(list(prior.parameters()), on)


def test_heads_are_calibrated_and_gated(new: New, x: Tensor, on: torch.device) -> None:
    prior = new()
    history = fit(prior, x, held_out=x[:40], **QUICK)
    calibrate_heads(prior, x[:40])
    gate(prior, history)
    assert not strays(list(prior.parameters()), on)


def test_a_training_is_resumed_bit_for_bit(new: New, x: Tensor, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(row: Any) -> None:
        if row.step == 4:
            raise Stop

    whole, parted, options = new(), new(), {**QUICK, "held_out": x[:40]}
    torch.manual_seed(7)
    fit(whole, x, **options)
    torch.manual_seed(7)
    file: dict[str, Any] = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_every": 2}
    with pytest.raises(Stop):
        fit(parted, x, callback=stop, **file, **options)
    torch.manual_seed(123)
    resumed = new()
    fit(resumed, x, **file, **options)
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_held_out_losses_leave_the_generators_of_all_devices(new: New, x: Tensor) -> None:
    prior = new()
    rows: list[Any] = []
    fit(prior, x, held_out=x[:40], callback=lambda row: rows.append(random_state()), **QUICK)
    states = [str([t.tolist() for t in row["cuda"] + row["mps"]]) for row in rows]
    assert len(set(states)) == len(states)  # every interval has noise of its own


def test_parts_of_the_prior_on_the_cpu_are_named(
    source: SingleGroup, new: New, x: Tensor, z: Tensor, on: torch.device
) -> None:
    base: GaussianMixture = fit_gaussian(z).to("cpu")
    prior = NCPrior(source, MLPHead((3,), width=8, depth=1))
    with pytest.raises(ValueError, match="must be on one device"):
        fit(prior, x, **QUICK)
    with pytest.raises(ValueError, match="must be on one device"):
        fit(new(rebase(source, base)), x, **QUICK)


def test_a_new_prior_follows_its_source_to_a_device(x: Tensor, on: torch.device) -> None:
    assert not strays(list(NCPrior.for_source(flat(on), x[:64]).parameters()), on)


def test_GS1_nothing_is_read_before_it_has_arrived(
    x: Tensor, on: torch.device, waits: Callable[[], Any]
) -> None:
    """A copy to the CPU that is asynchronous returns before it is made."""
    if on.type != "cuda":
        pytest.skip("copies are asynchronous on CUDA")
    prior = NCPrior.for_source(flat(torch.device("cpu")), x[:64], width=8, depth=1)
    with waits() as seen:
        fit(prior, x.to(on), held_out=x[:40].to(on), **QUICK)
    assert not strays(list(prior.parameters()), torch.device("cpu"))
    assert not [line for line in seen if "async" in line]


def test_GS2_generators_of_other_devices_stay(new: New, x: Tensor, on: torch.device) -> None:
    if on.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    prior, other = new(), 1 - (on.index or 0)
    before = torch.cuda.get_rng_state(other)
    fit(prior, x, held_out=x[:40], **QUICK)
    assert torch.equal(torch.cuda.get_rng_state(other), before)


def test_GS4_draws_on_a_device_are_seen_by_check_source(on: torch.device) -> None:
    class Noisy(SingleGroup):
        def group(self, state: Any) -> Any:
            torch.randn(1, device=on)
            return super().group(state)

    vae = flat(on).module
    source = Noisy(normal(on), vae.posterior, vae.decode, module=vae)
    with pytest.raises(AssertionError, match="draw nothing"):
        check_source(source, torch.randn(8, 6))


def test_GC4_states_of_devices_that_are_not_here_are_left_out(on: torch.device) -> None:
    state = random_state()
    state["cuda"] = [*state["cuda"], *state["cuda"], *state["cuda"]]
    set_random_state(state)
    assert str(random_state()["mps"]) == str(state["mps"])
