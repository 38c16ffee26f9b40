from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from ncprior.data.batches import first_rows, one_pass
from ncprior.data.parts import split
from ncprior.data.stream import Stream
from ncprior.utils.random_state import random_state, set_random_state

ROWS = 10
X = torch.arange(float(ROWS))


class Numbers(Dataset[Tensor]):
    """0, 1, 2, ..., with noise of all three generators when `noisy`."""

    def __init__(self, *, noisy: bool = False) -> None:
        self.noisy = noisy

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> Tensor:
        noise = torch.rand(()) + np.random.rand() + random.random() if self.noisy else 0.0
        return X[i] + noise


class Counting(IterableDataset[Tensor]):
    """An iterable without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from X


class ShuffleBuffer(IterableDataset[Tensor]):
    """Streams through a buffer, and draws from it with a global generator as batches are asked."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def draw(self, n: int) -> int:
        if self.kind == "torch":
            return int(torch.randint(n, ()))
        return int(np.random.randint(n)) if self.kind == "numpy" else random.randrange(n)

    def __iter__(self) -> Iterator[Tensor]:
        buffer: list[Tensor] = []
        for x in [*X, *(X + 100)]:
            buffer.append(x)
            if len(buffer) > 5:
                yield buffer.pop(self.draw(len(buffer)))
        while buffer:
            yield buffer.pop(self.draw(len(buffer)))


class Batches:
    """A re-iterable of batches of one's own."""

    def __iter__(self) -> Iterator[Tensor]:
        for rows in torch.randperm(ROWS).split(3):
            yield X[rows]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**31, ())))


def loader(dataset: Any = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers() if dataset is None else dataset, **{"batch_size": 3, **options})


# --- what comes out ---

EVERY_KIND: dict[str, Callable[[], Any]] = {
    "tensor": lambda: X,
    "array": lambda: X.numpy(),
    "dataset": Numbers,
    "tensor dataset": lambda: TensorDataset(X),
    "subset": lambda: Subset(Numbers(), range(ROWS)),
    "loader": lambda: loader(shuffle=True),
    "iterable dataset": Counting,
    "loader of an iterable": lambda: loader(Counting()),
    "list of batches": lambda: list(X.split(3)),
    "tuple of batches": lambda: X.split(3),
    "own iterable": Batches,
}


def rows_of(batch: Any) -> list[int]:
    return [int(x) for x in (batch[0] if isinstance(batch, list | tuple) else batch)]


@pytest.mark.parametrize("name", EVERY_KIND)
def test_every_kind_of_data_makes_epochs(name: str) -> None:
    stream = Stream(EVERY_KIND[name](), batch_size=3)
    ours = name in ("tensor", "array", "dataset", "tensor dataset", "subset")
    per_epoch = 3 if ours else 4
    epochs = [[rows_of(next(stream)) for _ in range(per_epoch)] for _ in range(4)]
    for epoch in epochs:
        seen = [row for batch in epoch for row in batch]
        assert len(seen) == len(set(seen)) == (9 if ours else 10)  # the last is left out, or not
        assert all(len(batch) == 3 for batch in epoch[:3])
    shuffled = ours or name in ("loader", "own iterable")
    assert (epochs[0] != epochs[1]) == shuffled
    assert isinstance(next(stream), Tensor | list | tuple)


def test_data_of_one_small_batch() -> None:
    for data in (X, X.numpy(), Numbers()):
        stream = Stream(data, batch_size=64)
        assert sorted(rows_of(next(stream))) == sorted(rows_of(next(stream))) == list(range(ROWS))


def test_a_tensor_keeps_its_rows_whatever_their_shape() -> None:
    x = torch.randn(8, 3, 4, 4)
    batch = next(Stream(x, batch_size=8))
    assert batch.shape == x.shape
    assert {row.sum().item() for row in batch} == {row.sum().item() for row in x}


def test_a_one_shot_iterator_ends() -> None:
    stream = Stream(iter(X.split(3)), batch_size=3)
    assert sum(len(batch) for batch in stream) == ROWS
    with pytest.raises(StopIteration):
        next(stream)


def test_a_read_only_array_is_taken_without_a_warning() -> None:
    array = X.numpy().copy()
    array.flags.writeable = False  # what np.load(..., mmap_mode="r") gives
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(next(Stream(array, batch_size=4))) == 4
        assert split(array, 0.2, seed=0) is not None
        assert len(list(one_pass(array, 4))) == 3


def test_data_of_no_use_is_refused() -> None:
    with pytest.raises(
        TypeError, match="tensor, an array, a dataset, a DataLoader or an iterable .* got 3"
    ):
        Stream(3, batch_size=2)
    with pytest.raises(TypeError, match="dict"):  # its keys are no batches
        Stream({"image": X}, batch_size=2)


