"""Arguments of `fit`, validated before anything is trained or changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import GaussianPair
from helpers.toys import flat, ladder_prior, same, stir, weights
from torch import Tensor
from torch.utils.data import Dataset

from ncprior import NCPrior, fit
from ncprior.heads.networks import MLPHead
from ncprior.training import FitSettings, calibrate_heads, gate, nested

QUIET = {"progress": False}
NAN, INF = math.nan, math.inf


def data(rows: int = 40) -> Tensor:
    return torch.randn(rows, 3)


def small() -> NCPrior:
    return NCPrior(flat(), MLPHead((2,), width=8))


def refused(prior: NCPrior, x: Any, match: str, **options: Any) -> None:
    """Asserts that `fit` raises our error, and leaves heads and generators as they were."""
    before, generator = weights(prior), torch.get_rng_state()
    with pytest.raises((TypeError, ValueError, OSError), match=match):
        fit(prior, x, **{"steps": 3, **options}, **QUIET)
    assert same(weights(prior), before)
    assert torch.equal(torch.get_rng_state(), generator)


COUNTS = ("steps", "batch_size", "eval_every", "checkpoint_every", "stages")


@pytest.mark.parametrize("value", [28.6, NAN, "10", 2.0, None, True])
@pytest.mark.parametrize("name", COUNTS)
def test_F4_F26_counts_are_whole_numbers(name: str, value: Any) -> None:
    """28.6 steps never ended."""
    if value is None and name in ("steps", "eval_every"):
        return  # the default
    refused(small(), data(), f"{name} must be ", **{name: value})


@pytest.mark.parametrize("value", [0, NAN, 1.5, "3"])
def test_F17_patience_is_a_whole_number_or_none(value: Any) -> None:
    refused(small(), data(), "patience must be a whole number", patience=value)


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF, "3", True])
def test_the_time_is_a_positive_number_of_seconds(value: Any) -> None:
    refused(small(), data(), r"max_seconds must be a number in \(0, inf\)", max_seconds=value)


def test_a_training_without_an_end_is_refused() -> None:
    batches = list(data().split(8))
    refused(small(), batches, "held out of list. Pass held_out=, steps= or max_s", steps=None)
    refused(small(), data(), "must have an end; got", steps=None, patience=None)


def test_counts_of_numpy_are_taken_and_resumed(tmp_path: Path) -> None:
    counts = {"steps": np.int64(2), "batch_size": np.int32(8), "eval_every": np.int64(1)}
    options = {**counts, "learning_rate": np.float32(0.01), "checkpoint": tmp_path / "c"}
    for _ in range(2):
        assert fit(small_twice(), data_twice(), **options, **QUIET).stopped == "all 2 steps taken"


def small_twice() -> NCPrior:
    torch.manual_seed(1)
    return small()


def data_twice() -> Tensor:
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("value", [NAN, INF, -1.0, "fast", None])
def test_F28_learning_rates_are_finite_numbers(value: Any) -> None:
    refused(small(), data(), "learning_rate must be a number in", learning_rate=value)


SETTINGS: dict[str, list[Any]] = {
    "weight_decay": [NAN, INF, -1.0, None],
    "max_grad_norm": [NAN, -1.0, 0.0, "5"],
    "ema_decay": [NAN, 1.5, None],
    "noise_weight": [NAN, INF, 0.0],
    "num_draws": [NAN, 1.5, 0, None],
    "num_cached_proposals": [NAN, 2048.5, 0],
    "cache_epochs": [NAN, 0, "always"],
    "cache_memory": [NAN, -1, "4"],
    "precision": [torch.float16, "bf16", None],
    "group_parallel": [1, None],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name, values in SETTINGS.items() for v in values]
)
def test_F17_F28_settings_are_refused_that_have_no_effect_or_a_wrong_one(
    name: str, value: Any
) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} must be "):
        FitSettings(**{name: value})


def test_F28_a_cache_may_have_all_memory() -> None:
    settings = FitSettings(cache_memory=INF, cache_epochs=INF)
    assert fit(small(), data(), steps=2, settings=settings, **QUIET).best_loss is not None


WRONG: dict[str, tuple[Callable[[NCPrior], Any], str]] = {
    "source": (lambda prior: prior.source, "prior must be of type NCPrior.*for_source"),
    "VAE": (lambda prior: prior.source.module, "prior must be of type NCPrior"),
    "class": (lambda _: NCPrior, "prior must be of type NCPrior; got the class NCPrior"),
    "None": (lambda _: None, "prior must be of type NCPrior; got None"),
    "parallel": (torch.nn.DataParallel, r"not DataParallel\(prior\).*Pass prior.module"),
}


@pytest.mark.parametrize("name", WRONG)
def test_F36_what_is_no_prior_is_refused(name: str) -> None:
    make, match = WRONG[name]
    with pytest.raises(TypeError, match=match):
        fit(make(small()), data(), steps=1, **QUIET)


def test_F36_the_steps_after_fit_validate_their_objects() -> None:
    prior = small()
    history = fit(prior, data(), steps=1, **QUIET)
    for call in (
        lambda: gate(prior.source, history),
        lambda: gate(prior, [history]),
        lambda: calibrate_heads(prior.source, data()),
        lambda: nested(prior.source, torch.exp),
        lambda: nested(prior, "sir"),
    ):
        with pytest.raises(TypeError, match="(prior|history|sampler) must be "):
            call()
    with pytest.raises(ValueError, match="history must be of this prior, with 3 groups"):
        gate(ladder_prior(3), history)


@pytest.mark.parametrize(
    ("option", "value"),
    [("callback", 3), ("callback", print.__class__), ("progress", "yes"), ("settings", {})],
)
def test_F16_objects_of_the_wrong_kind_are_found_before_training(option: str, value: Any) -> None:
    prior = small()
    before = weights(prior)
    with pytest.raises(TypeError, match=f"{option} must be "):
        fit(prior, data(), steps=3, **{**QUIET, option: value})
    assert same(weights(prior), before)


def test_M5_a_checkpoint_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    """F16 as well: found at the first save before, after 500 steps."""
    (tmp_path / "file").touch()
    for path in ("/proc/nope/c", tmp_path / "file" / "c"):
        refused(small(), data(), "checkpoint must be a file that can be written", checkpoint=path)
    refused(small(), data(), "must be a file; got the directory", checkpoint=tmp_path)
    refused(small(), data(), "checkpoint must be of type str or PathLike", checkpoint=3)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


HELD_OUT: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (lambda: torch.full((20, 3), NAN), "group 0 is nan at step 0.*held-out data"),
    "empty": (lambda: data(0), "held-out data has no batches"),
    "no data": (lambda: 3, "Data must be a tensor"),
    "one-shot": (lambda: iter([data()]), "read many times"),
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_F16_held_out_data_is_measured_before_training(name: str) -> None:
    make, match = HELD_OUT[name]
    prior, steps = small(), []
    before = weights(prior)
    for head in prior.heads:
        head.register_forward_hook(lambda module, *_: steps.append(module.training))
    with pytest.raises((ValueError, TypeError, FloatingPointError), match=match):
        fit(prior, data(), held_out=make(), steps=3, **QUIET)
    assert True not in steps  # nothing was trained
    assert same(weights(prior), before)


class _OwnNoise(Dataset[Tensor]):
    """Rows that differ every time they are read, whatever the global seed."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(self.rng.normal(size=3), dtype=torch.float32)


