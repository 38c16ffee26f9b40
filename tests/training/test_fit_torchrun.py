"""fit in four processes of torchrun: against one process, and after one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ncprior import NCETrainer, NCPrior, fit
from ncprior.heads import MLPHead
from ncprior.saving import load_tensors, save_tensors

RANKS, KILLED_AT, EVERY, STEPS = 4, 23, 5, 40


def rank_main(folder: Path) -> None:
    """What one rank does, in each of its two lives."""
    from test_fit_distributed import GROUPS, QUIET, ROWS, Replay, replayed

    from ncprior.training import held_out

    held_out._HELD_OUT_DRAWS = 32  # of 2,048: ranks are compared, not the precision
    torch.set_num_threads(1)
    rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    step = NCETrainer.step

    def counted(self: NCETrainer, x: Any) -> Any:
        if life == 0 and rank == 2 and self.steps == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        with (folder / f"steps-{life}-{rank}").open("a") as file:
            file.write(f"{self.steps}\n")
        return step(self, x)

    def trained(checkpoint: Path | None) -> NCPrior:
        torch.manual_seed(4)
        prior = NCPrior(Replay(GROUPS), [MLPHead((2,), width=8) for _ in range(GROUPS)])
        x = torch.arange(20 * ROWS)
        options = {"batch_size": ROWS, "eval_every": 10, "checkpoint_every": EVERY, **QUIET}
        fit(prior, x, held_out=torch.arange(37), steps=STEPS, checkpoint=checkpoint, **options)
        return prior

    alone = [replayed(group_parallel=how).state_dict() for how in (False, True)]
    dist.init_process_group("gloo")
    NCETrainer.step = counted  # type: ignore[method-assign]
    saved = {f"parts {n}": t for n, t in trained(folder / "checkpoint").state_dict().items()}
    NCETrainer.step = step  # type: ignore[method-assign]
    saved |= {f"whole {n}": t for n, t in trained(None).state_dict().items()}
    for how, one in zip((False, True), alone, strict=True):
        four = replayed(group_parallel=how).state_dict()
        for name, tensor in one.items():
            saved[f"{how} {name}"] = (four[name] - tensor).abs().max()
    save_tensors(folder / f"rank{rank}", saved, {})
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of four processes, one of which is killed in its first life."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or gloo finds the addresses of the dead
    }
    done = subprocess.run(
        [sys.executable, *run, "--max-restarts", "1", __file__, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("group_parallel", [False, True])
def test_four_processes_given_the_same_z_are_one(group_parallel: bool, folder: Path) -> None:
    """Of a batch of 17 rows, one rank has five and the others four; one rank has no group."""
    for rank in range(RANKS):
        saved, _ = load_tensors(folder / f"rank{rank}")
        difference = [t.item() for n, t in saved.items() if n.startswith(f"{group_parallel} ")]
        assert len(difference) > 10 and max(difference) < 1e-12


@pytest.mark.slow
def test_a_killed_rank_costs_at_most_one_checkpoint_interval(folder: Path) -> None:
    for rank in range(RANKS):
        first, second = (
            [int(step) for step in (folder / f"steps-{life}-{rank}").read_text().split()]
            for life in (0, 1)
        )
        assert first == list(range(KILLED_AT + (rank != 2)))
        assert second == list(range(KILLED_AT - KILLED_AT % EVERY, STEPS))
    ranks = [load_tensors(folder / f"rank{rank}")[0] for rank in range(RANKS)]
    names = [name.removeprefix("whole ") for name in ranks[0] if name.startswith("whole ")]
    assert len(names) > 10
    for name in names:
        for saved in ranks:
            assert torch.equal(saved[f"parts {name}"], ranks[0][f"whole {name}"])


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
