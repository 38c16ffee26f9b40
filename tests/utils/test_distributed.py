"""Two processes on gloo: what each of them got is compared here."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import Ranks, launch, named
from helpers.toys import ladder_prior, stir

from ncprior.saving.tensors import save_tensors
from ncprior.utils.distributed import average_over_ranks, own_seed, require_own_device

if __name__ != "__main__":
    pytestmark = pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    )


def rank_main(rank: int, folder: Path) -> None:
    """One rank: its own gradients, those of the trainer, and what it is refused."""
    from helpers.vaebm_problems import LinearGaussian
    from torch.nn.parallel import DistributedDataParallel

    from ncprior import NCETrainer
    from ncprior.heads.networks import MLPHead
    from ncprior.vaebm.model import VAEBM
    from ncprior.vaebm.trainer import VAEBMTrainer

    torch.set_num_threads(1)
    torch.manual_seed(100 + rank)  # other heads, other data and other noise on each rank
    prior = stir(ladder_prior())
    prior.source.load_state_dict(torch.load(folder / "source.pt", weights_only=True))
    x = torch.randn(16, 3)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    saved: dict[str, torch.Tensor] = {}

    def keep(prefix: str) -> None:
        for name, p in prior.named_parameters():
            saved[f"{prefix}/{name}"] = p.detach().clone()
            if p.grad is not None:
                saved[f"{prefix}.grad/{name}"] = p.grad.clone()

    def seed() -> None:
        torch.manual_seed(200 + rank)

    keep("made")
    trainer = NCETrainer(prior, torch.optim.SGD(prior.parameters(), 0.1), max_grad_norm=None)
    keep("start")
    seed()
    losses = prior.nce_loss(x)
    losses.sum().backward()
    saved["own.loss"] = losses.detach()
    keep("own")
    prior.zero_grad()
    seed()
    metrics = trainer.step(x)
    saved["loss"], saved["norm"] = metrics
    keep("step")

    errors: dict[str, Any] = {}
    energy = MLPHead((3,), width=8)
    vaebm = VAEBM(LinearGaussian().source(), energy, step_size=1e38 if rank == 1 else 0.01)
    energies = VAEBMTrainer(vaebm, torch.optim.SGD(energy.parameters(), 0.1))
    ddp = DistributedDataParallel(prior)
    for name, call in {
        "ddp": lambda: NCETrainer(ddp, torch.optim.SGD(prior.parameters(), 0.1)),
        # One rank alone has a bad batch: both must stop, and none may wait for the other.
        "nan": lambda: trainer.step(x if rank == 0 else x * torch.nan),
        "chains": lambda: energies.step(x),
    }.items():
        try:
            call()
        except (TypeError, RuntimeError, FloatingPointError) as error:
            errors[name] = [type(error).__name__, str(error)]
    keep("after")
    prior.zero_grad()
    seed()
    ddp(x).sum().backward()  # forward: one loss, one backward and plain DDP
    keep("ddp")
    prior.zero_grad()
    seed()
    prior.nce_loss(x).sum().backward()
    keep("plain")
    trainer.max_grad_norm = 1e-3
    trainer.optimizer.param_groups[0]["lr"] = 1.0
    trainer.step(x)
    keep("clipped")
    rows = 3 - 2 * rank  # of this rank, in batches of four
    saved["weighted"] = average_over_ranks(torch.tensor([[1.0 + rank, 5.0]]), rows)
    vaebm = VAEBM(LinearGaussian().source(), stir(energy), step_size=0.01)
    energies = VAEBMTrainer(vaebm, torch.optim.SGD(energy.parameters(), 0.1))
    saved["own.energy"] = vaebm(x[:rows]).mean().detach()
    saved["energy"] = energies.step(x[:rows])[1]
    told: dict[str, list[str]] = {}
    for name, seed_of_rank in {"equal": 0, "own": rank}.items():
        torch.manual_seed(seed_of_rank)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            NCETrainer(prior, torch.optim.SGD(prior.parameters(), 0.0)).step(x)
            VAEBMTrainer(vaebm, torch.optim.SGD(energy.parameters(), 0.0)).step(x)
        told[name] = [str(one.message) for one in seen]
    facts = {"errors": errors, "steps": trainer.steps, "told": told}
    save_tensors(folder / f"rank{rank}", saved, facts)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(ladder_prior().source.state_dict(), folder / "source.pt")
    return launch(__file__, folder)


def equal(ranks: Ranks, prefix: str) -> bool:
    one, two = (named(rank, prefix) for rank in ranks)
    assert one.keys() == two.keys() and len(one) > 30
    return all(torch.equal(one[name], two[name]) for name in one)


def test_every_gradient_is_the_mean_of_the_two_ranks_own(ranks: Ranks) -> None:
    one, two = (named(rank, "own.grad") for rank in ranks)
    assert not equal(ranks, "own.grad")
    for rank in ranks:
        averaged = named(rank, "step.grad")
        assert averaged.keys() == one.keys() == named(rank, "step").keys()
        for name, gradient in averaged.items():
            torch.testing.assert_close(gradient, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-7)
    assert equal(ranks, "step.grad")


def test_all_ranks_start_from_the_heads_of_rank_0(ranks: Ranks) -> None:
    assert not equal(ranks, "made")
    assert equal(ranks, "start")
    made, start = named(ranks[0], "made"), named(ranks[0], "start")
    assert all(torch.equal(made[name], start[name]) for name in made)


def test_all_ranks_take_the_same_step(ranks: Ranks) -> None:
    assert equal(ranks, "step")
    start, grad, step = (named(ranks[0], prefix) for prefix in ("start", "step.grad", "step"))
    for name in start:
        torch.testing.assert_close(step[name], start[name] - 0.1 * grad[name])


def test_metrics_are_of_all_ranks(ranks: Ranks) -> None:
    (one, _), (two, _) = ranks
    assert torch.equal(one["loss"], two["loss"])
    assert torch.equal(one["norm"], two["norm"])
    torch.testing.assert_close(one["loss"], (one["own.loss"] + two["own.loss"]) / 2)
    gradients = named(ranks[0], "step.grad")
    for k in range(3):
        head = [g.norm() for name, g in gradients.items() if name.startswith(f"heads.{k}.")]
        torch.testing.assert_close(one["norm"][k], torch.stack(head).norm())


def test_a_rank_counts_as_much_as_it_has_rows(ranks: Ranks) -> None:
    (one, _), (two, _) = ranks
    energy = (3 * one["own.energy"] + two["own.energy"]) / 4
    for rank in (one, two):
        assert rank["weighted"].tolist() == [[1.25, 5.0]]
        torch.testing.assert_close(rank["energy"], energy)


def test_a_chain_that_runs_away_on_one_rank_stops_both(ranks: Ranks) -> None:
    found = [metadata["errors"]["chains"] for _, metadata in ranks]
    assert [kind for kind, _ in found] == ["RuntimeError", "FloatingPointError"]
    assert "Another rank" in found[0][1]


def test_ranks_have_seeds_of_their_own() -> None:
    draws = []
    for rank in range(4):
        torch.manual_seed(own_seed(5, rank))
        draws.append(torch.randn(4))
    assert len(torch.stack(draws).unique(dim=0)) == 4


def test_the_device_of_the_heads_must_be_the_current_one_of_nccl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From Part III, "Multi-GPU": without torch.cuda.set_device, all ranks reduced on cuda:0."""
    device = torch.device("cuda", 1)
    require_own_device(device)  # one process
    monkeypatch.setattr("ncprior.utils.distributed.num_ranks", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    require_own_device(device)
    require_own_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match=r"on cuda:1, and the current GPU is cuda:0.*device\(1\)"):
        require_own_device(device)


