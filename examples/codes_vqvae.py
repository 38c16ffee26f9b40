"""Priors of VQ-VAEs: bases for codes, and NCP on each of them with few proposals.

    NCPRIOR_DATA=... python examples/codes_vqvae.py --json codes.json
    python examples/codes_vqvae.py --data cifar10 --levels 2

The VQ-VAE of `codes/vqvae.py` is trained and frozen: one grid of 7×7 codes, or with --levels 2 a grid of
4×4 codes and one of 7×7 (8×8) given it. Two bases are fitted to the codes of the training images: the
frequencies of every place, and a small network of masked convolutions. Ratio heads are trained on
each, and SIR draws from 4 and 16 proposals per grid. On the frequencies, further heads visit the grid
row by row, with the rows before as context, and SIR draws from 4 and 16 proposals per row. Printed are, for every way to draw codes,

    distance     Fréchet distance to test images, on features of a classifier of this script
    closed       part of the hole of the frequencies that is closed, with its 95 % interval; 1 is as
                 good as the codes of training images
    better       closed, less that of the base alone: the paired difference with its interval
    copies       share of images closer to one of 20,000 training images than 95 % of new images
                 are; of copies of all 50,000, about 0.4 are found
    seen         share of grids that are exactly those of a training image
    nll          -log p of the codes of held-out images in nats, exact for bases; for NCP from the
                 lower and the upper estimate of log Z
    ms           milliseconds per image, decoder included

"posterior" decodes the codes of training and of held-out images; "real" is training images themselves.
Finished rows are in --json and trained networks in --cache: a second run goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from benchmarks.bench import Bench, Row, parser, table
from codes.vqvae import VQVAE
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from ncprior import NCPrior, fit, sir
from ncprior.adapters.vq import VQSource
from ncprior.bases import CodeFrequencies, CodeNetwork, fit_code_bases, rebase
from ncprior.demo import Classifier, Labelled, in_batches, read_images
from ncprior.evaluation import GapClosed, gap_closed, gap_difference, log_normaliser, near_copies
from ncprior.source import sample_posterior, visit
from ncprior.training import FitSettings
from ncprior.utils import train

REPOSITORIES = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
FREQUENCIES, NETWORK = "frequencies", "network"
BY_ROWS = "frequencies, by rows"  # the rows of a grid as groups
POSTERIOR, FRESH, REAL = "posterior (training rows)", "posterior (held-out rows)", "real"
PROPOSALS = (4, 16)
GENERATIONS = 5
COLUMNS = {
    "method": "<29",
    "distance": ">9.2f",
    "closed": ">7.3f",
    "closed_low": ">11.3f",
    "closed_high": ">12.3f",
    "better": ">7.3f",
    "better_low": ">11.3f",
    "better_high": ">12.3f",
    "copies": ">7.3f",
    "seen": ">6.3f",
    "nll_low": ">8.2f",
    "nll_high": ">9.2f",
    "ms": ">6.2f",
    "seconds": ">8.0f",
}


class Sizes(NamedTuple):
    """How much of everything: in full, and with --quick."""

    rows: int = 50_000  # training images at most
    features: int = 64  # of the judge
    judge: int = 900  # steps
    vqvae: int = 1500  # steps
    width: int = 32  # of base and heads
    base: int = 1200  # steps
    heads: int = 1000  # steps
    stopping: int = 2500  # training images that stop the heads
    samples: int = 1000  # per generation
    nll: int = 2000  # held-out images
    particles: int = 2000  # of log Z


SIZES = {
    False: Sizes(),
    True: Sizes(
        8000, 64, 300, 300, base=150, heads=150, stopping=1000, samples=640, particles=500
    ),
}


class Case:
    """A frozen VQ-VAE with its data and its judge."""

    def __init__(self, bench: Bench, data: str, levels: int) -> None:
        self.bench, self.name = bench, f"{data}-{levels}"
        self.sizes = SIZES[bench.settings["quick"]]
        torch.manual_seed(0)
        try:
            parts = [read_images(REPOSITORIES[data], part) for part in ("train", "test")]
        except FileNotFoundError as error:
            raise SystemExit(str(error)) from None
        images, test = (part.rows(torch.randperm(len(part.labels))) for part in parts)
        held_out = len(images.labels) // 6
        self.fresh = images.images[:held_out]
        self.train = images.images[held_out : held_out + self.sizes.rows]
        self.net = self._judge(data, images)
        self.vqvae = self._vqvae(levels)
        context = self.vqvae.context if levels == 2 else None
        self.source = VQSource(
            self.vqvae.encode,
            self.vqvae.decode,
            num_categories=[self.vqvae.num_codes] * levels,
            module=self.vqvae,
            context=context,
        )
        self.heights = [4] * (levels - 1) + [self.vqvae.side // 4]
        self.by_rows = VQSource(
            self.vqvae.encode_rows,
            lambda *rows: self.vqvae.decode(*self.vqvae.grids(rows)),
            num_categories=[self.vqvae.num_codes] * sum(self.heights),
            module=self.vqvae,
            context=self.vqvae.context_of_rows,
        )
        self.codes, self.fresh_codes = (self._codes(x) for x in (self.train, self.fresh))
        self.reference = in_batches(self.net.features, test.images)
        look = partial(in_batches, self.net.features)
        self.seen = look(self.decoded(self.codes, slice(20_000)))
        self.new = look(self.decoded(self.fresh_codes, slice(5000)))
        error = mse_loss(self.decoded(self.fresh_codes, slice(1000)), self.fresh[:1000]).item()
        used = [len(z.unique()) for z in self.codes]
        print(f"{self.name}: squared error {error:.4f} per pixel, codes in use {used}")

    def _judge(self, data: str, images: Labelled) -> Classifier:
        net = Classifier(self.train.shape[-1], num_features=self.sizes.features)
        steps = self.sizes.judge * (2 if data == "cifar10" else 1)

        def misfit(rows: Tensor) -> Tensor:
            return cross_entropy(net(images.images[rows]), images.labels[rows])

        do = partial(train, net, misfit, len(images.labels), steps=steps, batch_size=128)
        self.bench.network(f"classifier-{data}", net, partial(do, name="judge"), steps=steps)
        return net

    def _vqvae(self, levels: int) -> VQVAE:
        torch.manual_seed(0)
        vqvae = VQVAE(*self.train.shape[1:3], levels, num_codes=64)
        steps = self.sizes.vqvae

        def loss(rows: Tensor) -> Tensor:
            return vqvae.loss(self.train[rows])

        do = partial(train, vqvae, loss, len(self.train), steps=steps, batch_size=64)
        self.bench.network(f"vqvae-{self.name}", vqvae, partial(do, name="VQ-VAE"), steps=steps)
        return vqvae

    @torch.no_grad()
    def _codes(self, x: Tensor) -> list[Tensor]:
        batches = [sample_posterior(self.source, rows)[0] for rows in x.split(1000)]
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]

    @torch.no_grad()
    def decoded(self, codes: list[Tensor], rows: Any) -> Tensor:  # noqa: ANN401
        """Images of some rows of codes."""
        chosen = [z[rows] for z in codes]
        parts = zip(*(z.split(1000) for z in chosen), strict=True)
        return torch.cat([self.vqvae.decode(*some) for some in parts])

    def was_seen(self, codes: list[Tensor]) -> float:
        """Share of rows of codes that are those of a training image."""
        known = {row.numpy().tobytes() for row in flat(self.codes)}
        rows = flat(codes)
        return sum(row.numpy().tobytes() in known for row in rows) / len(rows)


def slug(base: str) -> str:
    """The name of a base as a part of a file's name."""
    return base.replace(", ", "-").replace(" ", "-")


