"""Proposals of SIR and steps of Langevin dynamics against quality, time and memory: table 8.

    NCPRIOR_DATA=... python examples/benchmarks/sampler_cost.py --json cost.json --figure cost.png
    python examples/benchmarks/sampler_cost.py --quick          # about 8 minutes

One convolutional VAE with 16 latents on MNIST, trained on the plain ELBO, and for every seed one
head on it. Prints for every sampler the Fréchet distance to the test images (64 features of a
classifier trained here), how much of the gap is closed with its 95 % interval, milliseconds
for one batch of 1 and of 100 images, and the peak of memory of the latter above that of the VAE, in
a process of its own. `head_evaluations` are per sample, gradients counted as one.
"""

import multiprocessing
import re
import time
from functools import cached_property, partial
from pathlib import Path

import torch
from bench import Bench, Row, machine, parser, table
from torch import Tensor
from torch.nn.functional import cross_entropy

from ncprior import Draw, NCPrior, fit, langevin, sir
from ncprior.demo import ARMS, VAE, Classifier, Labelled, draw_arms, in_batches, read_images
from ncprior.distributions import Sampleable
from ncprior.evaluation import gap_closed
from ncprior.samplers import LogRatio, Sampler
from ncprior.utils import train

COLUMNS = {
    "method": "<16",
    "seed": ">4",
    "head_evaluations": ">16",
    "fd": ">7.2f",
    "gap_closed": ">10.3f",
    "gap_low": ">7.3f",
    "gap_high": ">8.3f",
    "ms_per_1": ">8.1f",
    "ms_per_100": ">10.1f",
    "peak_mib": ">8.1f",
}
STEP_SIZE = 0.1  # λ of Langevin dynamics
HEAD = {"width": 256, "depth": 3, "dropout": 0.1}


def samplers(quick: bool) -> dict[str, tuple[Sampler, int]]:
    """Samplers by name, and how often each evaluates the head for one sample."""
    counts = (5, 50) if quick else (5, 50, 500, 5000)
    steps = (5, 50) if quick else (5, 50, 500, 1000)
    found: dict[str, tuple[Sampler, int]] = {
        f"SIR({m})": (partial(sir, num_proposals=m), m) for m in counts
    }
    for n in steps:
        found[f"Langevin({n})"] = (partial(langevin, num_steps=n, step_size=STEP_SIZE), n)
    found["SIR(25), MALA(25)"] = (sir_then_mala, 51)
    return found


def sir_then_mala(prior: Sampleable, log_ratio: LogRatio) -> Draw:
    """Langevin dynamics with Metropolis correction, from a draw of SIR."""
    z = sir(prior, log_ratio, num_proposals=25).z
    return langevin(prior, log_ratio, num_steps=25, step_size=STEP_SIZE, adjusted=True, init=z)


