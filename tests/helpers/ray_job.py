"""A sampling job on two workers of Ray, of which one is killed in the midst of it.

``python tests/helpers/ray_job.py FOLDER`` writes the parts to FOLDER/job, and to FOLDER/calls one line for
each call of the sampler.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers.toys import ladder_prior, stir

from ncprior import Draw, NCPrior, sir

JOB: dict[str, Any] = {"num_samples": 23, "part_size": 4, "seed": 7}

PARTS, GROUPS, KILLED = 6, 2, 8  # the call, of both workers, in which one is killed


def counted(prior: Any, log_ratio: Any, *, folder: str) -> Draw:
    """SIR, which writes down that it was called, and kills its process at one call."""
    calls = Path(folder) / "calls"
    with calls.open("a") as file:
        file.write(f"{os.getpid()}\n")
    if len(calls.read_text().split()) == KILLED and not (Path(folder) / "whole").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return sir(prior, log_ratio, num_proposals=20)


def made(folder: Path) -> NCPrior:
    """The prior of the job."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        prior = stir(ladder_prior(GROUPS))
    prior.sampler = partial(counted, folder=str(folder))
    return prior


def main(folder: Path) -> None:
    import ray
    from ray_sample import sample_on_ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    sample_on_ray(made(folder), str(folder / "job"), **JOB)
    ray.shutdown()


if __name__ == "__main__":
    from helpers import ray_job

    ray_job.main(Path(sys.argv[1]))
