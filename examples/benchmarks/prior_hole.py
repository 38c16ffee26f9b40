"""Closes the prior hole of one frozen VAE by every prior a user could pick, side by side.

    NCPRIOR_DATA=... python examples/benchmarks/prior_hole.py --data mnist --seed 0 1 2 --json hole.json
    python examples/benchmarks/prior_hole.py --data digits --quick     # two minutes

The VAE is trained on the plain ELBO before any prior is looked at, and kept in --cache; seeds are
those of the priors. Every method is fitted to the same training images, draws the same number of
samples under the same seeds, and is judged by Fréchet distance on the features of a small
classifier trained here: `gap_closed` is 0 for the VAE's own prior and 1 for decoded posterior
samples of training images, with an interval over 5 generations and a resampled reference. `posterior of
other images` decodes half of the test images, with the other half as the reference of that row: a ceiling without copying.
`training images` are not decoded at all: about the most for what has seen no other images.
`over_rival` is the paired difference to the best of that seed among the peers and the VAE's own
prior; a run without peers does not have it. `matched`: at the strength that ncprior.diagnostics finds
for the sampler.

`family`: ours uses a trained ratio head; a reference is the base, the posterior, or what stores
more than a tenth as many numbers as the training encodings; the rest are peers. pythae's samplers
are run by pythae itself. `head_evaluations` are counted per sample, those with a gradient twice,
those of earlier stages too. Seconds are of the core where there is one thread (OMP_NUM_THREADS=1),
so that what else the machine does is not counted. `latent_nn_copy` is the distance to the nearest
training encoding, of drawn latents over held-out ones: well below 1 is copying. `near_copies` is the
share of samples whose features are closer to training images than 95 % of the test images: the base
shows that of smooth samples, the posterior that of copies. `peak_mib` is the
growth of resident memory in a batch of 1,000.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from bench import Bench, Row, chosen, machine, parser, table, with_methods
from clock import now, peak_growth
from hole_cases import Case, image_file, make_case, save_images, slug
from hole_methods import BATCH, OTHERS, Fitted, Heads, Method, evaluations, methods, references
from torch import Tensor

from ncprior.demo import in_batches
from ncprior.evaluation import (
    GapClosed,
    gap_closed,
    gap_difference,
    near_copies,
    precision_recall,
)

COLUMNS = {
    "method": "<58",
    "family": "<9",
    "seed": ">4",
    "fd": ">7.2f",
    "gap_closed": ">10.3f",
    "gap_low": ">7.3f",
    "gap_high": ">8.3f",
    "over_rival": ">10.3f",
    "over_low": ">8.3f",
    "over_high": ">9.3f",
    "precision": ">9.3f",
    "recall": ">6.3f",
    "fit_seconds": ">11.0f",
    "sample_seconds_per_10k": ">22.1f",
    "head_evaluations": ">16.0f",
    "stored_numbers": ">14,.0f",
    "latent_nn_copy": ">14.2f",
    "near_copies": ">11.3f",
    "peak_mib": ">8.0f",
}
GENERATIONS = 5
Drawn = Mapping[str, Tensor]


def best_rival(methods: Sequence[Method], gaps: Mapping[str, GapClosed]) -> str | None:
    """The best of the peers and of the VAE's own prior, the first method; none without peers."""
    peers = [method.name for method in methods if method.family == "peer" and method.name in gaps]
    rivals = [methods[0].name, *peers] if peers else []
    return max(rivals, key=lambda name: gaps[name].gap_closed, default=None)


