"""`improve` on VAEs that its defaults were not chosen on, and on less data.

    NCPRIOR_DATA=... python examples/benchmarks/any_vae.py --json any_vae.json
    NCPRIOR_DATA=... python examples/benchmarks/any_vae.py --data mnist fashion --vae mlp \\
        --rows 2000 5000 10000 --seed 0 1 2 --json any_vae.json
    python examples/benchmarks/any_vae.py --quick        # some minutes

The VAEs of MNIST or Fashion-MNIST are trained here on the plain ELBO of all training images: `mlp` has 20 latents and
one hidden layer, `conv` 32 latents, `gaussian` 12 latents and a Gaussian likelihood of standard
deviation 0.1. `improve` is given the images and a budget of 50 evaluations, and nothing else; the
mixtures beside it are fitted to the same images, a tenth of them held out, with as many draws of z
per image as `improve` takes for its own. `gap_closed` is that of
prior_hole.py, with its interval; `over_mixture` is the paired difference to the mixture that closes
most. Seconds are of the core where there is one thread (OMP_NUM_THREADS=1).
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from bench import Bench, Row, machine, parser, table
from clock import now
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.functional import binary_cross_entropy_with_logits

from ncprior import LatentSource, NCPrior, SingleGroup, improve
from ncprior.bases import fit_mixture, latents_of, rebase
from ncprior.demo import Classifier, in_batches, read_images
from ncprior.evaluation import GapClosed, gap_closed, gap_difference
from ncprior.source import sample_posterior, visit
from ncprior.utils import train

COLUMNS = {
    "data": "<8",
    "vae": "<9",
    "rows": ">7,.0f",
    "seed": ">4",
    "method": "<15",
    "gap_closed": ">10.3f",
    "gap_closed_low": ">8.3f",
    "gap_closed_high": ">9.3f",
    "over_mixture": ">12.3f",
    "over_mixture_low": ">8.3f",
    "over_mixture_high": ">9.3f",
    "seconds": ">8.0f",
}
GENERATIONS, BATCH, BUDGET, SIZES = 5, 1000, 50, (10, 30, 100)
Draw = Callable[[int], Tensor]


class FlatVAE(nn.Module):
    """A VAE of images with a vector of latents."""

    def __init__(
        self, latents: int, encoder: nn.Module, decoder: nn.Module, sd: float = 0.0
    ) -> None:
        super().__init__()
        self.latents, self.encoder, self.decoder, self.sd = latents, encoder, decoder, sd

    def posterior(self, x: Tensor) -> Independent:
        mean, log_var = self.encoder(x).chunk(2, -1)
        return Independent(Normal(mean, (0.5 * log_var).exp().clamp(1e-4, 50)), 1)

    def logits(self, z: Tensor) -> Tensor:
        return self.decoder(z.reshape(-1, self.latents)).reshape(*z.shape[:-1], 1, 28, 28)

    def decode(self, z: Tensor) -> Tensor:
        return self.logits(z).sigmoid()

    def negative_elbo(self, x: Tensor) -> Tensor:
        q = self.posterior(x)
        z = q.rsample()
        kl = q.log_prob(z) - self.prior().log_prob(z)
        logits = self.logits(z)
        if self.sd:
            misfit = 0.5 * ((logits.sigmoid() - x) / self.sd).square()
        else:
            misfit = binary_cross_entropy_with_logits(logits, x, reduction="none")
        return misfit.flatten(1).sum(1) + kl

    def prior(self) -> Independent:
        return Independent(Normal(torch.zeros(self.latents), torch.ones(self.latents)), 1)

    def source(self) -> SingleGroup:
        return SingleGroup(self.prior(), self.posterior, self.decode, module=self)


def mlp() -> FlatVAE:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
    return FlatVAE(20, encoder, nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784)))


def conv() -> FlatVAE:
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU()),
        *(nn.Flatten(), nn.Linear(1568, 128), nn.GELU(), nn.Linear(128, 64)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 1568), nn.Unflatten(1, (32, 7, 7))),
        *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)),
    )
    return FlatVAE(32, encoder, decoder)


def gaussian() -> FlatVAE:
    def layers(*sizes: int) -> list[nn.Module]:
        return [
            layer
            for inside, outside in pairwise(sizes)
            for layer in (nn.Linear(inside, outside), nn.LayerNorm(outside), nn.SiLU())
        ]

    encoder = nn.Sequential(nn.Flatten(), *layers(784, 256, 256), nn.Linear(256, 24))
    return FlatVAE(12, encoder, nn.Sequential(*layers(12, 256, 256), nn.Linear(256, 784)), sd=0.1)


DATA = {"mnist": "ylecun/mnist", "fashion": "zalando-datasets/fashion_mnist"}
VAES = {"mlp": mlp, "conv": conv, "gaussian": gaussian}


class Case:
    """A VAE, the images, and the features and arms that every prior is measured against."""

    def __init__(self, bench: Bench, images: str, name: str) -> None:
        torch.manual_seed(0)
        quick = bench.settings["quick"]
        data, test = (read_images(DATA[images], part) for part in ("train", "test"))
        data = data.rows(torch.randperm(len(data.labels))[: 2000 if quick else None])
        self.images, self.count = data.images, 1000 if quick else 5000
        vae, judge = VAES[name](), Classifier(28, num_features=64)
        count, entropy = len(data.labels), nn.CrossEntropyLoss()

        def loss(rows: Tensor) -> Tensor:
            return vae.negative_elbo(data.images[rows]).mean()

        def misfit(rows: Tensor) -> Tensor:
            return entropy(judge(data.images[rows]), data.labels[rows])

        steps = 300 if quick else 3750
        fit_vae = partial(train, vae, loss, count, steps=steps, batch_size=128, name="VAE")
        bench.network(f"any-{images}-{name}", vae, fit_vae)
        fit_judge = partial(
            train, judge, misfit, count, steps=300 if quick else 900, batch_size=128
        )
        bench.network(f"any-{images}-classifier", judge, partial(fit_judge, name="classifier"))
        self.source, self.features = vae.source(), judge.features
        self.reference = in_batches(self.features, test.images)
        self.base, self.posterior = self.draws(own_draw(self.source)), self.draws(self.decoded)

    @torch.no_grad()
    def draws(self, draw: Draw) -> list[Tensor]:
        """Features of every generation."""
        found = []
        for generation in range(GENERATIONS):
            torch.manual_seed(1000 + generation)
            found.append(
                torch.cat([self.features(draw(BATCH)) for _ in range(self.count // BATCH)])
            )
        return found

    def decoded(self, count: int) -> Tensor:
        """Decoded posterior samples of training images."""
        _, state = sample_posterior(
            self.source, self.images[torch.randperm(len(self.images))[:count]]
        )
        return self.source.decode(state)

    def gap(self, draw: Draw) -> GapClosed:
        arms = {"base": self.base, "posterior": self.posterior}
        return gap_closed(self.reference, ours=self.draws(draw), **arms)


def own_draw(source: LatentSource[Any, Any]) -> Draw:
    """Decoded draws of a source's own prior."""

    def draw(count: int) -> Tensor:
        _, state = visit(source, source.start(count), lambda k, group: group.prior.sample())
        return source.decode(state)

    return draw