@pytest.mark.parametrize(
    "nothing",
    [[], iter([]), torch.empty(0, 3), Subset(Numbers(), [])],
    ids=["list", "iterator", "tensor", "dataset"],
)
def test_empty_data_is_refused(nothing: Any) -> None:
    with pytest.raises(ValueError, match="The data has no batches"):
        next(Stream(nothing, batch_size=2))


def test_what_must_be_resumable_is_no_one_shot_iterator() -> None:
    for once in (iter(X.split(3)), (x for x in X.split(3)), map(torch.sin, X.split(3))):
        with pytest.raises(TypeError, match="read again from its start; got a one-shot"):
            Stream(once, batch_size=3, resumable=True)
    for name, make in EVERY_KIND.items():
        assert len(rows_of(next(Stream(make(), 3, resumable=True)))) == 3, name


# --- exact resume ---

RESUMABLE: dict[str, Callable[[], Any]] = {
    **EVERY_KIND,
    "noisy dataset": lambda: Numbers(noisy=True),
    "noisy loader": lambda: loader(Numbers(noisy=True), shuffle=True),
    "loader with its generator": lambda: loader(shuffle=True, generator=generator()),
    "noisy loader with its generator": lambda: loader(
        Numbers(noisy=True), shuffle=True, generator=generator()
    ),
    "sampler with its generator": lambda: loader(
        sampler=RandomSampler(Numbers(), generator=generator())
    ),
    "weighted sampler with its generator": lambda: loader(
        sampler=WeightedRandomSampler(torch.ones(ROWS), 20, generator=generator())
    ),
    "both with generators": lambda: loader(
        sampler=RandomSampler(Numbers(), generator=generator()), generator=generator()
    ),
    "batch sampler with its generator": lambda: DataLoader(
        Numbers(),
        batch_sampler=BatchSampler(RandomSampler(Numbers(), generator=generator()), 3, False),
    ),
    "sampler with replacement": lambda: loader(
        sampler=RandomSampler(Numbers(), replacement=True, num_samples=100)
    ),
    "noisy list": lambda: [X[:3], X[3:6], X[6:]],
    "shuffle buffer, torch": lambda: ShuffleBuffer("torch"),
    "shuffle buffer, numpy": lambda: ShuffleBuffer("numpy"),
    "shuffle buffer, python": lambda: ShuffleBuffer("python"),
}


def train() -> float:
    """What a training step draws."""
    return torch.rand(()).item() + np.random.rand() + random.random()


def take(stream: Stream, count: int) -> list[tuple[Any, float]]:
    return [
        (torch.stack(list(map(torch.as_tensor, flat(next(stream))))), train())
        for _ in range(count)
    ]


def flat(batch: Any) -> list[Any]:
    return list(batch[0] if isinstance(batch, list | tuple) else batch)


def scramble(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def assert_same(a: list[tuple[Any, float]], b: list[tuple[Any, float]]) -> None:
    assert [noise for _, noise in a] == [noise for _, noise in b]
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(a, b, strict=True))


@pytest.mark.parametrize("taken", [1, 2, 3, 4, 7, 9, 13])
@pytest.mark.parametrize("name", RESUMABLE)
def test_a_stream_continues_as_if_never_stopped(name: str, taken: int) -> None:
    scramble(1)
    stream = Stream(RESUMABLE[name](), 3, resumable=True)
    take(stream, taken)
    place, generators = stream.state(), random_state()
    expected = take(stream, 15)
    scramble(2)  # another process
    resumed = Stream(RESUMABLE[name](), 3, resumable=True)
    resumed.restore(place)
    set_random_state(generators)
    assert_same(take(resumed, 15), expected)


