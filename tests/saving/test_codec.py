"""Nested states come back exactly, and nothing else is accepted."""

import random
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.equality import identical

from ncprior.saving.codec import pack, unpack
from ncprior.saving.tensors import load_tensors, save_tensors


def random_tree(rng: random.Random, depth: int) -> object:
    leaves = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.getrandbits(rng.choice([8, 62, 200])) - 2**61,
        lambda: rng.choice([rng.gauss(0, 1e-9), 1e300, 5e-324, 0.1, -0.0, float("inf"), 2.0]),
        lambda: float("nan"),
        lambda: rng.choice(["", "tensor", "π\n\0", "0"]),
        lambda: torch.rand(rng.choice([(), (0,), (2, 3)])).to(
            rng.choice([torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
        ),
        lambda: np.ones(
            rng.choice([(), (0, 3), (4,)]), rng.choice(["u4", "f8", ">i2", "c8", "?"])
        ),
    ]
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(leaves)()
    items = [random_tree(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = rng.sample([0, "0", 2**70, None, (1, "a"), "dict", -1.5, "tuple"], len(items))
    return rng.choice([list, tuple, lambda items: dict(zip(keys, items, strict=True))])(items)


@pytest.mark.parametrize("seed", range(50))
def test_a_state_comes_back_exactly(seed: int, tmp_path: Path) -> None:
    tree = random_tree(random.Random(seed), depth=4)
    packed, tensors = pack(tree)
    save_tensors(tmp_path / "a", tensors, {"state": packed})
    loaded, metadata = load_tensors(tmp_path / "a")
    assert identical(unpack(metadata["state"], loaded), tree)


def test_the_states_a_trainer_keeps_come_back_exactly(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), betas=(0.9, 0.99))
    layer(torch.rand(3, 2)).sum().backward()
    optimizer.step()
    generator = np.random.default_rng(0)
    tree = {
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.RandomState(3).get_state(),
        "generator": generator.bit_generator.state,
        "python": random.Random(5).getstate(),
    }
    packed, tensors = pack(tree)
    save_tensors(tmp_path / "a", tensors, {"state": packed})
    loaded, metadata = load_tensors(tmp_path / "a")
    state = unpack(metadata["state"], loaded)
    assert identical(state, tree)
    restored = random.Random()
    restored.setstate(state["python"])
    assert restored.random() == random.Random(5).random()


def test_an_unpacked_array_can_be_written_to() -> None:
    array = unpack(*pack(np.zeros(3)))
    array[0] = 1.0
    assert array.flags.owndata


def test_an_ordered_dict_comes_back_as_a_dict() -> None:
    assert identical(unpack(*pack(OrderedDict(a=1))), {"a": 1})


class Subclass(float):
    pass


@pytest.mark.parametrize(
    "leaf", [{1}, b"x", object(), np.float64(1), np.array([None]), defaultdict(list), Subclass(1)]
)
def test_what_cannot_be_packed_is_named(leaf: object) -> None:
    with pytest.raises(TypeError, match=rf"state\['a'\]\[1\], a {type(leaf).__name__}\."):
        pack({"a": [0, leaf]})


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"a": 1, "b": 2},
        {"module": "os"},
        {"tensor": "0"},
        {"tensor": []},
        {"dict": 1},
        {"dict": [[[1], 2]]},
        {"dict": [[1]]},
        {"array": ["0"]},
        {"array": ["a", "O", [3]]},
        {"float": "one"},
        {"tuple": None},
        1j,
    ],
)
def test_a_tree_that_is_not_packed_is_refused(tree: object) -> None:
    with pytest.raises(ValueError):
        unpack([tree], {"a": torch.zeros(3, dtype=torch.uint8)})