def measured(case: Case, rows: int, seed: int) -> list[Row]:
    """`improve` and mixtures of several sizes on the first rows of the images."""
    x = case.images[:rows]
    started = now()
    prior: NCPrior = improve(case.source, x, budget=BUDGET, seed=seed)
    seconds = now() - started
    print(prior.report, flush=True)
    ours = case.gap(lambda count: prior.sample(count).x)
    found = {f"improve({BUDGET})": (ours, seconds)}
    torch.manual_seed(seed)
    held_out = len(x) // 10
    draws = range(
        min(10, math.ceil(20_000 / (len(x) - held_out)))
    )  # of z per row, as `improve` takes them
    z = torch.cat([latents_of(case.source, x[held_out:]) for _ in draws])
    fresh = latents_of(case.source, x[:held_out])
    for size in SIZES:
        started = now()
        mixture = fit_mixture(z, size, held_out=fresh)
        seconds = now() - started
        gap = case.gap(own_draw(rebase(case.source, mixture)))
        found[f"mixture of {size}"] = gap, seconds
    best = max(
        (gap for name, (gap, _) in found.items() if "mixture" in name), key=lambda g: g.gap_closed
    )
    return [_row(name, gap, seconds, best) for name, (gap, seconds) in found.items()]


def _row(name: str, gap: GapClosed, seconds: float, best: GapClosed) -> Row:
    over = gap_difference(gap, best)
    return {
        "method": name,
        "gap_closed": gap.gap_closed,
        "gap_closed_low": gap.low,
        "gap_closed_high": gap.high,
        "over_mixture": over.difference,
        "over_mixture_low": over.low,
        "over_mixture_high": over.high,
        "seconds": seconds,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", nargs="+", choices=DATA, default=["mnist"])
    made.add_argument("--vae", nargs="+", choices=VAES, default=list(VAES))
    made.add_argument("--rows", type=int, nargs="+", default=[60_000], metavar="N")
    options = made.parse_args()
    bench = Bench(options, {})
    print(machine(), flush=True)
    for images, name in product(options.data, options.vae):
        case = Case(bench, images, name)
        for rows, seed in product(options.rows, options.seed):
            rows = min(rows, len(case.images))
            make = partial(measured, case, rows, seed)
            bench.add(make, data=images, vae=name, rows=rows, seed=seed)
    print(table(bench.rows, COLUMNS))


if __name__ == "__main__":
    main()
