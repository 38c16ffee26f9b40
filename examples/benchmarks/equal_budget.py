"""Priors of one frozen VAE that all had the same time to be fitted, each at its best.

    NCPRIOR_DATA=... python examples/benchmarks/equal_budget.py --data mnist --seed 0 1 2 --json equal.json
    python examples/benchmarks/equal_budget.py --data digits --quick     # some minutes

Every fit has a budget of seconds: the number of steps follows from the measured time of one. Every
method has several sizes, each with the whole budget, and, of the best of them, several learning
rates. What has no steps, such as a mixture, has the sizes that are done within the budget. They are
chosen with the first seed, and what the others took is not counted. The criterion is the
log-likelihood of held-out latents; of flow matching and diffusion, their loss of the same; of
energies, the Fréchet distance of draws to them. No choice sees images. `improve` is told the budget
as max_seconds, the seed, and 50 evaluations per sample; nothing of it is tuned. Its heads see z itself,
also where those of prior_hole.py see feature maps: there is time for few steps with them. With
--model hierarchical, the peers are given the earlier groups.

`gap_closed` and `near_copies` are those of prior_hole.py. `over_improve` is the paired difference to
`improve(50)`: below 0, `improve` is better. Seconds are of the core where there is one thread
(OMP_NUM_THREADS=1); `improve` itself keeps to the wall clock, and so has less where the core is shared.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench import Bench, Row, machine, parser, table
from clock import now
from hole_cases import BASE, POSTERIOR, Case, flat_source, image_file, make_case, save_images
from hole_methods import from_source
from hole_peers import Fit, Peer, peers
from torch import Tensor

from ncprior import LatentSource, improve
from ncprior.bases import Rebased
from ncprior.demo import in_batches
from ncprior.evaluation import (
    GapClosed,
    frechet_distance,
    gap_closed,
    gap_difference,
    near_copies,
)
from ncprior.source import visit

COLUMNS = {
    "method": "<26",
    "size": "<46",
    "seed": ">4",
    "gap_closed": ">10.3f",
    "gap_closed_low": ">9.3f",
    "gap_closed_high": ">9.3f",
    "over_improve": ">12.3f",
    "over_improve_low": ">9.3f",
    "over_improve_high": ">9.3f",
    "near_copies": ">11.3f",
    "fit_seconds": ">11.0f",
    "seconds_per_10k": ">15.1f",
}
GENERATIONS, BATCH = 5, 1000
OURS = "improve(50)"
REPEATS = 20  # of held-out latents in a loss, each with noise of its own
FEW, MANY = 50, 10**6  # steps that measure the time of one
Images = Callable[[int], Tensor]


def timed(fit: Fit, case: Case) -> tuple[LatentSource, float]:
    """The VAE with the new prior, and the seconds of its fit."""
    started = now()
    found = fit(case)
    return found, now() - started


def steps_within(fit: Fit, case: Case, budget: float) -> int:
    """The number of steps that take so many seconds, with what is done once, such as encoding."""
    _, once = timed(partial(fit, steps=1), case)
    steps = FEW
    while True:
        _, spent = timed(partial(fit, steps=steps), case)
        share = (spent - once) / spent  # of the time, spent in steps
        found = 1 + int((0.95 * budget - once) * (steps - 1) / (max(share, 1 / 3) * spent))
        if share >= 1 / 3 or not steps < found < MANY:
            return max(FEW, found)
        steps = found


@torch.no_grad()
def criterion(source: LatentSource, case: Case) -> float:
    """The larger the better: log p'(z) of held-out latents, minus their loss, or minus a distance."""
    torch.manual_seed(1)
    log_p = torch.cat([held_out_log_p(source, x) for x in case.held_out.split(BATCH)])
    if not log_p.isnan().any():
        return log_p.mean().item()
    assert isinstance(source, Rebased)
    (base,) = source.bases or ()
    if hasattr(base, "log_prob"):
        raise FloatingPointError("A density is not a number.")
    if base.loss is not None:
        return -base.loss(case.fresh_encodings.flatten(1).repeat(REPEATS, 1)).item()
    drawn = torch.cat([from_source(source)(BATCH)[1] for _ in range(5)])
    return -frechet_distance(drawn, case.fresh_encodings.flatten(1), strict=False).item()