def flat(codes: list[Tensor]) -> Tensor:
    return torch.cat([z.flatten(1) for z in codes], 1).to(torch.int16)


def based(case: Case, base: str) -> tuple[Any, float]:
    """The source on a fitted base, and the seconds of the fit."""
    if base == BY_ROWS:
        whole, seconds = based(case, FREQUENCIES)
        logits = [row for one in whole.bases for row in one.logits]
        return rebase(case.by_rows, [CodeFrequencies(row) for row in logits]), seconds
    options: dict[str, Any] = {}
    kinds: dict[str, type[Any]] = {FREQUENCIES: CodeFrequencies, NETWORK: CodeNetwork}
    if base == NETWORK:
        options = {"width": case.sizes.width, "depth": 3, "steps": case.sizes.base}
        options |= {"batch_size": 64, "dropout": 0.0, "progress": True}

    def make() -> dict[str, Tensor]:
        torch.manual_seed(0)
        made = fit_code_bases(case.source, case.train, kind=base, **options)
        configs.extend(one.config() for one in made)
        return {
            f"{k}.{name}": t for k, one in enumerate(made) for name, t in one.tensors().items()
        }

    configs: list[dict[str, Any]] = []
    key = {name: value for name, value in options.items() if name != "progress"}
    tensors, seconds = case.bench.tensors(f"base-{case.name}-{base}", make, **key)
    bases = []
    for k, z in enumerate(case.codes):
        part = {n.removeprefix(f"{k}."): t for n, t in tensors.items() if n.startswith(f"{k}.")}
        config = {} if base == FREQUENCIES else _config(case, k, z, options)
        bases.append(kinds[base].rebuild(part, config))
    return rebase(case.source, bases), seconds


def _config(case: Case, k: int, z: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    context = None if k == 0 else list(case.vqvae.context(case.codes[0][:1]).shape[1:])
    return {
        "event_shape": list(z.shape[1:]),
        "num_categories": case.vqvae.num_codes,
        "context_shape": context,
        "width": options["width"],
        "depth": options["depth"],
        "kernel_size": 5,
    }


def with_heads(case: Case, source: Any, base: str, seed: int) -> tuple[NCPrior, float]:  # noqa: ANN401
    """A prior with trained heads, and the seconds of the training."""
    torch.manual_seed(seed)
    prior = NCPrior.for_source(
        source, case.train[:512], width=case.sizes.width, depth=2, dropout=0.1
    )
    slow = base == NETWORK
    settings = FitSettings(
        weight_decay=0.1,
        num_cached_proposals=len(case.train) if slow and source.num_groups == 1 else None,
        cache_epochs="auto" if source.num_groups == 1 else float("inf") if slow else None,
    )
    steps, held_out = case.sizes.heads, case.sizes.stopping

    def do() -> None:
        rows = case.train[held_out:], case.train[:held_out]
        options = {"steps": steps, "batch_size": 128, "eval_every": max(1, steps // 10)}
        history = fit(prior, rows[0], held_out=rows[1], settings=settings, **options)
        print(history)

    name = f"heads-{case.name}-{slug(base)}-{seed}"
    return prior, case.bench.network(name, prior, do, steps=steps)


@torch.no_grad()
def draw(prior: NCPrior, count: int, proposals: int | None) -> list[Tensor]:
    """Codes drawn from the base (``None``), or by SIR."""
    off = prior.disabled() if proposals is None else nullcontext()
    sampler = partial(sir, num_proposals=proposals or 1)
    with off:
        parts = [prior.sample(part, sampler).latents for part in split(count)]
    return [torch.cat(z) for z in zip(*parts, strict=True)]


def split(count: int, size: int = 250) -> Iterator[int]:
    yield from (min(size, count - first) for first in range(0, count, size))


@torch.no_grad()
def log_base(source: Any, codes: list[Tensor]) -> Tensor:  # noqa: ANN401
    """log p of codes under the base, summed over levels, in nats."""
    found = []
    for some in zip(*(z.split(500) for z in codes), strict=True):
        total = torch.zeros(len(some[0]))

        def choose(k: int, group: Any, some: Any = some, total: Tensor = total) -> Tensor:  # noqa: ANN401
            total += group.prior.log_prob(some[k])
            return some[k]

        visit(source, source.start(len(some[0])), choose)
        found.append(total)
    return torch.cat(found)


class Arms:
    """The codes of every arm, in generations with seeds of their own, and their features."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed = case, seed
        self.priors: dict[str, tuple[NCPrior, float]] = {}
        rows = GENERATIONS * case.sizes.samples
        torch.manual_seed(seed)
        order = torch.randperm(len(case.train))
        train = order[:rows]
        self.posterior = self._features_of(case.decoded(case.codes, train))
        fresh = torch.randperm(len(case.fresh))[:rows]
        self.fresh = self._features_of(case.decoded(case.fresh_codes, fresh))
        self.real = self._features_of(case.train[order[-rows:]])
        self.codes = {POSTERIOR: [z[train] for z in case.codes]}
        self.codes[FRESH] = [z[fresh] for z in case.fresh_codes]

    def _features_of(self, images: Tensor) -> list[Tensor]:
        return list(in_batches(self.case.net.features, images).split(self.case.sizes.samples))

    def prior(self, base: str) -> tuple[NCPrior, float, float]:
        source, of_base = based(self.case, base)
        if base not in self.priors:
            self.priors[base] = with_heads(self.case, source, base, self.seed)
        return (*self.priors[base], of_base)

    def drawn(self, base: str, proposals: int | None) -> tuple[list[Tensor], float]:
        """The codes of all generations, and milliseconds per image."""
        prior, _, _ = self.prior(base)
        name = f"drawn-{self.case.name}-{slug(base)}-{proposals}-{self.seed}"

        def make() -> dict[str, Tensor]:
            found = []
            for generation in range(GENERATIONS):
                torch.manual_seed(100 * self.seed + generation)
                found.append(draw(prior, self.case.sizes.samples, proposals))
            parts = zip(*found, strict=True)
            return {str(k): torch.cat(z).short() for k, z in enumerate(parts)}

        tensors, seconds = self.case.bench.tensors(name, make, samples=self.case.sizes.samples)
        codes = [tensors[str(k)].long() for k in range(prior.source.num_groups)]
        if base == BY_ROWS:
            codes = self.case.vqvae.grids(codes)
        return codes, 1000 * seconds / (GENERATIONS * self.case.sizes.samples)

    def judged(self, features: list[Tensor]) -> GapClosed:
        """The gap closed by an arm, between the frequencies and the posterior."""
        codes, _ = self.drawn(FREQUENCIES, None)
        alone = self._features_of(self.case.decoded(codes, slice(None)))
        arms = {"base": alone, "ours": features, "posterior": self.posterior}
        return gap_closed(self.case.reference, **arms)

    def row(self, features: list[Tensor], codes: list[Tensor] | None) -> tuple[Row, GapClosed]:
        result = self.judged(features)
        copies = near_copies(self.case.seen, self.case.new, torch.cat(features))
        row = {
            "distance": result.d_ours,
            "closed": result.gap_closed,
            "closed_low": result.low,
            "closed_high": result.high,
            "copies": copies.share,
            "seen": None if codes is None else self.case.was_seen(codes),
        }
        return row, result

    def of_prior(self, base: str, proposals: int | None) -> list[Row]:
        """The row of a base alone, or of NCP on it."""
        codes, ms = self.drawn(base, proposals)
        features = self._features_of(self.case.decoded(codes, slice(None)))
        row, result = self.row(features, codes)
        prior, of_heads, of_base = self.prior(base)
        held_out = [z[: self.case.sizes.nll] for z in self.case.fresh_codes]
        if base == BY_ROWS:
            held_out = [row for grid in held_out for row in grid.unbind(1)]
        nats = -log_base(prior.source, held_out)
        row |= {"nll_low": nats.mean().item(), "nll_high": nats.mean().item(), "ms": ms}
        row["seconds"] = of_base
        if proposals is not None:
            alone, _ = self.drawn(FREQUENCIES if base == BY_ROWS else base, None)
            before = self.judged(self._features_of(self.case.decoded(alone, slice(None))))
            gain = gap_difference(result, before)
            row |= {"better": gain.difference, "better_low": gain.low, "better_high": gain.high}
            row |= self._nll_of_ncp(prior, held_out, nats) | {"seconds": of_base + of_heads}
        return [row]

    def _nll_of_ncp(self, prior: NCPrior, codes: list[Tensor], nats: Tensor) -> Row:
        torch.manual_seed(self.seed)
        with torch.no_grad():
            parts = zip(*(z.split(500) for z in codes), strict=True)
            log_r = torch.cat([prior.log_ratio(list(some)).sum(1) for some in parts])
        log_z = log_normaliser(prior, num_particles=self.case.sizes.particles)
        mean = (nats - log_r).mean().item()
        return {"nll_low": mean + log_z.lower, "nll_high": mean + log_z.upper}


def run(bench: Bench, data: str, levels: int, seed: int) -> list[Row]:
    """The rows of one VQ-VAE and seed."""
    case, arms = None, None

    def made() -> Arms:
        nonlocal case, arms
        if arms is None:
            case = Case(bench, data, levels)
            arms = Arms(case, seed)
        return arms

    def of_known(method: str) -> list[Row]:
        it = made()
        features = {POSTERIOR: it.posterior, FRESH: it.fresh, REAL: it.real}[method]
        row, _ = it.row(features, it.codes.get(method))
        return [row]

    key = {"data": data, "levels": levels, "seed": seed}
    todo: list[tuple[str, Callable[[], list[Row]]]] = []
    for base in (FREQUENCIES, BY_ROWS, NETWORK):
        if base != BY_ROWS:
            todo.append((base, lambda base=base: made().of_prior(base, None)))
        for m in PROPOSALS:
            name = f"NCP({m}) on {base}"
            todo.append((name, lambda base=base, m=m: made().of_prior(base, m)))
    todo += [(method, partial(of_known, method)) for method in (POSTERIOR, FRESH, REAL)]
    return [row for name, make in todo for row in bench.add(make, **key, method=name)]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", nargs="+", choices=REPOSITORIES, default=["mnist"])
    made.add_argument("--levels", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    options = made.parse_args()
    bench = Bench(options, {"generations": GENERATIONS})
    started = time.perf_counter()
    for data in options.data:
        for levels in options.levels:
            for seed in options.seed:
                rows = run(bench, data, levels, seed)
                print(f"\n{data}, {levels} level{'s'[: levels - 1]}, seed {seed}")
                print(table(rows, COLUMNS))
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
