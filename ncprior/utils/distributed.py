"""Sums, broadcasts and gathers over the ranks of a process group; one rank without a group."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_APART = 1_000_003  # distance between the seeds of neighbouring ranks; larger than any offset


def num_ranks() -> int:
    """Returns the number of processes of the group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process in the group, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def warn_of_equal_noise(stacklevel: int) -> None:
    """Warns if all ranks draw the same random numbers, as after one seed for all.

    Arguments:
        stacklevel: As for ``warnings.warn``, from the caller on.
    """
    if num_ranks() == 1:
        return
    states: list[Any] = [None] * num_ranks()
    dist.all_gather_object(states, torch.get_rng_state().numpy().tobytes())
    if len(set(states)) == 1:
        warnings.warn(
            "All ranks have the same random state, so that they draw the same z and the same chains. "
            "Call torch.manual_seed(seed + rank) before the first step.",
            stacklevel=stacklevel + 1,
        )


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over the ranks; the tensor itself without a group."""
    if num_ranks() == 1:
        return tensor
    total = _reachable(tensor).clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def average_over_ranks(tensor: Tensor, rows: int = 1) -> Tensor:
    """Returns the mean of a tensor over the ranks; the tensor itself without a group.

    Arguments:
        tensor: The values of this rank, such as its mean over some rows; of one shape on all ranks.
        rows: Number of these rows, its weight: the result is the mean over the rows of all ranks.
    """
    if num_ranks() == 1:
        return tensor
    weighted = torch.cat([tensor.reshape(-1) * rows, tensor.new_full((1,), rows)])
    total, weight = sum_over_ranks(weighted).split([tensor.numel(), 1])
    mean: Tensor = (total / weight).view_as(tensor)
    return mean


def from_rank(owner: int, tensor: Tensor) -> None:
    """Broadcasts a tensor from rank ``owner``, in place."""
    if num_ranks() > 1:
        sent = _reachable(tensor.detach()).contiguous()
        dist.broadcast(sent, src=owner)
        with torch.no_grad():
            tensor.copy_(sent)


def gather(value: T) -> list[T]:
    """Returns the values of all ranks, ordered by rank."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value)
    return found


def on_rank_zero(function: Callable[[], T]) -> T:
    """Calls a function on rank 0 alone, and returns its result on all ranks.

    Raises:
        Exception: The error of the function, on rank 0.
        RuntimeError: On all other ranks if the function fails, so that no rank waits for rank 0.
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
    """Raises on all ranks if one of them has an error, so that no rank waits for it.

    Raises:
        Exception: The error of this rank.
        RuntimeError: On ranks without an error.
    """
    failed = float(error is not None)
    if num_ranks() > 1:
        failed = float(sum_over_ranks(torch.tensor([failed])))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("Another rank has failed. Read the error of that rank.")


def require_own_device(device: torch.device) -> None:
    """Validates that NCCL sums on the device of the trained weights: on the current GPU.

    Raises:
        ValueError: If the current GPU is another one, as on all ranks but one without
            ``torch.cuda.set_device``.
    """
    if num_ranks() == 1 or device.index is None or dist.get_backend() != "nccl":
        return
    current = torch.cuda.current_device()
    if device.index != current:
        raise ValueError(
            f"In several processes, the weights must be on the current GPU of their process; they "
            f"are on {device}, and the current GPU is cuda:{current}. Call "
            f"torch.cuda.set_device({device.index}) first."
        )


def align_generators() -> None:
    """Seeds torch's generators on all ranks with a draw of rank 0; no effect on one rank."""
    if num_ranks() > 1:
        torch.manual_seed(on_rank_zero(lambda: int(torch.randint(2**62, ()))))


def own_seed(seed: int, number: int) -> int:
    """Returns the seed of one rank, derived from a common seed; 32 bits, for CPU generators."""
    return (seed + _APART * number) % 2**32


def _reachable(tensor: Tensor) -> Tensor:
    """Returns a tensor on a device of the group's backend: a GPU for NCCL."""
    if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor
