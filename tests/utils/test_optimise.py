"""Standardised latents, and descent that keeps the best of what it saw."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ncprior.utils.optimise import cosine_rate, minimise, standardise, train, update_average


def bowl(w: Tensor, centre: float) -> Callable[[], Tensor]:
    return lambda: (w - centre).square().mean()


def test_the_schedule_is_a_cosine_to_zero() -> None:
    rates = [cosine_rate(0.2, taken, 8) for taken in range(9)]
    assert rates[0] == 0.2 and rates[4] == pytest.approx(0.1) and rates[8] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_averages_warm_up_and_integers_are_copied() -> None:
    average, tensors = [torch.zeros(2), torch.tensor(3)], [torch.ones(2), torch.tensor(7)]
    update_average(average, tensors, 0.9, step=1)
    assert torch.allclose(average[0], torch.full((2,), 9 / 11)) and average[1] == 7
    update_average(average, tensors, 0.0, step=2)
    assert (average[0] == 1).all()


def test_latents_are_standardised_and_come_back() -> None:
    z = 5 + torch.randn(400, 2, 3) @ torch.randn(3, 3)
    z[:, 1, 2] = 7.0  # a constant
    white, loc, scale = standardise(z)
    assert torch.allclose((loc + scale * white).reshape(z.shape), z, atol=1e-5)
    assert torch.allclose(white.mean(0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(white.std(0)[:5], torch.ones(5), atol=1e-5)
    assert (white[:, 5] == 0).all() and scale[5] == 1
    assert standardise(z.double(), torch.float64)[0].dtype == torch.float64


def test_the_descent_ends_at_the_minimum() -> None:
    w = torch.zeros(3, requires_grad=True)
    least = minimise(bowl(w, 2.0), bowl(w, 2.0), [w], steps=600, learning_rate=0.1)
    assert torch.allclose(w, torch.full((3,), 2.0), atol=1e-2)
    assert least == bowl(w, 2.0)().item() and w.grad is None


def test_what_is_kept_is_best_on_held_out_data() -> None:
    """The training loss leads from 0 to 2, past 1 where the held-out loss is least."""
    w, steps = torch.zeros(3, requires_grad=True), []

    def loss() -> Tensor:
        steps.append(1)
        return bowl(w, 2.0)()

    least = minimise(loss, bowl(w, 1.0), [w], steps=5000, learning_rate=5e-3, patience=2)
    assert least == bowl(w, 1.0)().item() < 0.2
    assert len(steps) < 2000


def test_without_a_better_one_the_first_is_kept() -> None:
    w = torch.zeros(3, requires_grad=True)
    assert minimise(bowl(w, 2.0), bowl(w, -1.0), [w], steps=200, learning_rate=0.1) == 1.0
    assert (w == 0).all()


def test_the_average_is_kept() -> None:
    """On a loss that jumps between ±1, the last w is at random and its average close to 0."""
    w = torch.zeros(200, requires_grad=True)

    def noisy() -> Tensor:
        return (w - torch.randn(200).sign() * 5).square().mean()

    minimise(noisy, lambda: -bowl(w, 9.0)() * 0 + w.sum() * 0 - 1, [w], steps=1, learning_rate=1.0)
    assert (w == 0).all()  # equally good: the first one stays
    held_out: list[float] = []

    def watched() -> Tensor:
        held_out.append(w.square().mean().item())
        return torch.tensor(-float(len(held_out)))  # the last is best

    minimise(noisy, watched, [w], steps=300, learning_rate=0.5)
    assert w.square().mean().item() == pytest.approx(held_out[-1])
    assert held_out[-1] < 0.5


def test_buffers_are_those_of_the_best() -> None:
    """Such as the statistics of batch normalisation, which every step changes."""
    w, count = torch.zeros(3, requires_grad=True), torch.zeros(())

    def loss() -> Tensor:
        count.add_(1)
        return (w - 1).square().mean()

    def held_out() -> Tensor:
        return (count - 200).abs()

    buffers = [count, torch.ones(1).expand(2)]  # the second cannot be written to
    assert minimise(loss, held_out, [w], steps=400, learning_rate=0.1, buffers=buffers) == 0.0
    assert count == 200


def test_parameters_stay_where_they_are_put() -> None:
    w = torch.zeros(3, requires_grad=True)

    def project() -> None:
        with torch.no_grad():
            w.clamp_(max=0.5)

    options: Any = {"steps": 300, "learning_rate": 0.1, "project": project}
    minimise(bowl(w, 2.0), bowl(w, 2.0), [w], **options)
    assert torch.allclose(w, torch.full((3,), 0.5), atol=1e-3) and (w <= 0.5).all()


def test_no_other_tensor_gets_a_gradient() -> None:
    w, other = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    unused = torch.ones(3, requires_grad=True)
    with torch.no_grad():  # the caller's mode does not matter
        minimise(
            lambda: (w * other - 1).square().sum(), bowl(w, 1.0), [w, unused], steps=200,
            learning_rate=0.1,
        )  # fmt: skip
    assert other.grad is None and torch.allclose(w, torch.ones(3), atol=0.05)
    assert (unused == 1).all()


def test_a_loss_that_is_not_finite_is_refused_and_the_best_kept() -> None:
    w = torch.zeros(3, requires_grad=True)
    count = iter(range(10**6))

    def loss() -> Tensor:
        return bowl(w, 2.0)() if next(count) < 150 else w.sum() * math.nan

    with pytest.raises(FloatingPointError, match="held-out loss of the flow is nan at step 200"):
        minimise(loss, bowl(w, 2.0), [w], steps=900, learning_rate=0.01, name="flow")
    assert torch.isfinite(w).all() and (w > 0.1).all()


@pytest.mark.parametrize(
    "wrong", [{"steps": -1}, {"learning_rate": 0.0}, {"learning_rate": math.inf}, {"patience": 0}]
)
def test_numbers_without_sense_are_refused(wrong: Any) -> None:
    w = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=f"got .*{next(iter(wrong.values()))}"):
        minimise(bowl(w, 1.0), bowl(w, 1.0), [w], **{"steps": 1, "learning_rate": 1.0, **wrong})


def step_on(w: Tensor, **changed: Any) -> float:
    options = {"steps": 3, "learning_rate": 0.1, **changed}
    return minimise(bowl(w, 2.0), bowl(w, 2.0), [w], **options)


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 2.5},
        {"steps": -1},
        {"learning_rate": math.nan},
        {"weight_decay": math.inf},
        {"patience": 0},
        {"patience": 1.5},
        {"progress": 1},
    ],
)
def test_F26_numbers_of_a_descent_are_validated(changed: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(changed))} must be "):
        step_on(torch.zeros(3, requires_grad=True), **changed)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_F3_networks_are_trained_where_gradients_are_off(off: Any) -> None:
    """A RuntimeError of torch before."""
    ends = []
    for context in (torch.enable_grad, off):
        torch.manual_seed(0)
        line, x, w = torch.nn.Linear(1, 1), torch.ones(8, 1), torch.zeros(3, requires_grad=True)

        def loss(rows: Tensor, line: Any = line, x: Tensor = x) -> Tensor:
            return line(x[rows]).square().mean()

        with context():
            train(line, loss, 8, steps=3, batch_size=4, progress=False)
            step_on(w)
        ends.append((line.weight.item(), w.tolist()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 1.5), ("batch_size", 0), ("num_rows", "8"), ("learning_rate", math.nan)],
)
def test_F26_numbers_of_train_are_validated(name: str, value: Any) -> None:
    options = {"num_rows": 8, "steps": 1, "batch_size": 4, "progress": False, name: value}
    with pytest.raises((TypeError, ValueError), match=f"{name} must be "):
        train(torch.nn.Linear(1, 1), lambda rows: rows.sum(), **options)
    with pytest.raises(TypeError, match="module must be of type Module"):
        train(lambda x: x, lambda rows: rows.sum(), 8, steps=1, batch_size=1)


def test_no_gradients_are_left() -> None:
    line = torch.nn.Linear(1, 1)
    train(
        line,
        lambda rows: line(rows[:, None].float()).sum(),
        8,
        steps=2,
        batch_size=4,
        progress=False,
    )
    assert all(w.grad is None for w in line.parameters())


def test_a_learning_rate_beyond_float32_is_refused() -> None:
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="learning_rate must be a number in"):
        minimise(lambda: w.sum(), lambda: w.sum(), [w], steps=1, learning_rate=1e60)


def test_an_interrupt_leaves_a_network_in_evaluation_mode() -> None:
    net = torch.nn.Linear(1, 1).eval()

    def stop(rows: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(net, stop, 10, steps=5, batch_size=2, learning_rate=0.1, progress=False)
    assert not net.training
