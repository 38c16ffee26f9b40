"""Held-out losses: the same at every call, one encoding per row, and an end."""

from __future__ import annotations

import math
import random
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import CorrelatedPair, GaussianPair
from helpers.toys import VAE, base, flat
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ncprior import NCPrior, SingleGroup, fit
from ncprior.heads.networks import MLPHead
from ncprior.training import FitSettings
from ncprior.training import held_out as module
from ncprior.training.held_out import HeldOut, mean_and_error
from ncprior.training.importance import CachedParticles
from ncprior.training.stages import with_cached_proposals

CPU = torch.device("cpu")


class Noisy(Dataset[Tensor]):
    """Rows with noise of one generator."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Tensor:
        draw = {"torch": torch.randn, "numpy": np.random.randn, "python": random.random}[self.kind]
        return torch.full((2,), float(i)) + (draw(()) if self.kind == "torch" else draw())


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
@pytest.mark.parametrize("loader", [False, True])
def test_W12_losses_are_the_same_every_time(kind: str, loader: bool) -> None:
    problem = GaussianPair()
    data = DataLoader(Noisy(kind), 4, shuffle=True) if loader else Noisy(kind)
    held_out = HeldOut(data, NCPrior(problem.source(), problem.head()), 4, seed=3)
    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    assert torch.equal(held_out(CPU), held_out(CPU))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[2], random.getstate()) == before[1:]


@pytest.mark.parametrize("rows", [1, 20, 300, 3000])
def test_F29_every_row_is_encoded_once_and_drawn_often(rows: int) -> None:
    problem, counts = GaussianPair(), []
    source = problem.source()
    encode = source.encode
    source.encode = lambda x: counts.append(len(x)) or encode(x)
    draws: list[torch.Size] = []
    head = problem.head()
    head.register_forward_hook(lambda _, inputs, output: draws.append(output.shape))
    x = problem.data(rows)
    HeldOut(x, NCPrior(source, head), 256, seed=0)(CPU)
    assert sum(counts) == rows
    assert sum(shape[1] * shape[2] for shape in draws) >= max(rows, 2048)


def test_F29_many_draws_of_few_rows_have_the_exact_loss() -> None:
    """Mean over 100 sets of 20 rows; with 103 draws of z each."""
    problem, prior = CorrelatedPair(), NCPrior(CorrelatedPair(), CorrelatedPair().heads())
    losses = [HeldOut(problem.data(20), prior, 256, seed)(CPU)[1].mean() for seed in range(100)]
    exact = 2 * np.log(2) - 2 * problem.jsd
    assert abs(np.mean(losses) - exact) < 4 * np.std(losses) / 10


def keyed(batches: list[Any]) -> tuple[NCPrior, list[Any]]:
    vae = VAE()
    source = SingleGroup(base(), lambda b: vae.posterior(b["x"]), vae.decode, module=vae)
    return NCPrior(source, MLPHead((2,), width=8)), batches


def test_C4_batches_may_hold_tensors_without_axes() -> None:
    parts = torch.randn(40, 3).split(10)
    prior, data = keyed([{"x": part, "temperature": torch.tensor(3.0)} for part in parts])
    history = fit(prior, data, held_out=data[:2], steps=2, progress=False)
    assert history.best_loss is not None


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_W3_the_rows_of_any_mapping_are_dealt_out_over_ranks(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = torch.randn(40, 3).split(10)
    prior, data = keyed([kind(x=part) for part in parts])
    shares = []
    monkeypatch.setattr(module, "num_ranks", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        held_out = HeldOut(data, prior, 10, seed=0)
        shares.append(held_out(CPU)[0] != 0)
    assert torch.equal(shares[0], ~shares[1])
    assert shares[0].sum() == 20


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.randn(3)


def test_M8_endless_held_out_data_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncprior.data.batches._MOST_ROWS", 1000)
    for data in (Endless(), DataLoader(Endless(), 50)):
        prior = NCPrior(flat(), MLPHead((2,), width=8))
        with pytest.raises(ValueError, match="must have an end and at most 1000 rows"):
            fit(prior, torch.randn(40, 3), held_out=data, steps=2, progress=False)


@pytest.mark.parametrize("folder", ["training", "data"])
def test_G_S2_G_S3_G_M1_seeds_and_float64_are_safe_on_every_device(folder: str) -> None:
    """`fork_rng` keeps the generators of one GPU alone; MPS has no copy into float64."""
    package = Path(module.__file__).parents[1]
    for path in (package / folder).glob("*.py"):
        text = path.read_text()
        assert "fork_rng" not in text, path
        assert '.to("cpu", torch.float64)' not in text, path


class Tilted(nn.Module):
    """log r = z_0 - 1/2, that of N(0, I) and N((1, 0), I)."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z[..., 0] - 0.5


def test_stored_draws_of_a_base_are_a_part_of_the_error() -> None:
    """60 losses of 40,000 rows; all rows of one share 2,048 draws of the base."""
    base = Independent(Normal(torch.zeros(2), 1.0), 1)
    source = SingleGroup(
        base, lambda x: Independent(Normal(x, 0.1, validate_args=False), 1), lambda z: z
    )
    torch.manual_seed(0)
    x = torch.randn(40_000, 2) + torch.tensor([1.0, 0.0])
    losses, told, of_rows = [], [], []
    for seed in range(60):
        _, stored = with_cached_proposals(source, 100, seed)
        held_out = HeldOut(x, NCPrior(stored, Tilted()).eval(), 5000, seed)
        found = held_out(CPU)
        losses.append(found.mean().item())
        told += held_out.errors(found)
        of_rows += mean_and_error(found)[1]
    over_draws = np.std(losses)  # x stays
    assert 0.7 < np.mean(told) / over_draws < 1.5
    assert np.mean(of_rows) < 0.6 * over_draws


def test_one_row_knows_no_error() -> None:
    losses, errors = mean_and_error(torch.tensor([[1.2], [0.8]]))
    assert losses == pytest.approx([1.2, 0.8]) and errors == [math.inf] * 2


def test_held_out_rows_share_no_noise_with_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that x does not determine: a particle of one must not be a particle of the other."""
    found: list[Tensor] = []

    class Watched(CachedParticles):
        def renew(self, number: int) -> None:
            if number != self.number:
                super().renew(number)
                found.append(self._rows[torch.arange(len(self))].latents[0].flatten())

    monkeypatch.setattr("ncprior.training.stage_runs.CachedParticles", Watched)
    base = Independent(Normal(torch.zeros(2), 1.0), 1)

    def same(x: Tensor) -> Independent:
        return Independent(Normal(torch.zeros(len(x), 2), 1.0), 1)

    source = SingleGroup(base, same, lambda z: z, likelihood=same)
    torch.manual_seed(0)
    prior = NCPrior(source, MLPHead((2,), width=8))
    settings = FitSettings(importance_samples=4, cache_epochs=1)
    data, held_out = torch.randn(40, 2), torch.randn(40, 2)
    fit(prior, data, held_out=held_out, steps=6, batch_size=20, settings=settings, progress=False)
    assert len(found) == 4  # two renewals more
    assert len(torch.cat(found).unique()) == sum(map(len, found))
