"""Likelihood on MNIST with one group of latents, the paper's table 2: NCP, SNIS and LARS.

    NCPRIOR_DATA=... python examples/benchmarks/mnist_nll.py --seed 0 1 2 --json nll.json
    python examples/benchmarks/mnist_nll.py --quick             # about 10 minutes

Trains the VAE of the EIM paper (784-300-300-50, tanh, dynamically binarised MNIST) on the plain
ELBO, once, and freezes it: all of NCP's rows are measured on it. For every seed it trains NCP's
heads, and VAEs of the same networks together with a LARS or a SNIS prior, which changes the VAE too.
All rows are measured by the same code on the same held-out images: -log p(x) in nats lies on average
between `nll_lower` and `nll_upper`. `model` is what is measured: SIR(M), the law that M proposals
draw from, or NCP, its limit; `gain` is the VAE's nll_upper less the row's, with the standard error
of that difference over images in `gain_se`; `paper` is the gain in the paper. `fit_seconds` is what
a row adds: heads on the frozen VAE, or a VAE and its prior.

`score term` is FitSettings(score_weight=10). From these heads, training goes on in two ways, with a
quarter of the steps at a third of the rate and without that term: one step of `EM`,
FitSettings(importance_samples=16), and on q(z|x) as before (`longer`), which shows what the further
steps alone bring. --methods picks rows.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
from bench import Bench, BinaryMNIST, Row, chosen, machine, parser, table, with_methods
from tables import PAPER
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import LatentSource, NCPrior, fit
from ncprior.adapters.lars_snis import (
    EIMVAE,
    Binarised,
    EIMSource,
    EnergyNet,
    LARSPrior,
    SNISPrior,
    train_vae,
)
from ncprior.bases import GaussianMixture, fit_mixture, latents_of, rebase
from ncprior.evaluation import Bounds, Likelihood, log_likelihood, log_normaliser
from ncprior.heads import MLPHead
from ncprior.training import FitSettings

SAMPLES, EPOCHS = 16, 2  # of q(z|x) per image, for the step of EM, and for how long they are kept

COLUMNS = {
    "method": "<24",
    "seed": ">4",
    "model": "<10",
    "nll_lower": ">9.2f",
    "nll_upper": ">9.2f",
    "gain": ">6.2f",
    "gain_se": ">7.2f",
    "fit_seconds": ">11.0f",
    "paper": ">6.2f",
}


class Table2:
    """The methods, each of which makes its rows."""

    def __init__(self, bench: Bench, data: BinaryMNIST) -> None:
        self.bench, self.data, self.settings = bench, data, bench.settings

    def vae(
        self, prior: SNISPrior | LARSPrior | None, name: str, seed: int
    ) -> tuple[EIMVAE, float]:
        """Trains a VAE with a prior of its own, or N(0, I), on the ELBO."""
        torch.manual_seed(seed)
        vae, epochs = EIMVAE(self.data.train.mean(0), prior), self.settings["epochs"]
        train = partial(train_vae, vae, self.data.train, epochs=epochs)
        return vae, self.bench.network(f"eim-{name}-{seed}", vae, train, epochs=epochs)

    def measure(self, prior: Any, **options: Any) -> dict[str, Likelihood]:  # noqa: ANN401
        """The likelihood of the test images."""
        samples = self.settings["samples"]
        return log_likelihood(
            *(prior, self.data.test),
            num_samples=samples,
            share_pools=True,
            chunk_size=5000,
            progress=True,
            **options,
        )

    @cached_property
    def vae_bounds(self) -> Bounds:
        """Bounds of log p(x) of the VAE alone, per image; every gain is over them."""

        def make() -> dict[str, Tensor]:
            found = self.measure(EIMSource(self.vae(None, "normal", 0)[0]))["base"]
            return {name: getattr(found, name) for name in Bounds._fields}

        key = {name: self.settings[name] for name in ("epochs", "samples", "test")}
        return Bounds(**self.bench.tensors("eim-normal-0-bounds", make, **key)[0])

    def row(
        self, model: str, found: Bounds | Likelihood, seconds: float, *, slack: float = 0.0
    ) -> Row:
        """One row; `slack` widens the interval by what else is not known, in nats."""
        gain = found.lower - slack - self.vae_bounds.lower
        return {
            "model": model,
            "nll_lower": -found.upper.mean().item() - slack,
            "nll_upper": -found.lower.mean().item() + slack,
            "gain": gain.mean().item(),
            "gain_se": gain.std().item() / math.sqrt(len(gain)),
            "fit_seconds": seconds,
        }

    def base(self) -> list[Row]:
        """The VAE alone."""
        return [self.row("N(0, I)", self.vae_bounds, self.vae(None, "normal", 0)[1])]

    def lars(self, seed: int) -> list[Row]:
        """A VAE with a LARS prior, whose density is known but for its normaliser."""
        prior = LARSPrior(num_proposals=self.settings["proposals"])
        vae, seconds = self.vae(prior, "lars", seed)
        error = prior.estimate_normaliser(5_000_000)
        found = self.measure(EIMSource(vae))["base"]
        return [self.row("LARS", found, seconds, slack=1.96 * error)]

    def snis(self, seed: int) -> list[Row]:
        """A VAE with a SNIS prior: SIR over N(0, I), with the energy as log-ratio."""
        proposals, energy = self.settings["proposals"], EnergyNet()
        prior = SNISPrior(num_proposals=proposals, energy=energy)
        vae, seconds = self.vae(prior, "snis", seed)
        normal = Independent(Normal(torch.zeros(50), 1.0), 1)
        head = deepcopy(energy)  # heads share no weights with the VAE
        snis = NCPrior(rebase(EIMSource(vae), normal), head).eval()
        found = self.measure(snis, num_proposals=proposals)["sir"]
        return [self.row(found.model, found, seconds)]

    def ncp(self, seed: int, name: str, make: Callable[[int], tuple[NCPrior, float]]) -> list[Row]:
        """Heads on the frozen VAE: the law that SIR draws from, and NCP itself."""
        prior, seconds = make(seed)
        log_z = log_normaliser(prior, num_particles=self.settings["particles"])
        print(f"{name}, seed {seed}: {log_z}")
        found = self.measure(prior, num_proposals=self.settings["proposals"], log_z=log_z)
        return [self.row(found[key].model, found[key], seconds) for key in ("sir", "ncp")]

    def mixture(self, seed: int) -> list[Row]:
        """What the best NCP's base gains alone."""
        source, seconds = self.closer(seed)
        return [self.row("mixture", self.measure(source)["base"], seconds)]

    def paper_head(self, seed: int) -> tuple[NCPrior, float]:
        """The head of the paper: 50-100-100-1 with tanh, the energy of SNIS and LARS."""
        prior = NCPrior(EIMSource(self.vae(None, "normal", 0)[0]), EnergyNet())
        return prior, self.fit(prior, f"paper-{seed}", seed)

    def closer(self, seed: int) -> tuple[LatentSource, float]:
        """The frozen VAE with a mixture fitted to the encodings of the training images."""
        torch.manual_seed(seed)
        source = EIMSource(self.vae(None, "normal", 0)[0])

        def fitted() -> dict[str, Tensor]:
            z = torch.cat([latents_of(source, self.data.train.bernoulli()) for _ in range(2)])
            return fit_mixture(z, 10, max_steps=60, starts=2).tensors()

        key = {"epochs": self.settings["epochs"]}
        tensors, seconds = self.bench.tensors(f"eim-mixture-{seed}", fitted, **key)
        return rebase(source, GaussianMixture(**tensors)), seconds

    def best(self, seed: int) -> tuple[NCPrior, float]:
        """A larger head, on that mixture."""
        return self.large(seed, "best")

    def scored(self, seed: int) -> tuple[NCPrior, float]:
        """The same head, trained with the score term."""
        return self.large(seed, "scored", score_weight=10.0)

    def large(self, seed: int, name: str, **options: Any) -> tuple[NCPrior, float]:  # noqa: ANN401
        source, seconds = self.closer(seed)
        probe = self.data.held_out[:512]
        prior = NCPrior.for_source(source, probe, kind=MLPHead, width=256, depth=2)
        return prior, seconds + self.fit(prior, f"{name}-{seed}", seed, **options)

    def longer(self, seed: int) -> tuple[NCPrior, float]:
        """The head of the score term, trained on without it."""
        return self.further(seed, "longer")

    def em(self, seed: int) -> tuple[NCPrior, float]:
        """The head of the score term, after one step of EM."""
        return self.further(seed, "em", importance_samples=SAMPLES, cache_epochs=EPOCHS)

    def further(self, seed: int, name: str, **options: Any) -> tuple[NCPrior, float]:  # noqa: ANN401
        prior, seconds = self.scored(seed)
        steps = self.settings["head_steps"] // 4
        loop = {"steps": steps, "learning_rate": 1e-3, "patience": None}
        return prior, seconds + self.fit(prior, f"{name}-{seed}", seed, loop, **options)

    def fit(
        self,
        prior: NCPrior,
        name: str,
        seed: int,
        loop: dict[str, Any] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> float:
        """Trains the heads of a prior; returns the seconds that it took."""
        torch.manual_seed(seed)
        steps = self.settings["head_steps"]
        loop = loop or {"steps": steps, "learning_rate": 3e-3}

        def train() -> None:
            data = Binarised(self.data.train, 512)
            history = fit(
                *(prior, data),
                held_out=self.data.held_out,
                eval_every=steps // 20,
                settings=FitSettings(**options),
                **loop,
            )
            print(f"{name}: {history}")

        return self.bench.network(f"eim-{name}", prior, train, steps=loop["steps"])


def main() -> None:
    options = with_methods(parser(__doc__)).parse_args()
    quick = options.quick
    settings = {"epochs": 12, "head_steps": 1000, "samples": 100, "test": 500, "particles": 50_000}
    if not quick:
        settings = {"epochs": 250, "head_steps": 10_000, "samples": 5000, "test": 1000}
        settings["particles"] = 500_000
    bench = Bench(options, {**settings, "proposals": 1024})
    table_2 = Table2(bench, BinaryMNIST(settings["test"]))
    bench.add(table_2.base, method="VAE", seed=0)
    heads = {
        "NCP, paper's head": table_2.paper_head,
        "NCP": table_2.best,
        "NCP, score term": table_2.scored,
        "NCP, score term, longer": table_2.longer,
        "NCP, score term, EM": table_2.em,
    }
    methods = {name: partial(table_2.ncp, name=name, make=make) for name, make in heads.items()}
    methods["mixture of 10"] = table_2.mixture
    jointly = {"VAE + SNIS": table_2.snis, "VAE + LARS": table_2.lars}
    names = chosen([*methods, *jointly], options.methods)
    for group in (methods, jointly):
        for seed in options.seed:
            for name in (name for name in group if name in names):
                bench.add(partial(group[name], seed), method=name, seed=seed)
    print(f"{machine()}; {settings}\n")
    print(table([{**row, "paper": PAPER.get(row["method"])} for row in bench.rows], COLUMNS))


if __name__ == "__main__":
    main()
