"""The ranks of a process group: what they sum, agree on and gather; one rank without a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_APART = 1_000_003  # seeds of neighbouring ranks, so that stages and walks do not meet them


def num_ranks() -> int:
    """Returns the number of processes of the group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process' number in the group, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over the ranks; itself without a group."""
    if num_ranks() == 1:
        return tensor
    total = _reachable(tensor).clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def average_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the mean of a tensor over the ranks; itself without a group."""
    return sum_over_ranks(tensor) / num_ranks() if num_ranks() > 1 else tensor


def from_rank(owner: int, tensor: Tensor) -> None:
    """Overwrites a tensor with that of another rank."""
    if num_ranks() > 1:
        sent = _reachable(tensor.detach()).contiguous()
        dist.broadcast(sent, src=owner)
        with torch.no_grad():
            tensor.copy_(sent)


def gather(value: T) -> list[T]:
    """Returns what all ranks have, by rank."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value)
    return found


def on_rank_zero(function: Callable[[], T]) -> T:
    """Returns on all ranks what a function returns on rank 0, the only one that calls it.

    Raises:
        Exception: What the function raises, on rank 0.
        RuntimeError: Then, on all others, so that none waits for it.
    """
    if num_ranks() == 1:
        return function()
    sent: list[Any] = [None, None]
    failure = None
    if rank() == 0:
        try:
            sent[0] = function()
        except Exception as error:  # noqa: BLE001 (raised again below)
            failure, sent[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(sent, src=0)
    if failure is not None:
        raise failure
    if sent[1] is not None:
        raise RuntimeError(f"Rank 0 has failed: {sent[1]}")
    value: T = sent[0]
    return value


def fail_together(error: Exception | None) -> None:
    """Raises on all ranks if any has met an error, so that none waits for it.

    Raises:
        Exception: This rank's own.
        RuntimeError: On ranks that have met none.
    """
    failed = float(error is not None)
    if num_ranks() > 1:
        failed = float(sum_over_ranks(torch.tensor([failed])))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("Another rank has failed; see its error.")


def align_generators() -> None:
    """Seeds torch's generators on all ranks with a number that rank 0 draws; nothing on one rank."""
    if num_ranks() > 1:
        torch.manual_seed(on_rank_zero(lambda: int(torch.randint(2**62, ()))))


def own_seed(seed: int, number: int) -> int:
    """Returns a rank's own seed of one that all ranks share; 32 bits, as a CPU's generator takes."""
    return (seed + _APART * number) % 2**32


def _reachable(tensor: Tensor) -> Tensor:
    """A tensor where the group's backend can reach it: NCCL's are on a GPU."""
    if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor
