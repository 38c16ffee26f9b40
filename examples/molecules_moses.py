"""Molecules: NCP on a VAE of SMILES strings, judged by the measures of MOSES.

    pip install -c constraints.txt '.[molecules]' && pip install --no-deps molsets==0.3.1
    python examples/molecules_moses.py --json molecules.json     # about 30 minutes on one core
    python examples/molecules_moses.py --quick                   # 3 minutes

A VAE with 32 latents is trained on 100,000 molecules of MOSES: GRUs that read and write pieces of
strings. Arms differ only in where z comes from; each string is then drawn from p(x | z):

- the VAE's own prior N(0, I), a Gaussian, and the mixture with the highest held-out likelihood;
- `improve(budget=50)`, the noise contrastive prior of this package;
- posteriors of training molecules and of molecules that nothing was trained or chosen on;
- "real molecules": those held-out molecules themselves.

Strings are drawn until there are equally many valid molecules in every arm (10,000), as the Fréchet
ChemNet distance (FCD) depends on their number. It is the distance to the statistics of the test set
that `molsets` ships. `closed` is the part of the FCD between N(0, I) and the posterior of held-out
molecules that a prior removes. Intervals of 95 % leave out one of 20 blocks of molecules in turn.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple

import torch
from benchmarks.bench import Bench, Row, machine, parser, table
from benchmarks.clock import now
from molecules.moses import TestSet, canonical, jackknife_error, molecules
from molecules.vae import MoleculeVAE, Pieces, negative_elbo
from torch import Tensor

from ncprior import NCPrior, improve
from ncprior.bases import fit_mixture, kl_per_latent, latents_of
from ncprior.utils import at_precision, fast_precision, train

BUDGET, MIXTURES, BATCH, STUDENT = 50, (10, 30, 100), 1000, 2.093  # of 19 degrees of freedom
BASE, CEILING = "N(0, I)", "posterior (held-out molecules)"
METHODS = (
    *(BASE, "Gaussian", "best mixture", f"improve({BUDGET})"),
    *("posterior (training molecules)", CEILING, "real molecules"),
)
COLUMNS = {
    "method": "<32",
    "seed": ">4",
    "fcd": ">7.3f",
    "fcd_low": ">8.3f",
    "fcd_high": ">9.3f",
    "closed": ">7.3f",
    "closed_low": ">11.3f",
    "closed_high": ">12.3f",
    "valid": ">6.3f",
    "unique": ">7.4f",
    "novel": ">6.3f",
    "snn": ">6.3f",
    "scaffolds": ">10.3f",
    "seconds": ">8.0f",
}
Strings = Callable[[int], list[str]]  # so many strings, valid or not


class Size(NamedTuple):
    """How large a run is.

    Attributes:
        train: Molecules that the VAE and all priors are trained on.
        choose: Molecules by which priors are chosen.
        held_out: Molecules that are measured only.
        steps: Steps of the VAE, of 128 molecules each.
        hidden: Width of its decoder.
        valid: Valid molecules of every arm.
        neighbours: Molecules whose nearest test molecule is looked for.
        most_seconds: Time for `improve`, or None.
    """

    train: int = 100_000
    choose: int = 10_000
    held_out: int = 30_000
    steps: int = 3500
    hidden: int = 256
    valid: int = 10_000
    neighbours: int = 1000
    most_seconds: float | None = None


QUICK = Size(20_000, 2000, 2000, 900, 192, 600, 100, 30.0)
LATENTS, PIECES, ROWS = 32, 128, 128


class Case:
    """The VAE, its molecules, and the test set; the same for every seed."""

    def __init__(self, bench: Bench, size: Size, beta: float) -> None:
        self.bench, self.size, self.beta = bench, size, beta
        self.strings = molecules(size.train + size.choose + size.held_out)
        self.pieces = Pieces(self.strings, PIECES)
        counts = size.train, size.choose, size.held_out
        self.train, self.choose, self.held_out = self.pieces.numbered(self.strings).split(counts)
        torch.manual_seed(0)
        self.vae = MoleculeVAE(
            len(self.pieces.texts), self.train.shape[1], latents=LATENTS, hidden=size.hidden
        )
        key = {"sizes": [*counts, size.steps, size.hidden], "beta": beta}
        self.vae_seconds = bench.network("molecules-vae", self.vae, self.train_vae, **key)
        self.source = self.vae.source()
        self.require_valid()
        known = {text for text in map(canonical, self.strings[: size.train]) if text}
        self.test = TestSet(known, neighbours=size.neighbours)

    def train_vae(self) -> None:
        """Trains the VAE; the weight of the KL divergence grows during the first fifth."""
        size, step = self.size, 0

        def loss(rows: Tensor) -> Tensor:
            nonlocal step
            step += 1
            beta = self.beta * min(1, 5 * step / size.steps)
            with at_precision("cpu", fast_precision("cpu")):
                return negative_elbo(self.vae, self.train[rows], beta=beta)

        options = {"steps": size.steps, "batch_size": ROWS, "max_grad_norm": 5.0}
        train(self.vae, loss, size.train, name="VAE", **options)

    def require_valid(self) -> None:
        """Stops before any prior is made if the VAE cannot write molecules at all."""
        torch.manual_seed(0)
        texts = self.reconstructions(self.held_out)(BATCH)
        share = sum(canonical(text) is not None for text in texts) / BATCH
        same = sum(a == b for a, b in zip(texts, self.held_out_strings(), strict=False)) / BATCH
        (kl,) = kl_per_latent(self.source, self.held_out[:BATCH])
        used = int((kl > 0.01).sum())
        print(
            f"VAE: {self.vae_seconds:.0f} s. Held-out molecules: KL(q, p) {kl.sum():.1f} nats in {used} "
            f"latents; decoded again, {share:.1%} are valid and {same:.1%} the same string",
            flush=True,
        )
        if share < 0.02:
            raise SystemExit("Reconstructions are not valid molecules: no prior can help.")

    def held_out_strings(self) -> list[str]:
        return self.strings[self.size.train + self.size.choose :]

    def decoded(self, draw: Callable[[int], Tensor]) -> Strings:
        """Strings drawn from p(x | z) at drawn z."""

        @torch.no_grad()
        def strings(count: int) -> list[str]:
            state = self.source.advance(self.source.start(count), draw(count))
            return self.pieces.joined(self.source.likelihood(state).sample())

        return strings

    def reconstructions(self, x: Tensor) -> Strings:
        """Strings drawn from p(x | z), where z is a draw of q(z | x) of the next molecules."""
        rows = cycle(x.split(BATCH))
        return self.decoded(lambda count: latents_of(self.source, next(rows)[:count]))

    def mixture(self, sizes: Sequence[int]) -> Strings:
        """The mixture with the highest likelihood of the encodings of molecules for choices."""
        z, fresh = (latents_of(self.source, x) for x in (self.train, self.choose))
        found = [fit_mixture(z, size, held_out=fresh) for size in sizes]
        best = max(found, key=lambda mixture: mixture.log_prob(fresh).mean())
        print(f"mixture of {len(best.logits)}")
        return self.decoded(lambda count: best.sample((count,)))

    def improved(self, seed: int) -> Strings:
        """The prior of `improve`."""
        prior: NCPrior = improve(
            self.source,
            self.train,
            held_out=self.choose,
            budget=BUDGET,
            max_seconds=self.size.most_seconds,
            seed=seed,
        )
        print(prior.report, flush=True)
        return lambda count: self.pieces.joined(prior.sample(count, draw_x=True).x)

    def valid_with_noise(self) -> dict[float, float]:
        """Shares of valid strings of encodings, mixed with draws of a Gaussian of their covariance.

        They show how fine the structure of the encodings is that a prior has to learn.
        """
        torch.manual_seed(0)
        z = latents_of(self.source, self.held_out)
        centre, root = z.mean(0), torch.linalg.cholesky(z.mT.cov())
        shares = {}
        for a in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0):
            some = z[: 2 * BATCH] - centre
            mixed = (1 - a**2) ** 0.5 * some + a * torch.randn_like(some) @ root.mT
            texts = self.decoded(lambda count, mixed=mixed: centre + mixed)(len(some))
            shares[a] = sum(canonical(text) is not None for text in texts) / len(some)
        return shares

    def arm(self, method: str, seed: int) -> Strings:
        """A method by its name, fitted."""
        torch.manual_seed(seed)
        arms: dict[str, Callable[[], Strings]] = {
            BASE: lambda: self.decoded(lambda count: self.source.prior.sample((count,))),
            "Gaussian": lambda: self.mixture([1]),
            "best mixture": lambda: self.mixture(MIXTURES),
            f"improve({BUDGET})": lambda: self.improved(seed),
            "posterior (training molecules)": lambda: self.reconstructions(self.train),
            CEILING: lambda: self.reconstructions(self.held_out),
            "real molecules": lambda: partial(next_of, iter(self.held_out_strings())),
        }
        return arms[method]()

    def measured(self, method: str, seed: int) -> Mapping[str, Tensor]:
        """Measures of a method, with the share of valid strings and the seconds of its fit."""
        started = now()
        strings = self.arm(method, seed)
        seconds = now() - started
        torch.manual_seed(1000 + seed)
        drawn, valid = 0, list[str]()
        while len(valid) < self.size.valid:
            texts = strings(BATCH)
            drawn += len(texts)
            valid += [text for text in map(canonical, texts) if text is not None]
            if drawn > 50 * self.size.valid:
                raise SystemExit(f"{method}: fewer than 2 % of the strings are valid.")
        share = len(valid) / drawn
        measures = self.test.measures(valid[: self.size.valid])
        more = {"valid": torch.tensor(share), "drawn": torch.tensor(drawn)}
        return {**measures._asdict(), **more, "seconds": torch.tensor(seconds)}


def next_of(strings: Iterator[str], count: int) -> list[str]:
    return list(islice(strings, count))


def rows_of(case: Case, seed: int) -> list[Row]:
    """One row per method; what has been measured is kept in the cache."""
    found = {}
    for method in METHODS:
        key = {"method": method, "seed": seed, "size": list(case.size), "beta": case.beta}
        name = f"molecules-{re.sub('[^a-z0-9]+', '-', method.lower())}-{seed}"
        found[method], _ = case.bench.tensors(name, partial(case.measured, method, seed), **key)
        print(f"{method}: FCD {float(found[method]['fcd'][0]):.3f}", flush=True)
    return [
        row(method, it, found[BASE]["fcd"], found[CEILING]["fcd"]) for method, it in found.items()
    ]


def row(method: str, it: Mapping[str, Tensor], base: Tensor, ceiling: Tensor) -> Row:
    """The row of a method from its measures and the FCD of both ends of the gap."""
    closed = (base - it["fcd"]) / (base - ceiling)
    made = {
        "method": method,
        **with_interval("fcd", it["fcd"][0], jackknife_error(it["fcd"])),
        **with_interval("closed", closed[0], jackknife_error(closed)),
        **with_interval("valid", it["valid"], share_error(it["valid"], it["drawn"])),
        "unique": float(it["unique"]),
        **with_interval("novel", it["novel"], share_error(it["novel"], it["num_unique"])),
        **with_interval("snn", *it["snn"]),
        **with_interval("scaffolds", it["scaffolds"][0], jackknife_error(it["scaffolds"])),
        "seconds": float(it["seconds"]),
    }
    unknown = ["closed_low", "closed_high"] if method in (BASE, CEILING) else []  # 0 and 1
    return {name: None if name in unknown else value for name, value in made.items()}


def share_error(share: Tensor, count: Tensor) -> Tensor:
    return (share * (1 - share) / count).sqrt()


def with_interval(name: str, value: Tensor | float, error: Tensor | float) -> Row:
    """A value with both ends of its interval of 95 %."""
    value, half = float(value), STUDENT * float(error)
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--beta", type=float, default=0.2, help="weight of the KL divergence (%(default)s)"
    )
    options = made.parse_args()
    size = QUICK if options.quick else Size()
    bench = Bench(options, {"size": list(size), "beta": options.beta, "budget": BUDGET})
    print(machine(), flush=True)
    case = Case(bench, size, options.beta)
    for seed in options.seed:
        bench.add(partial(rows_of, case, seed), seed=seed)
    print(table(bench.rows, COLUMNS))
    print(f"valid with noise: {case.valid_with_noise()}")


if __name__ == "__main__":
    main()
