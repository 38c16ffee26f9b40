"""A checkpoint changes nothing before it has been accepted whole."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.damage import edit_checkpoint, places, raw, with_value
from helpers.hub_problems import gaussian
from helpers.toys import same, weights
from torch import Tensor, nn

from ncprior import NCPrior, fit
from ncprior.heads.networks import MLPHead
from ncprior.saving.codec import pack
from ncprior.saving.tensors import load_tensors, save_tensors
from ncprior.training.resumable import load
from ncprior.utils.random_state import is_random_state, random_state, set_random_state
from ncprior.vaebm import VAEBM, EnergySettings, GaussianDecoder, fit_vaebm

OPTIONS: dict[str, Any] = {"steps": 6, "batch_size": 8, "eval_every": 2, "progress": False}

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_held_out_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncprior.training.held_out._HELD_OUT_DRAWS", 32)


class Interrupt(Exception):
    pass


def interrupt(row: Any) -> None:
    if row.step == 4:
        raise Interrupt


def made(width: int = 8) -> NCPrior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return NCPrior(gaussian(), MLPHead((2,), width=width, depth=1))


def train(prior: NCPrior, path: Path, **options: Any) -> Any:
    return fit(prior, X, held_out=X[:8], checkpoint=path, checkpoint_every=1, **OPTIONS, **options)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of three steps of six."""
    path = tmp_path_factory.mktemp("whole") / "checkpoint"
    outside = random_state()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr("ncprior.training.held_out._HELD_OUT_DRAWS", 32)
        train(made(), path, callback=interrupt)
    set_random_state(outside)
    return path.read_bytes()