def test_data_with_a_generator_of_their_own_are_warned_of(tmp_path: Path) -> None:
    prior = NCPrior(flat(), MLPHead((2,), width=8))
    options: dict[str, Any] = {"steps": 2, "progress": False, "held_out": torch.randn(9, 3)}
    fit(prior, _OwnNoise(), **options)
    with pytest.warns(UserWarning, match="Rows of data differ when they are read twice") as caught:
        fit(prior, _OwnNoise(), checkpoint=tmp_path / "heads", **options)
    assert caught[0].filename == __file__


def test_F16_held_out_data_of_another_width_fails_before_training() -> None:
    """The error is of the user's network."""
    prior = small()
    before = weights(prior)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(prior, data(), held_out=torch.randn(20, 5), steps=3, **QUIET)
    assert same(weights(prior), before)


def test_W2_frozen_heads_are_refused() -> None:
    """AdamW's weight decay moved them before, and nothing else did."""
    refused(stir(small()).requires_grad_(False), data(), r"none of which requires a gradient")
    exact = NCPrior(GaussianPair().source(), GaussianPair().head())
    refused(exact, GaussianPair().data(40), "got 0 parameters")


def test_M7_heads_in_half_precision_are_refused() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        refused(small().to(dtype), data(), rf"float32 or better; got .*{dtype}.*prior.float\(\)")


def test_M8_a_tuple_of_rows_and_labels_is_refused() -> None:
    refused(small(), (data(), torch.arange(40)), "TensorDataset")


def test_M8_float64_arrays_train_a_float32_vae() -> None:
    array = data(100).double().numpy()
    for given in (array, array.tolist(), [part for part in array.reshape(4, 25, 3)]):
        history = fit(small(), given, held_out=array[:20], steps=2, **QUIET)
        assert history.best_loss is not None


class Table:
    """A stand-in for a DataFrame."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, column: Any) -> Any:
        raise KeyError(column)

    def to_numpy(self) -> np.ndarray:
        return self.values


def test_N8_a_table_is_trained_on() -> None:
    table = Table(data(100).double().numpy())
    assert fit(small(), table, steps=2, **QUIET).best_loss is not None


def test_none_among_the_batches_is_told_before_the_training() -> None:
    batches = [data(8), None]
    refused(small(), batches, "A list must hold batches; got None among them")
    refused(small(), data(), "A list must hold batches; got None among them", held_out=batches)