class Noise(Dataset[Tensor]):
    """Draws of torch's, NumPy's and Python's generators."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])


@pytest.mark.parametrize("restored", [False, True])
def test_the_noise_of_the_data_is_not_the_noise_of_training(restored: bool) -> None:
    """Transforms and posterior samples of equal random numbers would be correlated."""
    stream = Stream(Noise(), 2)
    if restored:
        next(stream)
        place, stream = stream.state(), Stream(Noise(), 2)
        stream.restore(place)
    data, training = [], []
    for _ in range(30):
        data.append(next(stream))
        training.append(torch.tensor([[torch.rand(()).item(), np.random.rand(), random.random()]]))
    seen, drawn = torch.cat(data), torch.cat(training)
    for k in range(3):
        assert not torch.isin(seen[:, k], drawn[:, k]).any()


@pytest.mark.parametrize("name", ["noisy dataset", "loader with its generator"])
def test_taking_the_state_changes_nothing(name: str) -> None:
    runs = []
    for ask in (False, True):
        scramble(1)
        stream, seen = Stream(RESUMABLE[name](), 3), []
        for _ in range(10):
            if ask:
                stream.state(), random_state()
            seen += take(stream, 1)
        runs.append(seen)
    assert_same(*runs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads
def test_a_loader_with_workers_continues_exactly() -> None:
    def make() -> Stream:
        data = loader(Numbers(noisy=True), shuffle=True, num_workers=1)
        return Stream(data, 3, resumable=True)

    scramble(1)
    stream = make()
    take(stream, 2)
    place, generators = stream.state(), random_state()
    expected = take(stream, 4)
    scramble(2)
    resumed = make()
    resumed.restore(place)
    set_random_state(generators)
    assert_same(take(resumed, 4), expected)


def test_a_second_stop_is_as_good_as_the_first() -> None:
    scramble(1)
    stream = Stream(Numbers(noisy=True), 3)
    expected = take(stream, 12)
    scramble(1)
    stream, seen = Stream(Numbers(noisy=True), 3), []
    for _ in range(6):
        seen += take(stream, 2)
        place, generators = stream.state(), random_state()
        scramble(99)
        stream = Stream(Numbers(noisy=True), 3)
        stream.restore(place)
        set_random_state(generators)
    assert_same(seen, expected)


def test_the_generators_come_back() -> None:
    state = random_state()
    first = train()
    np.random.randn()  # leaves a second normal waiting, which is part of NumPy's state
    waiting = random_state()
    expected = np.random.randn()
    scramble(5)
    set_random_state(state)
    assert train() == first
    set_random_state(waiting)
    assert np.random.randn() == expected


# --- split and in_order ---


@pytest.mark.parametrize("name", ["tensor", "array", "dataset", "tensor dataset", "subset"])
def test_a_split_is_a_partition(name: str) -> None:
    data = EVERY_KIND[name]()
    before = torch.get_rng_state()
    train_part, held_out = split(data, 0.3, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    a, b = ([int(flat_row(row)) for row in part] for part in (train_part, held_out))
    assert (len(a), len(b)) == (7, 3)
    assert sorted(a + b) == list(range(ROWS))
    assert b != sorted(b) or a != sorted(a)
    _, again = split(data, 0.3, seed=3)
    assert [int(flat_row(row)) for row in again] == b
    assert any([int(flat_row(r)) for r in split(data, 0.3, seed=s)[1]] != b for s in (4, 5))


def flat_row(row: Any) -> Tensor:
    return row[0] if isinstance(row, list | tuple) else row


def test_the_size_of_a_split() -> None:
    sizes = {n: len(split(torch.arange(n), 0.05, seed=0)[1]) for n in (2, 9, 30, 100, 1000)}
    assert sizes == {2: 1, 9: 1, 30: 2, 100: 5, 1000: 50}
    with pytest.raises(ValueError, match="1 rows cannot be split. Pass held_out="):
        split(torch.arange(1), 0.05, seed=0)


def test_what_has_no_rows_is_not_split() -> None:
    for name in (
        "loader",
        "iterable dataset",
        "list of batches",
        "tuple of batches",
        "own iterable",
    ):
        assert split(EVERY_KIND[name](), 0.05, seed=0) is None, name
    assert split(iter(X.split(3)), 0.05, seed=0) is None


@pytest.mark.parametrize(
    "name", [name for name in EVERY_KIND if name not in ("loader", "own iterable")]
)
def test_in_order_has_every_row_once_and_again(name: str) -> None:
    batches = one_pass(EVERY_KIND[name](), 4)
    for _ in range(2):
        assert [row for batch in batches for row in rows_of(batch)] == list(range(ROWS))


def test_in_order_refuses_what_can_be_read_once() -> None:
    with pytest.raises(TypeError, match="read many times; got a one-shot generator"):
        one_pass((x for x in X.split(3)), 4)
    with pytest.raises(TypeError, match="got 3"):
        one_pass(3, 4)


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seed must be a whole number in \(-1e\+?18, 1e\+?18\)"):
        split(torch.arange(10), 0.5, seed=-(2**70))


@pytest.mark.parametrize(
    "kind", [list, lambda x: DataLoader(TensorDataset(x, -x), 4, shuffle=True)]
)
def test_the_first_rows_are_as_many_as_asked_for(kind: Any) -> None:
    """Statistics of heads were those of one batch of 2 rows."""
    x = torch.arange(100.0)[:, None]
    data = list(zip(x.split(4), (-x).split(4), strict=True)) if kind is list else kind(x)
    before = torch.get_rng_state()
    found = first_rows(data, 30)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found[0]) == 32 and torch.equal(found[0], -found[1])
    assert len(first_rows(x, 30)) == 30 and len(first_rows(data, 3)[0]) == 4
    assert len(first_rows(data, 1000)[0]) == 100
    assert first_rows([{"name": ["a"], "x": x}], 1000)["name"] == ["a"]