@pytest.fixture
def path(content: bytes, tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").write_bytes(content)
    return tmp_path / "checkpoint"


def equal_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return repr(pack(one)) == repr(pack(other))


def refuses(path: Path, match: str = "checkpoint") -> None:
    """The checkpoint is refused; heads, generators and the file stay as they were."""
    prior, before = made(), path.read_bytes()
    kept, outside = weights(prior.heads), random_state()
    with pytest.raises(ValueError, match=match):
        train(prior, path)
    assert same(weights(prior.heads), kept)
    assert equal_states(random_state(), outside)
    assert path.read_bytes() == before


def test_a_whole_checkpoint_is_resumed(path: Path) -> None:
    resumed, straight = made(), made()
    assert train(resumed, path).rows[-1].step == 6
    train(straight, path.with_name("other"))
    assert load(path)["steps"] == 6  # type: ignore[index]


def adam(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    def changed(state: dict[str, Any]) -> None:
        for of_parameter in state["optimizer"]["state"].values():
            change(of_parameter)

    return changed


OPTIMIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "small": adam(lambda s: s.update(exp_avg=torch.zeros(1), exp_avg_sq=torch.zeros(1))),
    "empty": adam(lambda s: s.update(exp_avg=torch.zeros(0), exp_avg_sq=torch.zeros(0))),
    "one large": adam(lambda s: s.update(exp_avg_sq=torch.zeros(10_000))),
    "half": adam(lambda s: s.update(exp_avg=s["exp_avg"].half())),
    "whole numbers": adam(lambda s: s.update(exp_avg=s["exp_avg"].long())),
    "NaN": adam(lambda s: s["exp_avg"].fill_(torch.nan)),
    "negative": adam(lambda s: s["exp_avg_sq"].fill_(-1)),
    "a step of NaN": adam(lambda s: s.update(step=torch.tensor(torch.nan))),
    "steps not taken": adam(lambda s: s.update(step=torch.tensor(1e9))),
    "steps of rows": adam(lambda s: s.update(step=torch.zeros(3))),
    "a missing moment": adam(lambda s: s.pop("exp_avg")),
    "another moment": adam(lambda s: s.update(max_exp_avg_sq=s["exp_avg_sq"].clone())),
    "a text": adam(lambda s: s.update(exp_avg="x")),
    "another parameter": lambda s: s["optimizer"]["state"].update({99: {}}),
    "no states": lambda s: s["optimizer"].pop("state"),
    "a list": lambda s: s.update(optimizer=[]),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_F1_a_checkpoint_with_another_state_of_the_optimizer_raises(case: str, path: Path) -> None:
    edit_checkpoint(path, OPTIMIZERS[case])
    refuses(path, "its optimizer cannot be used here")


def test_F1_hyperparameters_are_those_of_the_training(path: Path, content: bytes) -> None:
    def change(state: dict[str, Any]) -> None:
        for group in state["optimizer"]["param_groups"]:
            group.update(maximize=True, betas=(0.0, 0.0), lr="much", fused=False, weight_decay=9.0)

    straight = made()
    train(straight, path)
    path.write_bytes(content)
    edit_checkpoint(path, change)
    prior = made()
    train(prior, path)
    assert same(weights(prior.heads), weights(straight.heads))


def read_outside(state: Tensor) -> None:
    """Puts the position behind the last word, with a whole block of words left."""
    state[8:12], state[16:24] = 0, 0
    for first in (8, 16):
        state[first : first + 2] = torch.tensor([624 % 256, 624 // 256], dtype=torch.uint8)


GENERATORS: dict[str, Callable[[dict[str, Any]], object]] = {
    "NumPy far outside": lambda g: g["numpy"].__setitem__(2, 2**30),
    "NumPy outside by one": lambda g: g["numpy"].__setitem__(2, 625),
    "NumPy before": lambda g: g["numpy"].__setitem__(2, -1),
    "NumPy of few words": lambda g: g["numpy"].__setitem__(1, np.zeros(3, np.uint32)),
    "NumPy of another kind": lambda g: g["numpy"].__setitem__(0, "PCG64"),
    "torch of few bytes": lambda g: g.update(torch=g["torch"][:100]),
    "torch of floats": lambda g: g.update(torch=g["torch"].float()),
    "torch outside": lambda g: read_outside(g["torch"]),
    "Python outside": lambda g: g.update(python=(3, (*g["python"][1][:-1], 10**6), None)),
    "Python of texts": lambda g: g.update(python=(3, ("x",) * 625, None)),
    "Python with an object": lambda g: g.update(python=(*g["python"][:2], "x")),
    "Python of another version": lambda g: g.update(python=(9, *g["python"][1:])),
    "a device's text": lambda g: g.update(cuda=["x"]),
    "an unknown device": lambda g: g.update(tpu=[]),
    "nothing of NumPy": lambda g: g.pop("numpy"),
}


@pytest.mark.parametrize("case", GENERATORS)
def test_F1_a_state_that_a_generator_would_read_outside_of_raises(case: str, path: Path) -> None:
    edit_checkpoint(path, lambda state: GENERATORS[case](state["generators"][0]))
    refuses(path, "its generators cannot be used here")


def test_F1_the_states_of_the_data_are_checked_too(path: Path) -> None:
    edit_checkpoint(
        path, lambda s: s["stream"]["epoch_start"]["generators"]["numpy"].__setitem__(2, 2**30)
    )
    refuses(path, "its stream cannot be used here")


def test_F2_a_place_in_the_data_that_is_never_reached_raises(path: Path) -> None:
    edit_checkpoint(path, lambda state: state["stream"].update(taken=10**12))
    refuses(path, "its stream cannot be used here")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_loss", [math.nan]),
        ("best_loss", [-math.inf]),
        ("best_error", [math.nan]),
        ("rows", torch.ones(2, 6)),
        ("rows", torch.ones(2, 5, dtype=torch.float64)),
        ("rows", torch.tensor([[0.5, 1, 1, 1, 1, 1]], dtype=torch.float64)),
        ("rows", torch.tensor([[math.nan, 1, 1, 1, 1, 1]], dtype=torch.float64)),
        ("stream", {"taken": 6}),
    ],
)
def test_numbers_that_no_training_has_raise(path: Path, name: str, value: Any) -> None:
    """The best loss could never be improved; an epoch of 40 rows in batches of 8 has five."""
    edit_checkpoint(
        path, lambda s: s[name].update(value) if name == "stream" else s.update({name: value})
    )
    refuses(path, f"its {name} cannot be used here")


def test_a_checkpoint_has_room_for_a_long_history(path: Path) -> None:
    edit_checkpoint(path, lambda state: state.update(rows=state["rows"].repeat(100_000, 1)))
    history = train(made(), path)
    assert len(history.rows) == 100_002
    assert [row.step for row in history.rows[-3:]] == [2, 4, 6]


def test_F16_a_checkpoint_with_a_wrong_entry_anywhere_changes_nothing(
    path: Path, content: bytes
) -> None:
    state = load(path)
    assert state is not None
    rng, found = random.Random(0), []
    inner = [p for p in places(state) if p and "numpy" not in p and "python" not in p]
    for place in [(key,) for key in state] + rng.sample(inner, 25):
        if place[0] in ("settings", "seconds") or "param_groups" in place:
            continue  # compared with the terms; a duration; not read
        value = rng.choice([None, "x", -1, [], {}, torch.zeros(7), 10**12, True])
        if place[0] in ("best", "decay_from", "limit") and value is None:
            continue  # nothing was measured or decided
        if value == [] and reduce(getitem, place, state) == []:
            continue  # there are no generators of a loader or a device
        path.write_bytes(content)
        edited = with_value(state, place, value)
        tree, tensors = pack(edited)
        save_tensors(path, tensors, {"kind": "checkpoint", "state": tree})
        if place[0] in ("rows", "stopped", "split_seed", "best_loss", "best_error"):
            continue  # other values of these are possible
        refuses(path)
        found.append(place)
    assert len(found) > 20


def test_F20_missing_and_misshapen_entries_are_named(path: Path, content: bytes) -> None:
    for key in ("steps", "weights", "average", "optimizer", "stream", "generators", "best_step"):
        path.write_bytes(content)
        edit_checkpoint(path, lambda state, key=key: state.pop(key))
        refuses(path, f"its {key}[ ,]")
    path.write_bytes(content)
    edit_checkpoint(path, lambda s: s["weights"].update({"0.out.bias": torch.zeros(2)}))
    refuses(path, "its weights cannot be used here")
    path.write_bytes(content)
    edit_checkpoint(path, lambda s: s["average"]["0.out.bias"].fill_(torch.inf))
    refuses(path, "its average cannot be used here")


def test_F23_a_state_that_is_nested_deeply_or_no_state_raises(path: Path, content: bytes) -> None:
    tensors, metadata = load_tensors(path)
    deep: Any = 0
    for _ in range(400):
        deep = {"tuple": [deep]}
    for state in (deep, [], "x", None, {"dict": []}, {"dict": [["settings", 3]]}, {"float": "x"}):
        save_tensors(path, {}, {"kind": "checkpoint", "state": state})
        refuses(path, "is not a checkpoint of fit.* Pass another file")
    for tree in ({**metadata, "state": with_value(metadata["state"], ("dict", 0), [[], 1])},):
        save_tensors(path, tensors, tree)
        refuses(path, "is not a checkpoint of fit")
    for text in ('{"a":' * 100_000, "NaN", '{"a": NaN}', '{"a": 1e999}', "[1]", "\ud800"):
        path.write_bytes(raw(None, text=text))
        refuses(path, "Cannot read")


def test_F30_texts_of_a_checkpoint_are_printed_without_control_characters(path: Path) -> None:
    edit_checkpoint(path, lambda state: state.update(stopped="\x1b[31m the end"))
    assert str(train(made(), path)).endswith(r"\x1b[31m the end")
    edit_checkpoint(path, lambda state: state["settings"].update(VAE="\x1b[31m"))
    refuses(path, r"VAE=\\x1b\[31m")


def test_a_tensor_of_a_checkpoint_belongs_to_one_place(path: Path) -> None:
    tensors, metadata = load_tensors(path)
    names = [p for p in places(metadata["state"]) if p and p[-1] == "tensor"]
    metadata = {**metadata, "state": with_value(metadata["state"], names[0], "1")}
    save_tensors(path, tensors, metadata)
    refuses(path, "is not a checkpoint of fit")


def test_GC4_states_of_more_devices_than_there_are_do_not_stop_a_resume(
    path: Path, content: bytes
) -> None:
    def change(state: dict[str, Any]) -> None:
        of_gpu = torch.zeros(16, dtype=torch.uint8)
        for generators in (state["generators"][0], state["stream"]["epoch_start"]["generators"]):
            generators.update(cuda=[of_gpu.clone(), of_gpu.clone()], xpu=[of_gpu.clone()])

    straight, moved = made(), made()
    train(straight, path)
    path.write_bytes(content)
    edit_checkpoint(path, change)
    train(moved, path)
    assert same(weights(straight.heads), weights(moved.heads))


def test_a_checkpoint_from_before_other_devices_were_kept_is_resumed(path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        for generators in (state["generators"][0], state["stream"]["epoch_start"]["generators"]):
            del generators["xpu"], generators["mps"]
            assert is_random_state(generators)

    edit_checkpoint(path, change)
    train(made(), path)


class Counting(nn.Module):
    """A head with extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))

    def get_extra_state(self) -> dict[str, Any]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state == {"version": 1}

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.a * z.sum(-1)


def test_C3_a_head_with_extra_state_is_trained_and_resumed(tmp_path: Path) -> None:
    straight, resumed = NCPrior(gaussian(), Counting()), NCPrior(gaussian(), Counting())
    torch.manual_seed(2)
    train(straight, tmp_path / "straight")
    torch.manual_seed(2)
    with pytest.raises(Interrupt):
        train(NCPrior(gaussian(), Counting()), tmp_path / "cut", callback=interrupt)
    train(resumed, tmp_path / "cut")
    assert straight.heads[0].a != 0 and torch.equal(straight.heads[0].a, resumed.heads[0].a)


# Energies


def energy() -> VAEBM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = MLPHead((3,), width=8, depth=1)
    return VAEBM(GaussianDecoder(gaussian(), 0.1), net, num_steps=2)


def train_energy(model: VAEBM, path: Path, **options: Any) -> Any:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    settings = EnergySettings(buffer_size=20)
    options = {"checkpoint_every": 1, "settings": settings, **OPTIONS, **options}
    return fit_vaebm(model, x, checkpoint=path, **options)


ENERGIES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "moments": ("optimizer", OPTIMIZERS["small"]),
    "generators": ("generators", lambda s: s["generators"][0]["numpy"].__setitem__(2, 2**30)),
    "kept weights": ("good", lambda s: s["good"]["out.bias"].fill_(torch.nan)),
    "no kept weights": ("good", lambda s: s.update(good=None)),
    "penalty": ("penalty", lambda s: s.update(penalty={})),
    "no buffer": ("buffer", lambda s: s.update(buffer=None)),
    "chains of others": ("buffer", lambda s: s.update(buffer=((torch.zeros(8, 5),) * 2, 8))),
    "too many chains": (
        "buffer",
        lambda s: s.update(buffer=(tuple(t.repeat(9, 1) for t in s["buffer"][0]), 8)),
    ),
    "chains never pushed": ("buffer", lambda s: s.update(buffer=(s["buffer"][0], -1))),
    "sums": ("sums", lambda s: s.update(sums=torch.zeros(1))),
}


def test_F1_a_checkpoint_of_an_energy_is_checked_alike(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with pytest.raises(Interrupt):
        train_energy(energy(), path, callback=interrupt)
    content = path.read_bytes()
    for entry, change in ENERGIES.values():
        path.write_bytes(content)
        edit_checkpoint(path, change)
        model, outside = energy(), random_state()
        before = weights(model.energy)
        with pytest.raises(ValueError, match=f"its {entry} cannot be used here"):
            train_energy(model, path)
        assert same(weights(model.energy), before)
        assert equal_states(random_state(), outside)
    path.write_bytes(content)
    assert train_energy(energy(), path).rows[-1].step == 6
