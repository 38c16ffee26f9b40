"""fit in two processes on gloo: against one process, and against itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import Ranks, launch, named
from helpers.toys import KnownLadder, Unfinished, ladder_prior, stir
from torch import Size, Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ncprior import Group, NCPrior, fit
from ncprior.heads.networks import MLPHead
from ncprior.saving.tensors import save_tensors
from ncprior.training import FitSettings, resumable

if __name__ != "__main__":
    pytestmark = pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    )

STEPS, ROWS, GROUPS = 20, 17, 3  # a batch has 9 rows for one rank and 8 for the other
QUIET: dict[str, Any] = {"progress": False}


class Stored:
    """What was drawn for some rows, as a prior or a posterior."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """The same z every time."""
        return self.z.expand(*sample_shape, *self.z.shape)


class Replay(Unfinished):
    """A source of several groups whose batches are row numbers, and whose draws are stored."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        generator = torch.Generator().manual_seed(9)
        self.z = torch.randn(2, GROUPS, STEPS * ROWS, 2, generator=generator)
        self.z = self.z.double()
        self.z[0] += 0.7

    def encode(self, x: Any) -> Tensor:
        """Row numbers."""
        return x

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> Any:
        """The row numbers, and the group."""
        return encoding, 0

    def group(self, state: Any) -> Group:
        """The draws stored for these rows."""
        rows, k = state
        return Group(Stored(self.z[1, k, rows]), Stored(self.z[0, k, rows]))  # type: ignore[arg-type]

    def advance(self, state: Any, z: Tensor) -> Any:
        """The next group."""
        return state[0], state[1] + 1


def replayed(num_groups: int = GROUPS, **options: Any) -> NCPrior:
    """Heads trained on the stored draws, with settings, in as many steps as there are batches."""
    torch.manual_seed(4)
    heads = [MLPHead((2,), width=8, depth=1) for _ in range(num_groups)]
    prior = NCPrior(Replay(num_groups), heads).double()  # the sums are rounded in another order
    rows = list(torch.arange(STEPS * ROWS).split(ROWS))
    held_out = torch.arange(37)
    prior.history = fit(  # type: ignore[assignment]
        *(prior, rows),
        held_out=held_out,
        eval_every=5,
        patience=None,
        steps=STEPS,
        learning_rate=1e-2,
        batch_size=ROWS,
        settings=FitSettings(**options),
        **QUIET,
    )
    return prior


def recorded(advance: Any, saved: dict[str, Tensor]) -> Any:
    """A walk that remembers where the generator was at its first step."""

    def told(state: Any, z: Tensor) -> Any:
        saved.setdefault("generator", torch.get_rng_state())
        return advance(state, z)

    return told


class Stopped(Exception):
    pass


def full_disk(*_: Any) -> None:
    raise OSError("No space left.")


def rank_main(rank: int, folder: Path) -> None:
    """What one rank gets."""
    from ncprior.training import held_out

    held_out._HELD_OUT_DRAWS = 32  # of 2,048: both ranks are compared, not the precision
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    saved: dict[str, Tensor] = {}
    told: dict[str, Any] = {}

    def keep(prefix: str, prior: NCPrior) -> None:
        saved.update({f"{prefix}/{name}": t.clone() for name, t in prior.state_dict().items()})

    for how in (False, True):
        prior = replayed(group_parallel=how)
        keep(f"replayed {how}", prior)
        told[f"held out {how}"] = [row.held_out for row in prior.history.rows]
        told[f"loss {how}"] = [row.loss for row in prior.history.rows]

    keep("one group", replayed(1, group_parallel=True))  # more ranks than groups

    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(3))
    for how in (False, True):
        calls: list[int] = []

        def callback(row: Any, calls: list[int] = calls) -> bool:
            calls.append(row.step)
            return row.step >= 20

        def train(name: str, how: bool = how, **options: Any) -> None:
            torch.manual_seed(50 + rank)  # other heads and generators on each rank
            prior = stir(ladder_prior(3, dropout=0.3, kind=KnownLadder), 0.1)
            prior.source.load_state_dict(torch.load(folder / "source.pt", weights_only=True))
            cache, samples = options.pop("cache", "auto"), options.pop("samples", None)
            settings = FitSettings(
                group_parallel=how, cache_epochs=cache, importance_samples=samples
            )
            options = {"batch_size": 51, "eval_every": 10, "settings": settings, **options}
            if name == "stopped" and not how:
                prior.source.advance = recorded(prior.source.advance, saved)
            told[f"ess of {name} {how}"] = fit(prior, x, **options, **QUIET).ess
            keep(f"{name} {how}", prior)

        train("stopped", steps=40, batch_size=50, callback=callback)
        told[f"calls {how}"] = calls
        train("whole", steps=31, cache=1)
        train("particles", steps=20, cache=2, samples=8)
        train("particles of each step", steps=20, cache=None, samples=8)
        path = folder / f"checkpoint-{how}"

        def interrupt(row: Any) -> None:
            if row.step == 20:
                raise Stopped

        try:
            train(
                *("parts",),
                steps=31,
                cache=1,
                callback=interrupt,
                checkpoint=path,
                checkpoint_every=7,
            )
        except (Stopped, RuntimeError) as error:
            told[f"interrupted {how}"] = f"{type(error).__name__}: {error}"
        dist.barrier()
        train("parts", steps=31, cache=1, checkpoint=path, checkpoint_every=7)
    for name, options in {"steps": {"steps": 5 + rank}, "rows": {"batch_size": 1}}.items():
        try:
            train("none", **{"steps": 5, **options})
        except ValueError as error:
            told[name] = str(error)
    given = {
        "sampler": DataLoader(x, 32, sampler=DistributedSampler(x)),  # type: ignore[arg-type]
        "other data": x + rank,
    }
    for name, data in given.items():
        try:
            fit(ladder_prior(), data, held_out=x, steps=5, **QUIET)
        except ValueError as error:
            told[name] = str(error)
    resumable.save_tensors = full_disk
    try:
        train("none", steps=5, checkpoint=folder / "no place")
    except (OSError, RuntimeError) as error:
        told["full disk"] = str(error)
    save_tensors(folder / f"rank{rank}", saved, told)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(ladder_prior().source.state_dict(), folder / "source.pt")
    return launch(__file__, folder)