def test_a_ddp_wrapped_prior_is_refused_with_the_reason(ranks: Ranks) -> None:
    for _, metadata in ranks:
        kind, message = metadata["errors"]["ddp"]
        assert kind == "TypeError"
        assert "not DistributedDataParallel(prior)" in message
        assert "DDP would not average those gradients over the ranks" in message
        assert "Pass prior.module" in message


def test_a_non_finite_loss_of_one_rank_stops_both(ranks: Ranks) -> None:
    for _, metadata in ranks:
        kind, message = metadata["errors"]["nan"]
        assert kind == "FloatingPointError"
        assert "group 0 is nan" in message and "at step 1" in message
    for rank in ranks:
        before, after = named(rank, "step"), named(rank, "after")
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_forward_under_plain_ddp_has_the_mean_gradient(ranks: Ranks) -> None:
    one, two = (named(rank, "plain.grad") for rank in ranks)
    assert equal(ranks, "ddp.grad")
    for name, gradient in named(ranks[0], "ddp.grad").items():
        torch.testing.assert_close(gradient, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_after_they_are_averaged(ranks: Ranks) -> None:
    assert equal(ranks, "clipped.grad")
    assert equal(ranks, "clipped")
    gradients = named(ranks[0], "clipped.grad")
    for k in range(3):
        head = [g.norm() for name, g in gradients.items() if name.startswith(f"heads.{k}.")]
        torch.testing.assert_close(torch.stack(head).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)
    assert ranks[0][1]["steps"] == 2


def test_ranks_with_the_same_noise_are_noticed(ranks: Ranks) -> None:
    """Their chains would be copies; once for each of the two trainers."""
    for rank in ranks:
        told = rank[1]["told"]
        assert [
            text.startswith("All ranks have the same random state") for text in told["equal"]
        ] == [True] * 2
        assert told["own"] == []


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
