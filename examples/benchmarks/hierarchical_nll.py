"""Likelihood on MNIST with ten groups of 4×4 latents, the paper's table 6: base prior and NCP.

    NCPRIOR_DATA=... python examples/benchmarks/hierarchical_nll.py --seed 0 1 2 --json nll.json
    python examples/benchmarks/hierarchical_nll.py --quick             # about 10 minutes

Trains the hierarchical VAE of `ncprior.adapters.hvae` on dynamically binarised MNIST, once, on the
plain ELBO, and freezes it; then for every seed a head per group. -log p(x) of held-out images, in
nats, lies on average between `nll_lower` and `nll_upper`, if chains have mixed: they start from weighted
particles, not from exact draws. `model` is what is measured: SIR(M), the
law that M proposals per group draw from, or NCP with one global log Z, whose standard deviation over
estimates is `log_z_std` (the paper asks for at most 0.23). `gain` is the VAE's nll_upper less the
row's; `gain_se` the standard error of that difference over images, without that of log Z. SIR(M) is measured on fewer
images, its gain over the VAE on the same ones. A report per group says where the gain is.
"""

import math
from functools import cached_property, partial

import torch
from bench import Bench, BinaryMNIST, Row, machine, parser, table
from tables import PAPER_HIERARCHICAL
from torch import Tensor

from ncprior import NCPrior, fit
from ncprior.adapters.hvae import HVAE, HVAESource, train_hvae
from ncprior.adapters.lars_snis import Binarised
from ncprior.diagnostics import diagnose
from ncprior.evaluation import Bounds, Likelihood, log_likelihood, log_normaliser
from ncprior.heads import MLPHead
from ncprior.training import FitSettings

COLUMNS = {
    "method": "<16",
    "seed": ">4",
    "model": "<9",
    "nll_lower": ">9.2f",
    "nll_upper": ">9.2f",
    "gain": ">6.2f",
    "gain_se": ">7.2f",
    "log_z_std": ">9.3f",
    "images": ">6",
    "fit_seconds": ">11.0f",
    "paper": ">6.2f",
}


class Table6:
    """The frozen VAE and the heads on it."""

    def __init__(self, bench: Bench, data: BinaryMNIST) -> None:
        self.bench, self.data, self.settings = bench, data, bench.settings

    @cached_property
    def vae(self) -> tuple[HVAESource, float]:
        """The VAE, trained on the ELBO, and the seconds that it took."""
        torch.manual_seed(0)
        groups, epochs = self.settings["groups"], self.settings["epochs"]
        vae = HVAE(num_groups=groups)
        train = partial(train_hvae, vae, self.data.train, epochs=epochs)
        seconds = self.bench.network(f"hvae-{groups}", vae, train, groups=groups, epochs=epochs)
        return HVAESource(vae), seconds

    @cached_property
    def vae_bounds(self) -> Bounds:
        """Bounds of log p(x) of the VAE alone, per image; every gain is over them."""

        def make() -> dict[str, Tensor]:
            found = log_likelihood(
                *(self.vae[0], self.data.test),
                num_samples=self.settings["samples"],
                progress=True,
            )["base"]
            return {name: getattr(found, name) for name in Bounds._fields}

        key = {name: self.settings[name] for name in ("groups", "epochs", "samples", "test")}
        return Bounds(**self.bench.tensors("hvae-bounds", make, **key)[0])

    def row(self, model: str, found: Bounds | Likelihood, seconds: float) -> Row:
        """One row; of models measured on fewer images, their gain on those, over all images."""
        images = len(found.lower)
        gain = found.lower - self.vae_bounds.lower[:images]
        nll = -self.vae_bounds.lower.mean().item() - gain.mean().item()
        return {
            "model": model,
            "nll_lower": nll - (found.upper - found.lower).mean().item(),
            "nll_upper": nll,
            "gain": gain.mean().item(),
            "gain_se": gain.std().item() / math.sqrt(images),
            "images": images,
            "fit_seconds": seconds,
        }

    def base(self) -> list[Row]:
        """The VAE alone."""
        return [self.row("base", self.vae_bounds, self.vae[1])]

    def ncp(self, seed: int) -> list[Row]:
        """Heads on the frozen VAE: the law that SIR draws from, and NCP itself."""
        prior, seconds = self.heads(seed)
        print(diagnose(prior, self.data.held_out[:1000], num_proposals=(10, 100)))
        log_z = log_normaliser(prior, num_particles=self.settings["particles"], progress=True)
        print(f"seed {seed}: {log_z}")
        few = self.data.test[: self.settings["test_sir"]]
        sir = log_likelihood(
            *(prior, few),
            num_samples=self.settings["samples"],
            num_proposals=self.settings["proposals"],
            chunk_size=20_000,
            progress=True,
        )["sir"]
        ncp = log_likelihood(
            *(prior, self.data.test),
            num_samples=self.settings["samples"],
            log_z=log_z,
            progress=True,
        )["ncp"]
        limit = {**self.row("NCP", ncp, seconds), "log_z_std": log_z.std}
        return [self.row(sir.model, sir, seconds), limit]

    def heads(self, seed: int) -> tuple[NCPrior, float]:
        """Trains a head per group; returns the seconds that it took."""
        torch.manual_seed(seed)
        steps, groups = self.settings["head_steps"], self.settings["groups"]
        probe = self.data.held_out[:512]
        prior = NCPrior.for_source(self.vae[0], probe, kind=MLPHead, width=128)

        def train() -> None:
            # A walk costs more than the heads: four draws of every z_k make better use of it.
            fit(
                *(prior, Binarised(self.data.train, 256)),
                held_out=self.data.held_out[:2000],
                steps=steps,
                learning_rate=2e-3,
                eval_every=max(1, steps // 20),
                settings=FitSettings(num_draws=4),
            )

        name = f"hvae-{groups}-heads-{seed}"
        return prior, self.bench.network(name, prior, train, groups=groups, steps=steps)


def settings_for(quick: bool) -> Row:
    """How much of everything."""
    settings = {"groups": 10, "epochs": 2, "head_steps": 500, "particles": 2000}
    settings |= {"samples": 20, "test": 200, "test_sir": 50, "proposals": 100}
    if not quick:
        settings |= {"epochs": 16, "head_steps": 4000, "particles": 10_000}
        settings |= {"samples": 200, "test": 1000, "test_sir": 200}
    return settings


def main() -> None:
    options = parser(__doc__).parse_args()
    settings = settings_for(options.quick)
    bench = Bench(options, settings)
    table_6 = Table6(bench, BinaryMNIST(settings["test"]))
    bench.add(table_6.base, method="hierarchical VAE", seed=0)
    for seed in options.seed:
        bench.add(partial(table_6.ncp, seed), method="NCP", seed=seed)
    rows = [{**row, "paper": PAPER_HIERARCHICAL.get(row["method"])} for row in bench.rows]
    print(f"{machine()}; {settings}\n")
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