class Comparison:
    """All methods on one case and one seed, or the references and the chosen ones."""

    def __init__(
        self, bench: Bench, case: Case, seed: int, samples: Path | None, only: list[str]
    ) -> None:
        self.bench, self.case, self.seed, self.samples = bench, case, seed, samples
        self.heads = Heads(bench)
        rest = methods(case, self.heads)
        names = chosen([method.name for method in rest], only)
        self.methods = [*references(case), *(method for method in rest if method.name in names)]
        self.count: int = bench.settings["count"]
        self.drawn: dict[str, Drawn] = {}

    def is_done(self) -> bool:
        """Whether the table has all rows."""
        done = {row["method"] for row in self.bench.rows if row["seed"] == self.seed}
        return self.samples is None and done >= {method.name for method in self.methods}

    def draw_all(self) -> None:
        """Fits every method and draws from it, or reads what was drawn before."""
        for method in self.methods:
            try:
                self.drawn[method.name] = self._draws(method)
            except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
                if not method.name.startswith("pythae"):
                    raise
                print(f"{method.name}, seed {self.seed}: failed, {error!r:.200}", flush=True)

    def _draws(self, method: Method) -> Drawn:
        """From the cache, unless images are to be written that are not yet there."""
        if self.samples is not None and not self._file(method).exists():
            return self._drawn(method)
        name = slug(f"hole-{self.case.name}-{method.name}-{self.seed}-drawn")
        key: Row = {"count": self.count, "base_steps": self.case.base_steps}
        key["vae"] = self.case.source.fingerprint()
        if method.family == "ours":
            key |= {"head": str(self.case.head), "fit": str(self.case.fit)}
        return self.bench.tensors(name, partial(self._drawn, method), **key)[0]

    def rows(self) -> list[Row]:
        """The rows of the table."""
        gaps = {name: self._gap(name) for name in self.drawn}
        family = {method.name: self._family(method) for method in self.methods}
        best = best_rival(self.methods, gaps)
        train = in_batches(self.case.features, self.case.images)
        rows = []
        for name, drawn in self.drawn.items():
            gap = gaps[name]
            judged = precision_recall(self._reference(name)[:5000], drawn["features"][0][:5000])
            row = {
                "method": name,
                "family": family[name],
                "seed": self.seed,
                "fd": gap.d_ours,
                "gap_closed": gap.gap_closed,
                "gap_low": gap.low,
                "gap_high": gap.high,
                "precision": judged.precision,
                "recall": judged.recall,
                "near_copies": near_copies(
                    train, self._reference(name), drawn["features"][0]
                ).share,
            }
            if family[name] == "ours" and best is not None:
                over = gap_difference(gap, gaps[best])
                row |= {
                    "over_rival": over.difference,
                    "over_low": over.low,
                    "over_high": over.high,
                }
            rows.append({**row, **{key: drawn[key].item() for key in COSTS}, "best_rival": best})
        return rows

    def _gap(self, name: str) -> GapClosed:
        drawn = (self.drawn[name] for name in (self.methods[0].name, name, self.methods[1].name))
        base, ours, posterior = (list(draws["features"]) for draws in drawn)
        return gap_closed(self._reference(name), base=base, ours=ours, posterior=posterior)

    def _reference(self, name: str) -> Tensor:
        """Features of the test images, without those that a method decodes."""
        reference = self.case.reference
        return reference[len(reference) // 2 :] if name == OTHERS else reference

    def _family(self, method: Method) -> str:
        drawn = self.drawn.get(method.name)
        if method.family == "peer" and drawn is not None:
            numbers = self.case.encodings.numel()
            return "reference" if drawn["stored_numbers"].item() > numbers / 10 else "peer"
        return method.family

    def _drawn(self, method: Method) -> dict[str, Tensor]:
        torch.manual_seed(self.seed)
        fitted = method.fit(self.case, self.seed)
        features, images, copies, took = [], [], 0.0, 0.0
        peak = peak_growth(lambda: fitted.draw(min(self.count, BATCH)))
        with evaluations(fitted.priors) as evaluated:
            for generation in range(GENERATIONS):
                torch.manual_seed(1000 * self.seed + generation)
                started = now()
                x, z = self._generation(fitted)
                took += now() - started
                features.append(in_batches(self.case.features, x))
                copies += self._copying(z) / GENERATIONS
                images.append(x)
        total = GENERATIONS * self.count
        if self.samples is not None:
            save_images(self._file(method), images)
        costs = {
            "fit_seconds": fitted.seconds,
            "sample_seconds_per_10k": took * 10_000 / total,
            "head_evaluations": evaluated() / total,
            "stored_numbers": fitted.stored,
            "latent_nn_copy": copies,
            "peak_mib": peak,
        }
        found = {key: torch.tensor(float(value)) for key, value in costs.items()}
        print(f"{method.name}, seed {self.seed}: drawn in {took:.0f} s", flush=True)
        return {"features": torch.stack(features), **found}

    def _generation(self, fitted: Fitted) -> tuple[Tensor, Tensor]:
        counts = [len(part) for part in torch.empty(self.count).split(BATCH)]
        parts = [fitted.draw(count) for count in counts]
        return torch.cat([x for x, _ in parts]), torch.cat([z for _, z in parts])

    def _copying(self, z: Tensor) -> float:
        """Distance to the nearest training encoding, over that of held-out encodings."""

        def nearest(rows: Tensor) -> Tensor:
            stored = self.case.encodings
            return torch.cat([torch.cdist(part, stored).amin(1) for part in rows.split(500)])

        return (nearest(z[:2000]).mean() / nearest(self.case.fresh_encodings[:2000]).mean()).item()

    def _file(self, method: Method) -> Path:
        return image_file(self.samples or Path(), self.case.name, method.name, self.seed)


COSTS = (
    *("fit_seconds", "sample_seconds_per_10k", "head_evaluations", "stored_numbers"),
    *("latent_nn_copy", "peak_mib"),
)


def with_options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("--data", choices=["mnist", "cifar10", "digits"], default="mnist")
    made.add_argument("--model", choices=["flat", "hierarchical"], default="flat")
    made.add_argument(
        "--samples", type=Path, metavar="DIR", help="write every method's images, (5, N, C, H, W)"
    )
    return made


def main() -> None:
    options = with_options(with_methods(parser(__doc__))).parse_args()
    counts = {"mnist": 10_000, "cifar10": 10_000, "digits": 2000}
    few = {"mnist": 1000, "cifar10": 350, "digits": 1000}
    settings = {
        "data": options.data,
        "model": options.model,
        "count": (few if options.quick else counts)[options.data],
    }
    bench = Bench(options, settings)
    case = make_case(bench, options.data, options.model)
    print(f"{machine()}; {settings}; {case.facts}", flush=True)
    for seed in options.seed:
        compared = Comparison(bench, case, seed, options.samples, options.methods)
        if not compared.is_done():
            compared.draw_all()
            for row in compared.rows():
                bench.add(lambda row=row: [row], method=row["method"], seed=seed)
    print(f"\n{table(bench.rows, COLUMNS)}")


if __name__ == "__main__":
    main()
