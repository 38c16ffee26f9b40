"""Samples of a prior, drawn by the workers of a Ray cluster, one task for each part of the job.

    pip install -c constraints.txt '.[demo,ray]'
    python examples/loops/ray_sample.py --workers 2 --out samples

A part depends on its number alone, and whole parts are kept. Ray replaces a worker that dies and starts
its task again, which costs the part that it was drawing; a cluster that is lost costs the parts in work. On
several machines, pass a folder that all of them can reach, or a URL such as s3://bucket/samples. Prints
the number of samples.
"""

import argparse
from functools import partial
from typing import Any

import ray
from your_vae import source_and_data

from ncprior import NCPrior, fit, sir
from ncprior.jobs import read_parts, sample_parts


@ray.remote(max_retries=-1)
def draw(prior: NCPrior, folder: str, part: int, job: dict[str, Any]) -> None:
    """One part, on one core. With GPUs: ray.remote(num_gpus=1), and a prior that is moved to it."""
    sample_parts(prior, folder, parts=[part], progress=False, **job)


def sample_on_ray(prior: NCPrior, folder: str, **job: Any) -> None:  # noqa: ANN401
    """Draws all parts of a job, with the arguments of `sample_parts`."""
    parts = range(-(-job["num_samples"] // job["part_size"]))
    shared = ray.put(prior)  # sent to each machine once
    ray.get([draw.remote(shared, folder, part, job) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--out", default="samples", help="folder or URL of the parts")
    parser.add_argument(
        "--workers", type=int, default=None, help="workers of a cluster of its own"
    )
    options = parser.parse_args()

    source, x_train, _ = source_and_data(options.seed)
    prior = NCPrior.for_source(source, x_train[:256], dropout=0.1)
    fit(prior, x_train, steps=300)
    prior.sampler = partial(sir, num_proposals=100)

    ray.init(num_cpus=options.workers, include_dashboard=False)
    sample_on_ray(prior, options.out, num_samples=20_000, part_size=1000, seed=options.seed)
    print(f"{sum(len(part['x']) for part in read_parts(options.out))} samples in {options.out}")


if __name__ == "__main__":
    main()