@torch.no_grad()
def held_out_log_p(source: LatentSource, x: Tensor) -> Tensor:
    """log p'(z) = Σ_k log p'(z_k | z_<k) of z ~ q(z | x), ``(B,)``; NaN where there is no density."""
    total = torch.zeros(len(x))

    def take(k: int, group: Any) -> Tensor:  # noqa: ANN401
        nonlocal total
        z = group.posterior.sample()
        has_density = hasattr(group.prior, "log_prob")
        total = total + (group.prior.log_prob(z) if has_density else math.nan)
        return z

    visit(source, source.start(len(x), source.encode(x)), take)
    return total


def images_of(source: LatentSource) -> Images:
    """Decoded draws of the prior of a source."""
    draw = from_source(source)
    return lambda count: draw(count)[0]


class Chosen(NamedTuple):
    """A method at its best; the fit has all its options."""

    name: str
    size: str
    fit: Fit


class Comparison:
    """The arms that every method is measured against, on one case and seed."""

    def __init__(self, case: Case, seed: int, count: int, samples: Path | None) -> None:
        self.case, self.seed, self.count, self.samples = case, seed, count, samples
        self.training = in_batches(case.features, case.images)
        self.arms = {
            "base": self._features(BASE, images_of(case.source)),
            "posterior": self._features(POSTERIOR, lambda count: case.posterior(count)[0]),
        }

    @torch.no_grad()
    def _features(self, method: str, draw: Images) -> list[Tensor]:
        """Features of the images of every generation."""
        found, kept = [], []
        for generation in range(GENERATIONS):
            torch.manual_seed(1000 * self.seed + generation)
            images = torch.cat([draw(BATCH) for _ in range(self.count // BATCH)])
            found.append(in_batches(self.case.features, images))
            if self.samples is not None:
                kept.append(images)
        if self.samples is not None:
            save_images(image_file(self.samples, self.case.name, method, self.seed), kept)
        return found

    def measured(self, method: str, draw: Images) -> tuple[GapClosed, Row]:
        """The gap closed by a method, its seconds per 10,000 samples and its share of near copies."""
        started = now()
        features = self._features(method, draw)
        seconds = (now() - started) * 10_000 / (GENERATIONS * self.count)
        copies = near_copies(self.training, self.case.reference, features[0]).share
        gap = gap_closed(self.case.reference, ours=features, **self.arms)
        return gap, {"seconds_per_10k": seconds, "near_copies": copies}


def row(gap: GapClosed, ours: GapClosed, **numbers: Any) -> Row:  # noqa: ANN401
    over = gap_difference(gap, ours)
    return {
        **numbers,
        "gap_closed": gap.gap_closed,
        "gap_closed_low": gap.low,
        "gap_closed_high": gap.high,
        "over_improve": over.difference,
        "over_improve_low": over.low,
        "over_improve_high": over.high,
    }


class Choices:
    """The size and then the rate of every peer that are best by held-out latents, first seed."""

    def __init__(self, bench: Bench, case: Case, budget: float) -> None:
        self.bench, self.case, self.budget = bench, case, budget
        self.most = 1 if bench.settings["quick"] else None  # sizes and rates to try

    def all(self) -> list[Chosen]:
        """Every peer at its best."""
        return [
            self.best_fit(peer) if peer.has_steps else self.best_in_time(peer)
            for peer in peers(self.case)
        ]

    def best_in_time(self, peer: Peer) -> Chosen:
        """Of a peer without steps, the best size that is done within the budget, or the least one."""
        scores = {}
        for size, fit in list(peer.sizes.items())[: self.most]:
            found = self._kept(f"{peer.name}, {size}", partial(self._scored, fit))
            if scores and found["seconds"] >= self.budget:
                break  # larger ones take longer still
            scores[size] = found["score"]
        best = max(scores, key=scores.__getitem__)
        return Chosen(peer.name, best, peer.sizes[best])

    def best_fit(self, peer: Peer) -> Chosen:
        """The best size at the first rate, and its best rate; all take the whole budget."""
        fits = {size: self._whole(peer, size) for size in list(peer.sizes)[: self.most]}

        def score(size: str, rate: float) -> float:
            fit = partial(fits[size], learning_rate=rate)
            name = f"{peer.name}, {size}, rate {rate:g}"
            found: float = self._kept(name, partial(self._scored, fit))["score"]
            return found

        size = max(fits, key=lambda size: score(size, peer.rates[0]))
        rate = max(peer.rates[: self.most], key=lambda rate: score(size, rate))
        return Chosen(peer.name, f"{size}, rate {rate:g}", partial(fits[size], learning_rate=rate))

    def _whole(self, peer: Peer, size: str) -> Fit:
        """A fit with as many steps as there is time for."""
        first = partial(peer.sizes[size], learning_rate=peer.rates[0])

        def count() -> Row:
            return {"steps": steps_within(first, self.case, self.budget)}

        return partial(
            peer.sizes[size], steps=self._kept(f"{peer.name}, {size}, steps", count)["steps"]
        )

    def _scored(self, fit: Fit) -> Row:
        try:
            found, seconds = timed(fit, self.case)
        except FloatingPointError:
            return {"score": -math.inf, "seconds": 0.0}
        return {"score": criterion(found, self.case), "seconds": seconds}

    def _kept(self, name: str, make: Callable[[], Row]) -> Row:
        """A row of the file, made if it is not there."""

        def rows() -> list[Row]:
            print(name, flush=True)
            torch.manual_seed(0)
            return [make()]

        return self.bench.add(rows, kind="choice", name=name, seed=0)[0]


def rows_of_seed(compared: Comparison, budget: float, methods: list[Chosen]) -> list[Row]:
    """All methods under one seed."""
    case, seed = compared.case, compared.seed
    started = now()
    data, held_out = case.all_data
    limits = {"budget": 50, "max_seconds": budget}
    prior = improve(case.source, data, held_out=held_out, seed=seed, **limits)
    seconds = now() - started
    print(prior.report, flush=True)
    ours, numbers = compared.measured(OURS, lambda n: prior.sample(n).x)
    found = [row(ours, ours, method=OURS, size="", fit_seconds=seconds, **numbers)]
    for name, size, fit in methods:
        torch.manual_seed(seed)
        source, seconds = timed(fit, case)
        gap, numbers = compared.measured(name, images_of(source))
        found.append(row(gap, ours, method=name, size=size, fit_seconds=seconds, **numbers))
        print(f"{name}, {size}, seed {seed}: {gap.gap_closed:.3f}", flush=True)
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", choices=["mnist", "cifar10", "digits"], default="mnist")
    made.add_argument("--model", choices=["flat", "hierarchical"], default="flat")
    made.add_argument("--budget", type=float, default=300.0, metavar="SECONDS")
    made.add_argument(
        "--samples", type=Path, metavar="DIR", help="write every method's images, for judges.py"
    )
    options = made.parse_args()
    budget = options.budget / (100 if options.quick else 1)
    count = (
        1000
        if options.quick
        else {"mnist": 10_000, "cifar10": 10_000, "digits": 2000}[options.data]
    )
    names = {"data": options.data, "model": options.model}
    bench = Bench(options, {**names, "budget": budget, "count": count})
    case = make_case(bench, options.data, options.model)
    if case.maps is not None:
        case.source = flat_source(case.vae)
    print(f"{machine()}; {case.facts}", flush=True)
    methods = Choices(bench, case, budget).all()
    for seed in options.seed:

        def make(seed: int = seed) -> list[Row]:
            compared = Comparison(case, seed, count, options.samples)
            return rows_of_seed(compared, budget, methods)

        bench.add(make, kind="method", name="", seed=seed)
    print(table([kept for kept in bench.rows if kept["kind"] == "method"], COLUMNS))


if __name__ == "__main__":
    main()
