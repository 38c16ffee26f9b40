"""VAEBM and NCP on one frozen VAE: each alone, and the energy on top of the ratio heads.

    NCPRIOR_DATA=... python examples/benchmarks/vaebm.py --data mnist --seed 0 1 2 --json vaebm.json
    python examples/benchmarks/vaebm.py --data digits --quick     # some minutes

The VAE, the classifier whose features judge and the ratio heads are those of prior_hole.py. An
energy is trained by short Langevin chains, started from the VAE or from NCP's own sampler, and
images are drawn by chains of the same kind; rows of other `steps` are the same chains, looked at
earlier and later. Judged are the decoder's means.

The decoder's noise is one σ. A given one is for draws and data alike, and should be several times the
residuals, so that it hides what no latent can mend: how sharp images are. With `--noise fitted` σ is
that of the residuals of images that heads and energies do not see, and data stay as they are; with
`--noise none` there is none. Of both the energy may learn sharpness, and its chains go to whatever
comes out sharpest, so that D falls and rises again.

`gap_closed` is 0 for the VAE's own prior and 1 for decoded posterior samples, with an interval over 5
generations and a resampled reference; `fd_cut` is the share of the VAE's Fréchet distance that is
gone. `over_alone` is the paired difference in gap closed of both together to the better of the two
alone.

The second table is out-of-distribution detection by unnormalised log-density, as AUROC against test
images, with DeLong's intervals: log p_VAE(x) is an IWAE bound, see ncprior.evaluation. Scores of an energy
of noisy data are means over the noise. `over the VAE` is the paired difference of the means.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Bench, Row, machine, parser, table, with_settings
from clock import now
from hole_cases import Case, image_file, make_case, save_images, slug
from hole_methods import BATCH, Heads, Stopwatch, on_images
from ood_sets import outside
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent

from ncprior import NCPrior, sir
from ncprior.bases import Rebased, rebase
from ncprior.demo import in_batches, plot_samples
from ncprior.evaluation import (
    GapClosed,
    auroc,
    auroc_gain,
    gap_closed,
    gap_difference,
    ood_score,
    precision_recall,
)
from ncprior.samplers import Sampler, within_components
from ncprior.saving import write_atomically
from ncprior.utils import fast_precision
from ncprior.vaebm import VAEBM, EnergyNet, EnergySettings, GaussianDecoder, fit_vaebm

COLUMNS = {
    "method": "<11",
    "dataset": "<8",
    "steps": ">5",
    "seed": ">4",
    "fd": ">7.2f",
    "fd_cut": ">7.3f",
    "gap_closed": ">10.3f",
    "gap_low": ">7.3f",
    "gap_high": ">8.3f",
    "over_alone": ">10.3f",
    "over_low": ">8.3f",
    "over_high": ">9.3f",
    "precision": ">9.3f",
    "recall": ">6.3f",
    "fit_seconds": ">11.0f",
    "seconds_per_1k": ">14.2f",
}
GENERATIONS = 5
LENGTHS = (4, 8, 16, 24)  # at which chains are looked at
MAIN = 16  # the length that energies are trained with, and the paper's
SETTINGS: dict[str, dict[str, Any]] = {  # of the energy and its chains, and of NCP below it
    "digits": {
        "width": 16,
        "steps": 1000,
        "learning_rate": 1e-3,
        "step_size": 0.05,
        "noise": "0.12",
        "count": 2000,
        "base": "",
    },
    "mnist": {
        "width": 24,
        "steps": 600,
        "learning_rate": 3e-4,
        "step_size": 0.1,
        "noise": "0.4",
        "count": 10_000,
        "base": "",
    },
    "cifar10": {
        "width": 32,
        "steps": 300,
        "learning_rate": 1e-3,
        "step_size": 0.1,
        "noise": "0.3",
        "count": 2000,
        "base": "mixture of 10",
    },
}
TRAINING = {"batch_size": 64, "spectral_weight": 0.002, "ema_decay": 0.99}
PRECISION = fast_precision("cpu")  # of chains and training
# Of quick runs. Their VAEs of digits and of CIFAR-10 are blurrier, which a larger σ hides.
QUICK: dict[str, dict[str, Any]] = {
    "digits": {"steps": 300, "noise": "0.3", "count": 700},
    "mnist": {"steps": 120, "learning_rate": 1e-3, "count": 700},
    "cifar10": {"steps": 60, "learning_rate": 2e-3, "noise": "0.5", "count": 350},
}
Drawn = Mapping[str, Tensor]


class Comparison:
    """All arms on one case and one seed."""

    def __init__(self, bench: Bench, case: Case, seed: int, samples: Path | None) -> None:
        self.bench, self.case, self.seed, self.samples = bench, case, seed, samples
        torch.manual_seed(seed)
        case.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.source: Any = on_images(case, likelihood=partial(_pixels, case.vae))
        noise, self.data_noise = bench.settings["noise"], 0.0
        if noise == "fitted":
            self.source = GaussianDecoder.fitted(self.source, case.images[-case.num_held_out :])
        elif noise != "none":
            self.data_noise = float(noise)
            self.source = GaussianDecoder(self.source, self.data_noise)
        trained = Heads(bench).on(case, seed, bench.settings["base"])
        self.prior, self.head_seconds = self._on_images(trained.prior), trained.seconds
        self.sampler: Sampler = partial(sir, num_proposals=bench.settings["num_proposals"])
        if bench.settings["base"]:
            self.sampler = within_components(self.sampler)
        self.energies = {
            "VAEBM": self._energy("alone", self.source, None),
            "NCP×VAEBM": self._energy("on-ncp", self.prior, self.sampler),
        }

    def rows(self) -> list[Row]:
        """One row per method and number of steps; the main ones with their AUROC."""
        drawn = {name: self._drawn(name) for name in ("VAE", "posterior", "NCP", *self.energies)}
        gaps = {
            (name, steps): self._gap(found[f"features{steps}"], drawn)
            for name, found in drawn.items()
            for steps in self._lengths(name)
        }
        alone = max((gaps["NCP", 0], gaps["VAEBM", MAIN]), key=lambda gap: gap.gap_closed)
        areas, gains = self._areas()
        rows = []
        for (name, steps), gap in gaps.items():
            features = drawn[name][f"features{steps}"][0]
            judged = precision_recall(self.case.reference[:5000], features[:5000])
            row = {
                "method": name,
                "steps": steps,
                "fd": gap.d_ours,
                "fd_cut": 1 - gap.d_ours / gap.d_base,
                "gap_closed": gap.gap_closed,
                "gap_low": gap.low,
                "gap_high": gap.high,
                "precision": judged.precision,
                "recall": judged.recall,
                "fit_seconds": self._fit_seconds(name),
                "seconds_per_1k": drawn[name][f"seconds{steps}"].item(),
            }
            if name == "NCP×VAEBM":
                over = gap_difference(gap, alone)
                row |= {
                    "over_alone": over.difference,
                    "over_low": over.low,
                    "over_high": over.high,
                }
            if steps == self._main(name) and name in areas:
                row |= {"auroc": areas[name], "auroc_gain": gains[name]}
            rows.append(row)
        return rows

    def save_picture(self, file: Path) -> None:
        """The same chains after more and more steps, of the energy alone and of that on NCP."""
        rows = {}
        for name in self.energies:
            torch.manual_seed(self.seed)
            for steps, x in self._chains(name, 10, (0, *LENGTHS)):
                rows[f"{name}, {steps} steps"] = x.clamp(0, 1)
        with write_atomically(file) as temporary:
            plot_samples(rows).savefig(temporary, format="png", dpi=70)

    def _on_images(self, prior: NCPrior) -> NCPrior:
        """The heads on the VAE as a source of images, with its decoder's noise."""
        source = self.source
        if isinstance(prior.source, Rebased):
            source = rebase(source, prior.source.prior)
        found = NCPrior(source, prior.heads).eval()
        found.precision = prior.precision
        return found

    def _energy(self, kind: str, prior: Any, sampler: Sampler | None) -> tuple[VAEBM, float]:  # noqa: ANN401
        """A trained model and its seconds; trained, taken up, or taken from the cache."""
        bench, case = self.bench, self.case
        asked = (
            "noise",
            "base",
            "width",
            "step_size",
            "energy_steps",
            "num_proposals",
            "training",
            "precision",
        )
        key = json.dumps({name: bench.settings[name] for name in asked})
        digest = hashlib.sha256(key.encode()).hexdigest()[:8] + "-quick" * case.quick
        folder = bench.cache / f"vaebm-{case.name}-{kind}-{self.seed}-{digest}"
        clock = Stopwatch(folder / "so-far")
        if not (folder / "seconds").exists():
            torch.manual_seed(self.seed)
            net = EnergyNet(case.images.shape[1:], width=bench.settings["width"])
            model = VAEBM(
                *(prior, net),
                num_steps=MAIN,
                step_size=bench.settings["step_size"],
                data_noise=self.data_noise,
                precision=PRECISION,
            )
            history = fit_vaebm(
                *(model, case.images[: -case.num_held_out]),
                steps=bench.settings["energy_steps"],
                sampler=sampler,
                checkpoint=folder / "training.safetensors",
                checkpoint_every=50,
                callback=clock.note,
                **with_settings(EnergySettings, bench.settings["training"]),
            )
            model.save_pretrained(folder)
            (folder / "history.txt").write_text(str(history), encoding="utf-8")
            (folder / "seconds").write_text(str(clock.seconds), encoding="utf-8")
        print(f"{folder.name}: {(folder / 'history.txt').read_text(encoding='utf-8')}", flush=True)
        model = VAEBM.from_pretrained(prior, folder)
        model.precision = PRECISION
        return model, float((folder / "seconds").read_text())

    @staticmethod
    def _main(name: str) -> int:
        return MAIN if "VAEBM" in name else 0

    def _lengths(self, name: str) -> tuple[int, ...]:
        return LENGTHS if "VAEBM" in name else (0,)

    def _fit_seconds(self, name: str) -> float:
        seconds = self.head_seconds if "NCP" in name else 0.0
        return seconds + (self.energies[name][1] if name in self.energies else 0.0)

    def _drawn(self, name: str) -> Drawn:
        """Features of every generation at every length, and seconds per 1,000; once."""
        key = slug(f"vaebm-{self.case.name}-{name}-{self.seed}-drawn")
        make = partial(self._draw, name)
        if self.samples is not None and not self._file(name).exists():
            return make()
        return self.bench.tensors(key, make, **self.bench.settings)[0]

    def _draw(self, name: str) -> dict[str, Tensor]:
        count, lengths = self.bench.settings["count"], self._lengths(name)
        features: dict[int, list[Tensor]] = {steps: [] for steps in lengths}
        seconds, images = dict.fromkeys(lengths, 0.0), []
        for generation in range(GENERATIONS):
            torch.manual_seed(1000 * self.seed + generation)
            parts: dict[int, list[Tensor]] = {steps: [] for steps in lengths}
            for part in torch.empty(count).split(BATCH):
                started = now()
                for steps, x in self._batch(name, len(part)):
                    seconds[steps] += now() - started
                    parts[steps].append(in_batches(self.case.features, x.clamp(0, 1)))
                    started = now()
                    if steps == self._main(name):
                        images.append(x)
            for steps in lengths:
                features[steps].append(torch.cat(parts[steps]))
        if self.samples is not None:
            save_images(self._file(name), list(torch.cat(images).chunk(GENERATIONS)))
        print(f"{name}, seed {self.seed}: drawn in {sum(seconds.values()):.0f} s", flush=True)
        found = {f"features{steps}": torch.stack(features[steps]) for steps in lengths}
        spent = np.cumsum([seconds[steps] for steps in lengths]) * 1000 / (GENERATIONS * count)
        return found | {
            f"seconds{steps}": torch.tensor(float(s))
            for steps, s in zip(lengths, spent, strict=True)
        }

    def _batch(self, name: str, count: int) -> Any:  # noqa: ANN401
        """Yields images at every length of a method's chains."""
        if name == "posterior":
            yield 0, self.case.posterior(count)[0]
        elif name == "NCP":
            yield 0, self.prior.sample(count, self.sampler).x
        elif name == "VAE":
            yield 0, self.energies["VAEBM"][0].sample(count, num_steps=0).mean
        else:
            yield from self._chains(name, count, LENGTHS)

    def _chains(self, name: str, count: int, lengths: tuple[int, ...]) -> Any:  # noqa: ANN401
        """Yields the means of the same chains after every number of steps."""
        model, _ = self.energies[name]
        noise = model.draw_noise(count, sampler=None if model.prior is None else self.sampler)
        taken = 0
        for steps in lengths:
            chains = model.run_chains(noise, num_steps=steps - taken)
            noise, taken = chains.noise, steps
            yield steps, chains.mean

    def _gap(self, features: Tensor, drawn: Mapping[str, Drawn]) -> GapClosed:
        base, posterior = (list(drawn[name]["features0"]) for name in ("VAE", "posterior"))
        return gap_closed(self.case.reference, base=base, ours=list(features), posterior=posterior)

    def _areas(self) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]]]:
        """AUROC with its interval, by method and set; by method, the mean gain over the VAE."""
        settings = self.bench.settings
        inside = self.case.test_images[-settings["ood_count"] :]
        sets = {"inside": inside}
        sets |= outside(self.case.name, self.case.test_images, settings["ood_count"])
        scores = {name: self._scores(name, images) for name, images in sets.items()}
        own = scores.pop("inside")
        others = {method: [found[method] for found in scores.values()] for method in own}
        areas = {
            method: {
                name: list(auroc(own[method], found)[:3])
                for name, found in zip(scores, others[method], strict=True)
            }
            for method in own
        }
        gain = partial(auroc_gain, than=(own["VAE"], others["VAE"]))
        return areas, {method: list(gain(own[method], others[method])[:3]) for method in own}

    def _scores(self, name: str, images: Tensor) -> Mapping[str, Tensor]:
        """Scores of one set of images, by method; once."""
        key = slug(f"vaebm-{self.case.name}-{name}-{self.seed}-scores")
        return self.bench.tensors(key, partial(self._score, images), **self.bench.settings)[0]

    def _score(self, images: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(self.seed)
        score = partial(ood_score, data=images, num_samples=self.bench.settings["iwae"])
        alone, both = (score(model) for model, _ in self.energies.values())
        return {
            "VAE": alone.vae,
            "NCP": both.vae + both.ncp,
            "VAEBM": alone.total,
            "NCP×VAEBM": both.total,
        }

    def _file(self, name: str) -> Path:
        return image_file(self.samples or Path(), self.case.name, name, self.seed)


def _pixels(vae: Any, z: Tensor) -> Distribution:  # noqa: ANN401
    """Pixels as shares of black: a law without a location and a scale, so that x is its mean."""
    probs = vae.decode(z).clamp(1e-6, 1 - 1e-6)
    return Independent(Bernoulli(probs, validate_args=False), 3)


def area_table(rows: list[Row]) -> str:
    """AUROC by method, one column per set."""
    lines, found = [], [row for row in rows if row.get("auroc")]
    for row in found:
        areas = row["auroc"]
        mean = sum(area[0] for area in areas.values()) / len(areas)
        cells = {name: _interval(area) for name, area in areas.items()}
        cells |= {"mean": f"{mean:.3f}", "over the VAE": _interval(row["auroc_gain"])}
        lines.append({"method": row["method"], "seed": row["seed"], **cells})
    columns = {"method": "<11", "seed": ">4", **dict.fromkeys(found[0]["auroc"], ">22")}
    return table(lines, {**columns, "mean": ">6", "over the VAE": ">22"})


def _interval(area: Sequence[float]) -> str:
    value, low, high = area
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def with_options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("--data", choices=list(SETTINGS), default="mnist")
    made.add_argument(
        "--noise", type=_noise, metavar="SIGMA", help="of the decoder: a number, fitted, or none"
    )
    made.add_argument(
        "--base",
        choices=["", "mixture of 10", "mixture of 100"],
        help="of NCP, the VAE's own if empty (of cifar10: mixture of 10)",
    )
    made.add_argument(
        "--proposals", type=int, metavar="M", help="of NCP's SIR (500; on a mixture 50)"
    )
    made.add_argument("--step-size", type=float, help="λ of the chains")
    made.add_argument("--energy-steps", type=int, metavar="N", help="training steps of an energy")
    made.add_argument(
        "--samples", type=Path, metavar="DIR", help="write every arm's images, (5, N, C, H, W)"
    )
    made.add_argument("--picture", type=Path, metavar="FILE", help="draw chains into this PNG")
    return made


def _noise(given: str) -> str:
    """What --noise takes; argparse says the rest."""
    if given in ("fitted", "none"):
        return given
    try:
        is_sigma = float(given) > 0
    except ValueError:
        is_sigma = False
    if not is_sigma:
        raise argparse.ArgumentTypeError(f"needs a σ above 0, fitted or none; got {given!r}")
    return given


def settings_of(options: argparse.Namespace) -> Row:
    """What rows of one file have in common."""
    own, quick = SETTINGS[options.data], options.quick
    training = TRAINING
    if quick:
        own = {**own, "width": 16, **QUICK[options.data]}
        training = {**TRAINING, "ema_decay": 0.95}
    base = own["base"] if options.base is None else options.base
    return {
        "data": options.data,
        "noise": options.noise or own["noise"],
        "base": base,
        "count": own["count"],
        "width": own["width"],
        "step_size": options.step_size or own["step_size"],
        "energy_steps": options.energy_steps or own["steps"],
        "num_proposals": options.proposals or (50 if base else 100 if quick else 500),
        "ood_count": 200 if quick else 1000,
        "iwae": 8 if quick else 64,
        "training": {**training, "learning_rate": own["learning_rate"]},
        "precision": str(PRECISION),
        "lengths": list(LENGTHS),
    }


def main() -> None:
    options = with_options(parser(__doc__)).parse_args()
    settings = settings_of(options)
    bench = Bench(options, settings)
    case = make_case(bench, options.data, "flat")
    print(f"{machine()}; {settings}; {case.facts}", flush=True)
    for seed in options.seed:
        picture = options.picture if seed == options.seed[0] else None
        if picture is not None or not any(row["seed"] == seed for row in bench.rows):
            compared = Comparison(bench, case, seed, options.samples)
            print(compared.source, flush=True)
            if picture is not None:
                compared.save_picture(picture)
            bench.add(compared.rows, dataset=options.data, seed=seed)
    print(f"\n{table(bench.rows, COLUMNS)}\n\n{area_table(bench.rows)}")


if __name__ == "__main__":
    main()
