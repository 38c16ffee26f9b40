"""Training memory does not grow with the number of groups, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MIB = 2**20
ROWS = 1024  # the activations of one head, some 15 MiB, dominate

# A measurement: how to train, the number of groups, the number of steps.
Case = tuple[str, int, int]


def status(field: str) -> int:
    """A size in bytes out of /proc, such as VmRSS (now) or VmHWM (the peak)."""
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) * 1024


def growth(how: str, num_groups: int, steps: int) -> int:
    """The peak over the resident size before, less the memory of the heads' state, in bytes."""
    from helpers.toys import ladder_prior

    from ncprior import NCETrainer, fit

    torch.manual_seed(0)
    x = torch.randn(ROWS, 3)
    prior = ladder_prior(num_groups, width=128, depth=2)
    small = torch.nn.Linear(3, 3)  # what torch loads once, whatever the number of groups
    torch.optim.AdamW(small.parameters()).step(lambda: small(x).sum().backward())
    weights = sum(4 * p.numel() for p in prior.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    if how == "fit":
        fit(prior, x, held_out=x, batch_size=ROWS, steps=steps, eval_every=2, progress=False)
        copies = 5  # gradients, two moments, moving average, best
    else:
        trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters()))
        for _ in range(steps):
            if how == "step":
                trainer.step(x)
            else:  # one loss and one backward, for comparison
                trainer.optimizer.zero_grad()
                prior(x).sum().backward()
                trainer.optimizer.step()
        copies = 3
    return status("VmHWM") - before - copies * weights


def main(cases: list[Case]) -> list[int]:
    """The growth of each case, in a child of its own: all start from the same memory."""
    import torch._dynamo  # loaded by the first optimizer; here once for all children

    import ncprior  # noqa: F401

    torch.set_num_threads(1)
    found = []
    for case in cases:
        receiving, sending = os.pipe()
        if (child := os.fork()) == 0:
            os.write(sending, str(growth(*case)).encode())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        found.append(int(os.read(receiving, 64)))
    return found


def peaks(*cases: Case, plain_malloc: bool = False) -> list[int]:
    """The growth of each case in bytes; glibc maps blocks of 64 KiB or more unless `plain_malloc`.

    Mapped blocks go back when they are freed: what is measured is the memory that is in use.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    if not plain_malloc:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    command = [sys.executable, __file__, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc"
)
WAYS = ("step", "fit", "one backward")


@pytest.fixture(scope="module")
def in_use() -> dict[str, list[int]]:
    """For every way to train, the peaks with 3 and with 30 groups."""
    found = peaks(*[(how, groups, 2) for how in WAYS for groups in (3, 30)])
    return {how: found[2 * i : 2 * i + 2] for i, how in enumerate(WAYS)}


@linux
@pytest.mark.parametrize("how", ["step", "fit"])
def test_memory_does_not_grow_with_the_number_of_groups(
    how: str, in_use: dict[str, list[int]]
) -> None:
    few, many = in_use[how]
    assert few > 12 * MIB
    assert many <= 1.25 * few


@linux
def test_one_backward_for_all_groups_would_grow(in_use: dict[str, list[int]]) -> None:
    """That the measurement can fail."""
    few, many = in_use["one backward"]
    assert many > 3 * few


@linux
def test_nor_does_the_memory_that_malloc_holds() -> None:
    """As many heads trained in both, since fragments come with time.

    Gradients made between activations would keep glibc from using that memory again: some 5 times
    as much was seen.
    """
    few, many = peaks(("step", 3, 30), ("step", 30, 3), plain_malloc=True)
    assert many <= 2 * few


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
