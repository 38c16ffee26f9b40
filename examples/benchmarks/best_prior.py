"""The prior of highest likelihood, by EM, where it is known: good encoders and bad ones.

    python examples/benchmarks/best_prior.py --seed 0 1 2 --json best.json     # minutes a seed
    python examples/benchmarks/best_prior.py --quick

The VAE has x = z + noise, with z of two dimensions and noise of 0.5, and the prior N(0, I). The x are
made with other z, of four narrow modes: their distribution is the best prior. `encoder` is the exact
posterior under N(0, I), or one with another mean or scale by a factor. `heads` are trained on q(z|x);
every step of `EM` is one more fit with `importance_samples`. `gap` is the mean of log p(x) of new x
under the best prior less that under the new one, in nats, integrated on a grid; `ess` is the effective
sample size of the importance samples. Seconds are of the core.
"""

import math
import time
from functools import partial
from typing import Any

import torch
from bench import Bench, Row, machine, parser, table
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ncprior import NCPrior, SingleGroup, fit
from ncprior.training import FitSettings

ROWS, SAMPLES, NOISE = 4000, 64, 0.5

ENCODERS = {  # factors of the mean and of the standard deviation
    "exact under N(0, I)": (1.0, 1.0),
    "mean × 0.7": (0.7, 1.0),
    "mean × 0.7, scale × 1.5": (0.7, 1.5),
    "scale × 0.5": (1.0, 0.5),
}

MEANS = torch.tensor([[1.5, 0.0], [0.0, 1.5], [-1.5, 0.0], [0.0, -1.5]])

COLUMNS = {
    "encoder": "<24",
    "method": "<6",
    "seed": ">4",
    "gap": ">7.3f",
    "ess": ">5.1f",
    "seconds": ">7.0f",
}


def normal(mean: Tensor, sd: float) -> Independent:
    """N(mean, sd² I)."""
    return Independent(Normal(mean, torch.full_like(mean, sd)), 1)


BEST = MixtureSameFamily(Categorical(torch.ones(4)), normal(MEANS, 0.2))


def vae(mean: float, scale: float) -> SingleGroup:
    """The VAE, whose encoder has these factors."""
    precision = 1 + 1 / NOISE**2

    def posterior(x: Tensor) -> Independent:
        return normal(mean * x / NOISE**2 / precision, scale / math.sqrt(precision))

    return SingleGroup(
        normal(torch.zeros(2), 1.0),
        posterior,
        lambda z: z,
        likelihood=lambda z: normal(z, NOISE),
    )


@torch.no_grad()
def log_p(log_prior: Tensor, grid: Tensor, x: Tensor) -> Tensor:
    """log p(x) in nats, for a prior given by its unnormalised logarithm on a grid."""
    weights = log_prior.double().log_softmax(0)
    parts = [
        (normal(some[:, None], NOISE).log_prob(grid).double() + weights).logsumexp(1)
        for some in x.split(100)
    ]
    return torch.cat(parts)


def gap(prior: NCPrior, x: Tensor) -> float:
    """How far the mean of log p(x) is below that under the best prior, in nats."""
    axis = torch.linspace(-5, 5, 201)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_prior = normal(torch.zeros(2), 1.0).log_prob(grid) + prior.log_r(0, grid, None)
    return (log_p(BEST.log_prob(grid), grid, x) - log_p(log_prior, grid, x)).mean().item()


def rows_of(encoder: str, seed: int, *, quick: bool) -> list[Row]:
    """Heads on q(z | x), and after each step of EM."""
    torch.manual_seed(seed)
    x, held_out, new = (normal(BEST.sample((n,)), NOISE).sample() for n in (ROWS, 1000, 2000))
    prior = NCPrior.for_source(vae(*ENCODERS[encoder]), x[:500], width=64)
    rows, seconds = [], 0.0
    for step in range(3 if quick else 7):
        settings = FitSettings(importance_samples=SAMPLES if step else None)
        loop: dict[str, Any] = {"steps": 100 if quick else 600, "learning_rate": 3e-3}
        started = time.process_time()
        history = fit(prior, x, held_out=held_out, settings=settings, progress=False, **loop)
        seconds += time.process_time() - started
        row = {"gap": gap(prior, new), "ess": history.ess, "seconds": seconds}
        rows.append({"method": f"EM {step}" if step else "heads", **row})
    return rows


def main() -> None:
    options = parser(__doc__).parse_args()
    bench = Bench(options, {"rows": ROWS, "samples": SAMPLES})
    for seed in options.seed:
        for encoder in list(ENCODERS)[:2] if options.quick else ENCODERS:
            make = partial(rows_of, encoder, seed, quick=options.quick)
            bench.add(make, encoder=encoder, seed=seed)
    print(table(bench.rows, COLUMNS))
    print(machine())


if __name__ == "__main__":
    main()
