"""Training memory does not grow with the number of groups, measured in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MIB = 2**20
ROWS = 1024  # the activations of one head, some 15 MiB, dominate


def status(field: str) -> int:
    """A size in bytes out of /proc, such as VmRSS (now) or VmHWM (the peak)."""
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) * 1024


def main(how: str, num_groups: int, steps: int) -> None:
    """Prints the peak over the resident size before, less what the heads' state needs."""
    from helpers.toys import ladder_prior

    from ncprior import NCETrainer, fit

    torch.set_num_threads(1)
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
    print(status("VmHWM") - before - copies * weights)


def peak(how: str, num_groups: int, steps: int = 2, *, plain_malloc: bool = False) -> int:
    """The peak in bytes; glibc maps every block of 64 KiB or more unless `plain_malloc`.

    Mapped blocks go back when they are freed: what is measured is the memory that is in use.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    if not plain_malloc:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    command = [sys.executable, __file__, how, str(num_groups), str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc"
)


@linux
@pytest.mark.parametrize("how", ["step", "fit"])
def test_memory_does_not_grow_with_the_number_of_groups(how: str) -> None:
    few, many = peak(how, 3), peak(how, 30)
    assert few > 12 * MIB
    assert many <= 1.25 * few


@linux
def test_nor_does_the_memory_that_malloc_holds() -> None:
    """As many heads trained in both, since fragments come with time.

    Gradients made between activations would keep glibc from using that memory again: some 5 times
    as much was seen.
    """
    few, many = (peak("step", k, steps, plain_malloc=True) for k, steps in ((3, 30), (30, 3)))
    assert many <= 2 * few


@linux
@pytest.mark.slow
def test_one_backward_for_all_groups_would_grow() -> None:
    """That the measurement can fail."""
    assert peak("one backward", 30) > 3 * peak("one backward", 3)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