def both(ranks: Ranks, prefix: str) -> dict[str, Tensor]:
    """What both ranks have got alike, bit for bit."""
    one, two = (named(rank, prefix) for rank in ranks)
    assert one.keys() == two.keys()
    assert len(one) > 20
    assert all(torch.equal(one[name], two[name]) for name in one)
    return one


@pytest.mark.parametrize("group_parallel", [False, True])
def test_two_processes_given_the_same_z_are_one(ranks: Ranks, group_parallel: bool) -> None:
    prior = replayed()
    found = both(ranks, f"replayed {group_parallel}")
    for name, tensor in prior.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12)
    for _, told in ranks:
        for i, row in enumerate(prior.history.rows):
            assert told[f"held out {group_parallel}"][i] == pytest.approx(row.held_out, abs=1e-5)
            assert told[f"loss {group_parallel}"][i] == pytest.approx(row.loss, abs=1e-5)


def test_a_rank_without_a_group_goes_along(ranks: Ranks) -> None:
    prior = replayed(1)
    one, two = (named(rank, "one group") for rank in ranks)
    for name, tensor in prior.state_dict().items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group_parallel", [False, True])
def test_one_log(ranks: Ranks, group_parallel: bool) -> None:
    """Rank 0 calls back, and stops both."""
    both(ranks, f"stopped {group_parallel}")
    assert [told[f"calls {group_parallel}"] for _, told in ranks] == [[10, 20], []]


@pytest.mark.parametrize("group_parallel", [False, True])
def test_one_checkpoint_from_which_both_go_on(ranks: Ranks, group_parallel: bool) -> None:
    (_, one), (_, two) = ranks
    assert one[f"interrupted {group_parallel}"].startswith("Stopped")
    assert two[f"interrupted {group_parallel}"] == "RuntimeError: Rank 0 has failed: Stopped: "
    whole, parts = (both(ranks, f"{name} {group_parallel}") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("group_parallel", [False, True])
def test_importance_samples_are_weighted_by_the_heads_of_rank_0(
    ranks: Ranks, group_parallel: bool
) -> None:
    """Every rank has other heads at first, and in the end the same."""
    for name in ("particles", "particles of each step"):
        both(ranks, f"{name} {group_parallel}")
        one, two = (told[f"ess of {name} {group_parallel}"] for _, told in ranks)
        assert one == two > 1


def test_ranks_that_were_not_given_the_same_are_refused(ranks: Ranks) -> None:
    for _, told in ranks:
        assert "got steps=[5, 6], by rank" in told["steps"]
        assert "batches of 1 rows for 2 ranks" in told["rows"]


def test_rows_are_divided_once(ranks: Ranks) -> None:
    for _, told in ranks:
        assert "got a DistributedSampler in data" in told["sampler"]
        assert "All ranks must be given the same; got data=[" in told["other data"]


def test_no_rank_waits_for_one_that_cannot_write(ranks: Ranks) -> None:
    (_, one), (_, two) = ranks
    assert one["full disk"] == "No space left."
    assert two["full disk"] == "Rank 0 has failed: OSError: No space left."


def test_ranks_draw_z_of_their_own(ranks: Ranks) -> None:
    """Of the same noise for both, all would stay in the averaged gradients."""
    one, two = (saved["generator"] for saved, _ in ranks)
    assert not torch.equal(one, two)  # after as many draws


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).parents[1]))
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
