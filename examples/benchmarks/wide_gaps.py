"""How well heads learn log r in wide gaps, on pairs of distributions whose log r is known.

    python examples/benchmarks/wide_gaps.py --seed 0 1 2 --json wide.json     # some minutes a seed
    python examples/benchmarks/wide_gaps.py --quick

The base is N(0, I). `shift` moves its mean, in two dimensions; `narrow` shrinks it, in sixteen; `modes`
are four narrow Gaussians in eight. Encodings are draws of q(z | x) for 4,000 x. `rmse` is the root
mean square error of log r, in nats, at new draws of q; `error` is its mean. All heads are
alike: `classifier` has the NCE loss alone, `three stages` a third of its steps for each factor, and
`score term` is FitSettings(score_weight=1). `normalised` subtracts log Z, estimated
by annealed importance sampling, from log r. `verdict` is that of diagnose. Seconds are of the core.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench import Bench, Row, machine, parser, table
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
)

from ncprior import NCPrior, SingleGroup, fit
from ncprior.diagnostics import diagnose
from ncprior.evaluation import log_normaliser
from ncprior.training import FitSettings

ROWS = 4000

STEPS = {"classifier": 3000, "three stages": 1000, "score term": 1800}

COLUMNS = {
    "pair": "<8",
    "kl": ">6.1f",
    "method": "<24",
    "seed": ">4",
    "rmse": ">6.2f",
    "error": ">7.2f",
    "seconds": ">7.0f",
    "verdict": "<40",
}


@dataclass
class Pair:
    """Base N(0, I), aggregate posterior q(z), and x as means of q(z | x) = N(x, width² I)."""

    name: str
    q: Distribution
    x: Distribution
    width: float
    step_size: float  # of MALA, for log Z

    @property
    def source(self) -> SingleGroup:
        """A VAE with this prior and posterior, which decodes z to z."""
        dim = self.q.event_shape[0]

        def posterior(x: Tensor) -> Independent:
            return Independent(Normal(x, torch.full_like(x, self.width)), 1)

        return SingleGroup(normal(torch.zeros(dim), 1.0), posterior, lambda z: z)

    def log_r(self, z: Tensor) -> Tensor:
        """The exact log r in nats."""
        return self.q.log_prob(z) - normal(torch.zeros(z.shape[-1]), 1.0).log_prob(z)


def normal(mean: Tensor, sd: float) -> Independent:
    """N(mean, sd² I)."""
    return Independent(Normal(mean, torch.full_like(mean, sd)), 1)


def shifted(kl: float) -> Pair:
    """N(m, I) in two dimensions at this divergence from the base, in nats."""
    mean, width = torch.full((2,), math.sqrt(kl)), 0.3
    return Pair("shift", normal(mean, 1.0), normal(mean, math.sqrt(1 - width**2)), width, 1.0)


def narrow(sd: float) -> Pair:
    """N(0, sd² I) in sixteen dimensions, a half of it in the posteriors."""
    zero = torch.zeros(16)
    return Pair("narrow", normal(zero, sd), normal(zero, sd * 0.75**0.5), sd / 2, 0.5 * sd**2)


def modes(sd: float) -> Pair:
    """Four Gaussians in eight dimensions."""
    means = 1.2 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def mixture(sd: float) -> MixtureSameFamily:
        return MixtureSameFamily(Categorical(torch.ones(4)), normal(means, sd))

    return Pair("modes", mixture(sd), mixture(sd * 0.75**0.5), sd / 2, 0.5 * sd**2)


def measured(prior: NCPrior, pair: Pair, held_out: Tensor) -> Row:
    """Errors of log r at new draws of q, and the verdict."""
    z = pair.q.sample((20_000,))
    with torch.no_grad():
        error = prior.log_r(0, z, None) - pair.log_r(z)
    return {
        "kl": pair.log_r(z).mean().item(),
        "rmse": error.square().mean().sqrt().item(),
        "error": error.mean().item(),
        "verdict": str(diagnose(prior, held_out).groups[0].verdict),
    }


def rows_of(pair: Pair, method: str, seed: int, *, quick: bool) -> list[Row]:
    """Trains a head and measures it, and once more with a normalised log r."""
    torch.manual_seed(seed)
    data, held_out = pair.x.sample((ROWS,)), pair.x.sample((2000,))
    prior = NCPrior.for_source(pair.source, data[:500], width=64)
    steps = STEPS[method] // (10 if quick else 1)
    options: dict[str, Any] = {"stages": 3} if method == "three stages" else {}
    settings = FitSettings(score_weight=1.0 if method == "score term" else 0.0)
    started = time.process_time()
    fit(prior, data, steps=steps, learning_rate=3e-3, settings=settings, **options)
    seconds = time.process_time() - started
    row = {**measured(prior, pair, held_out), "seconds": seconds}
    if method != "score term":
        return [row]
    started = time.process_time()
    particles, temperatures = (100, 20) if quick else (1000, 200)
    log_z = log_normaliser(
        prior, num_particles=particles, num_temperatures=temperatures, step_size=pair.step_size
    )
    head: Any = prior.heads[0]
    head.rescale(1.0, -(log_z.lower + log_z.upper) / 2)
    normalised = measured(prior, pair, held_out)
    seconds += time.process_time() - started
    return [row, {**normalised, "method": f"{method}, normalised", "seconds": seconds}]


def main() -> None:
    options = parser(__doc__).parse_args()
    bench = Bench(options, {"rows": ROWS})
    pairs = [*map(shifted, (4.0, 8.0, 12.0, 30.0)), narrow(0.3), modes(0.3), modes(0.1)]
    for seed in options.seed:
        for pair in pairs[2::3] if options.quick else pairs:
            size = f"{pair.name} {pair.log_r(pair.q.sample((9999,))).mean():.0f}"
            for method in STEPS:
                make = partial(rows_of, pair, method, seed, quick=options.quick)
                bench.add(make, pair=size, method=method, seed=seed)
    print(table(bench.rows, COLUMNS))
    print(machine())


if __name__ == "__main__":
    main()