class Table8:
    """The frozen VAE, the heads on it, and what the samplers make of them."""

    def __init__(self, bench: Bench, data: Labelled, test: Labelled) -> None:
        self.bench, self.data, self.test, self.settings = bench, data, test, bench.settings

    @cached_property
    def vae(self) -> VAE:
        """The VAE, trained on the ELBO."""
        torch.manual_seed(0)
        vae, images, steps = (
            VAE(28, latents=16, counts=1),
            self.data.images,
            self.settings["steps"],
        )

        def negative_elbo(rows: Tensor) -> Tensor:
            return vae.negative_elbo(images[rows]).mean()

        run = partial(train, vae, negative_elbo, len(images), steps=steps, batch_size=128)
        self.bench.network("conv-vae", vae, run, steps=steps)
        return vae

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier whose features judge the samples."""
        torch.manual_seed(0)
        classifier, data = Classifier(28, num_features=64), self.data
        steps = self.settings["classifier_steps"]

        def misfit(rows: Tensor) -> Tensor:
            return cross_entropy(classifier(data.images[rows]), data.labels[rows])

        run = partial(train, classifier, misfit, len(data.labels), steps=steps, batch_size=128)
        self.bench.network("classifier", classifier, run, steps=steps)
        return classifier

    def prior(self, seed: int) -> NCPrior:
        """The head of one seed."""
        torch.manual_seed(seed)
        held_out, images = self.data.images.tensor_split([3000])
        prior = NCPrior.for_source(self.vae.source(), images[:512], **HEAD)
        steps = self.settings["head_steps"]
        options = {"steps": steps, "eval_every": max(1, steps // 16), "batch_size": 512}
        train_head = partial(fit, prior, images, held_out=held_out, **options)
        self.bench.network(f"conv-vae-head-{seed}", prior, train_head, steps=steps)
        return prior.eval()

    def quality(self, seed: int, sampler: Sampler, count: int) -> list[Row]:
        """One row."""
        prior = self.prior(seed)
        torch.manual_seed(seed)  # all samplers are compared on the same seeds
        features, _ = draw_arms(
            *(prior, sampler, self.data.images),
            features=self.classifier.features,
            num_samples=self.settings["samples"],
            generations=5,
        )
        base, ours, posterior = (features[arm] for arm in ARMS)
        reference = in_batches(self.classifier.features, self.test.images)
        gap = gap_closed(reference, base=base, ours=ours, posterior=posterior)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            heads = dict(prior.state_dict())
            peak = pool.apply(peak_mib, (self.vae.state_dict(), heads, sampler))
        return [
            {
                "head_evaluations": count,
                "fd": gap.d_ours,
                "gap_closed": gap.gap_closed,
                "gap_low": gap.low,
                "gap_high": gap.high,
                "ms_per_1": milliseconds(prior, sampler, 1),
                "ms_per_100": milliseconds(prior, sampler, 100),
                "peak_mib": peak,
            }
        ]


def milliseconds(prior: NCPrior, sampler: Sampler, rows: int) -> float:
    """The best time of five for one batch of samples."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        prior.sample(rows, sampler)
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def peak_mib(vae: dict[str, Tensor], heads: dict[str, Tensor], sampler: Sampler) -> float | None:
    """The peak of resident memory over a batch of 100, above that before; None outside Linux."""
    model = VAE(28, latents=16, counts=1)
    model.load_state_dict(vae)
    prior = NCPrior.for_source(model.eval().source(), torch.rand(4, 1, 28, 28), **HEAD).eval()
    prior.load_state_dict(heads)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    prior.sample(100, partial(sir, num_proposals=1))  # what torch loads once

    def mib(field: str) -> float:
        (line,) = (x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = mib("VmRSS")
    prior.sample(100, sampler)
    return mib("VmHWM") - before


def draw(rows: list[Row], path: Path) -> None:
    """Gap closed against time, a line per kind of sampler."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    kinds = sorted({kind(row) for row in rows})
    for name in kinds:
        chosen = [row for row in rows if kind(row) == name]
        y = [row["gap_closed"] for row in chosen]
        low = [row["gap_closed"] - row["gap_low"] for row in chosen]
        high = [row["gap_high"] - row["gap_closed"] for row in chosen]
        x = [row["ms_per_100"] / 100 for row in chosen]
        axes.errorbar(x, y, [low, high], marker="o", label=name, capsize=2)
    axes.set(xscale="log", xlabel="ms per sample, in batches of 100", ylabel="prior hole closed")
    axes.axhline(1, color="0.6", linewidth=1)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def kind(row: Row) -> str:
    """What a row's sampler is called, without its numbers."""
    return re.sub(r"\(\d+\)", "", row["method"])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--figure", type=Path, metavar="PNG", help="draw gap closed against time")
    options = made.parse_args()
    settings = {"steps": 1000, "classifier_steps": 500, "head_steps": 500, "samples": 2000}
    if not options.quick:
        settings = {"steps": 4690, "classifier_steps": 940, "head_steps": 4000, "samples": 5000}
    bench = Bench(options, settings)
    torch.manual_seed(0)
    try:
        data, test = (read_images("ylecun/mnist", part) for part in ("train", "test"))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    data = data.rows(torch.randperm(len(data.labels)))
    table_8 = Table8(bench, data, test)
    for seed in options.seed:
        for name, (sampler, count) in samplers(options.quick).items():
            make = partial(table_8.quality, seed, sampler, count)
            bench.add(make, method=name, seed=seed)
    print(f"{machine()}; {settings}\n")
    print(table(bench.rows, COLUMNS))
    if options.figure is not None:
        draw([row for row in bench.rows if row["seed"] == options.seed[0]], options.figure)


if __name__ == "__main__":
    main()
