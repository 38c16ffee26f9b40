"""Where will a pedestrian go? A conditional VAE of trajectories, and a ratio head that sees the past.

    NCPRIOR_DATA=... python examples/trajectories.py           # about 20 minutes, five test scenes
    NCPRIOR_DATA=... python examples/trajectories.py --quick   # 2 minutes, one test scene

The data are the ETH and UCY recordings with 2.5 positions per second, as text files of the
repository StanfordASL/Trajectron-plus-plus (MIT licence). The script reads
``$NCPRIOR_DATA/eth_ucy/*.txt``; without that variable it downloads the files once into --cache. As in
the literature, 8 positions (3.2 s) are seen and 12 (4.8 s) are predicted, and a VAE is tested on the
one scene that it was not trained on.

q(z | future, past), p(future | z, past) and p(z | past) are perceptrons; with `--prior standard`,
p(z | past) is N(0, I), as in many conditional VAEs. The arms have the same frozen VAE and as many
draws:

* ``prior``: p(z | past) of the VAE;
* ``mixture``: ten Gaussians fitted to encodings of training rows; they do not see the past;
* ``NCP``: one call of `improve`, which chooses base, heads and sampler by held-out pedestrians of the
  training scenes; the head sees the VAE's embedding of the past;
* ``posterior (training rows)``, ``posterior (held-out rows)``: encodings of random rows of the training
  scenes or of the test scene, decoded with another past: what the mixture is to imitate;
* ``posterior (own future)``: q(z | future, past) has seen the answer. It shows what the decoder can do.

minADE and minFDE are the mean and the last distance to the true future in metres, of the best of 20
draws. KDE-NLL is the negative log-likelihood of the true positions in nats, under a kernel density
estimate of 200 draws. `gain` is the paired gain in KDE-NLL over the VAE's prior. `copies` is the share
of drawn futures that are as close to a training future as the closest 5 % of reconstructed test rows.
Intervals are from a bootstrap over pedestrians; those of `copies` take rows as independent.
"""

import argparse
import math
import os
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarks.bench import Bench, machine, parser, table
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    kl_divergence,
)
from torch.utils.data import TensorDataset

from ncprior import NCPrior, SingleGroup, improve
from ncprior.bases import fit_mixture, latents_of
from ncprior.evaluation import near_copies
from ncprior.saving import write_atomically
from ncprior.utils import train

URL = (
    "https://raw.githubusercontent.com/StanfordASL/Trajectron-plus-plus/"
    "1031c7bd1a444273af378c1ec1dcca907ba59830/experiments/pedestrians/raw/raw/all_data/"
)
SCENES = {
    "eth": ("biwi_eth",),
    "hotel": ("biwi_hotel",),
    "univ": ("students001", "students003"),
    "zara1": ("crowds_zara01",),
    "zara2": ("crowds_zara02",),
}
FILES = (*(file for files in SCENES.values() for file in files), "crowds_zara03", "uni_examples")
PAST, FUTURE = 8, 12
BEST_OF, DRAWS = 20, 200
PRIOR = "prior"


class Windows(NamedTuple):
    """Pasts ``(N, 8, 2)`` and futures ``(N, 12, 2)`` in metres, and numbers of the pedestrians.

    The last seen position is the origin, and the last seen heading the first axis.
    """

    past: Tensor
    future: Tensor
    pedestrian: Tensor

    def rows(self, index: Tensor) -> "Windows":
        """Returns some rows."""
        return Windows(*(part[index] for part in self))


def read(file: str, folder: Path) -> Path:
    """Returns the path of a recording, which is downloaded if it is not in the folder."""
    path = folder / f"{file}.txt"
    if not path.is_file():
        print(f"downloads {URL}{path.name} to {folder}")
        try:
            with urllib.request.urlopen(f"{URL}{path.name}") as answer:
                recording = answer.read()
        except OSError as error:
            raise SystemExit(
                f"{path} is missing and cannot be downloaded ({error}). Put the files "
                f"{', '.join(f'{name}.txt' for name in FILES)} of {URL} into $NCPRIOR_DATA/eth_ucy."
            ) from None
        with write_atomically(path) as temporary:
            temporary.write_bytes(recording)
    return path


def windows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All 20 positions in a row of one pedestrian, ``(N, 20, 2)``, and the pedestrians' numbers."""
    frames = np.loadtxt(path)  # frame, pedestrian, x, y
    found, owners, length = [], [], PAST + FUTURE
    for pedestrian in np.unique(frames[:, 1]):
        track = frames[frames[:, 1] == pedestrian]
        track = track[track[:, 0].argsort()]
        for part in (track[i : i + length] for i in range(len(track) - length + 1)):
            if part[-1, 0] - part[0, 0] == 10 * (length - 1):  # no gap; a step is 10 frames
                found.append(part[:, 2:])
                owners.append(pedestrian)
    return np.array(found), np.array(owners)


def load(files: tuple[str, ...], folder: Path) -> Windows:
    """The windows of several recordings."""
    found = [windows(read(file, folder)) for file in files]
    xy = torch.from_numpy(np.concatenate([part for part, _ in found])).float()
    owners = [1000 * i + owner for i, (_, owner) in enumerate(found)]
    xy = xy - xy[:, PAST - 1 : PAST]
    step = xy[:, PAST - 1] - xy[:, PAST - 4]
    angle = torch.atan2(step[:, 1], step[:, 0])
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    xy = torch.einsum("nij,ntj->nti", turn, xy)
    return Windows(xy[:, :PAST], xy[:, PAST:], torch.from_numpy(np.concatenate(owners)).long())


class TrajectoryVAE(nn.Module):
    """q(z | x, c), p(x | z, c) and p(z | c) of futures x and pasts c."""

    def __init__(self, *, latents: int = 8, width: int = 128, learned: bool = True) -> None:
        super().__init__()
        self.latents, self.learned = latents, learned
        self.to_embedding = _mlp(2 * PAST, width, 64)
        self.to_prior = _mlp(64, width, 2 * latents)
        self.to_posterior = _mlp(64 + 2 * FUTURE, width, 2 * latents)
        self.to_steps = _mlp(64 + latents, width, 2 * FUTURE)
        self.log_sd = nn.Parameter(torch.full((FUTURE, 1), -1.0))

    def embed(self, c: Tensor) -> Tensor:
        """Returns the embedding of pasts, ``(B, 64)``."""
        return self.to_embedding(c.flatten(1))

    def prior(self, c: Tensor) -> Distribution:
        """Returns p(z | c)."""
        h = self.to_prior(self.embed(c))
        return _normal(h if self.learned else torch.zeros_like(h))

    def posterior(self, x: Tensor, c: Tensor) -> Distribution:
        """Returns q(z | x, c)."""
        return _normal(self.to_posterior(torch.cat([self.embed(c), x.flatten(1)], 1)))

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """Returns the mean of p(x | z, c), ``(B, 12, 2)``."""
        steps = self.to_steps(torch.cat([self.embed(c), z], 1))
        return steps.unflatten(1, (FUTURE, 2)).cumsum(1)

    def negative_elbo(self, x: Tensor, c: Tensor) -> Tensor:
        """Returns the negative ELBO in nats, a scalar."""
        q = self.posterior(x, c)
        mean = self.decode(q.rsample(), c)
        p_x = Independent(Normal(mean, self.log_sd.exp().expand_as(mean)), 2)
        return (kl_divergence(q, self.prior(c)) - p_x.log_prob(x)).mean()

    def source(self) -> SingleGroup:
        """The VAE as a source: a batch is (future, past), and the head sees the embedding."""
        standard = Independent(Normal(torch.zeros(self.latents), torch.ones(self.latents)), 1)
        return SingleGroup(
            self.prior if self.learned else standard,
            self.posterior,
            self.decode,
            module=self,
            condition=lambda batch: batch[1],
            context=self.embed,
        )


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
        nn.Linear(width, outputs),
    )


def _normal(h: Tensor) -> Distribution:
    mean, log_var = h.chunk(2, dim=1)
    return Independent(Normal(mean, (0.5 * log_var.clamp(-10, 5)).exp()), 1)


def nll_of_kde(drawn: Tensor, x: Tensor) -> Tensor:
    """Mean negative log-likelihood of true positions in nats, ``(B,)``, by Scott's rule.

    As in Trajectron++, each time has an estimate of its own, and log-likelihoods are at least -20.
    """
    count = len(drawn)
    off = drawn - drawn.mean(0)
    covariance = torch.einsum("nbti,nbtj->btij", off, off) / (count - 1)
    covariance = (covariance + 1e-4 * torch.eye(2)) * count ** (-1 / 3)
    kernel = MultivariateNormal(torch.zeros(2), covariance)
    log_p = torch.stack([kernel.log_prob(x - one) for one in drawn]).logsumexp(0)
    return -(log_p - math.log(count)).clamp(min=-20).mean(1)


@torch.no_grad()
def scores(vae: TrajectoryVAE, test: Windows, draw: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Scores of every test row, ``(B,)``, and the first drawn futures."""
    drawn = torch.stack([vae.decode(draw(), test.past) for _ in range(DRAWS)])
    distance = (drawn[:BEST_OF] - test.future).norm(dim=-1)
    return {
        "minADE": distance.mean(-1).amin(0),
        "minFDE": distance[..., -1].amin(0),
        "KDE-NLL": nll_of_kde(drawn, test.future),
        "drawn": drawn[0],
    }


def interval(values: Tensor, owners: Tensor) -> tuple[float, float, float]:
    """The mean of all rows with its 95 % interval, by a bootstrap over pedestrians."""
    _, owner = owners.unique(return_inverse=True)
    sums = torch.zeros(int(owner.max()) + 1).index_add_(0, owner, values)
    counts = torch.zeros_like(sums).index_add_(0, owner, torch.ones_like(values))
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(sums), (2000, len(sums)), generator=generator)
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return values.mean().item(), low, high


def with_intervals(name: str, values: Tensor, owners: Tensor) -> dict[str, float]:
    """A score as columns of a row."""
    value, low, high = interval(values, owners)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def encodings(source: SingleGroup, of: Windows, count: int) -> Callable[[], Tensor]:
    """Draws encodings of random rows."""
    z = latents_of(source, TensorDataset(of.future, of.past))
    return lambda: z[torch.randint(len(z), (count,))]


def arms_of(
    vae: TrajectoryVAE, prior: NCPrior, fit_to: Windows, test: Windows
) -> dict[str, Callable[[], Tensor]]:
    """The arms: functions that draw one z for every test row."""
    source, count = vae.source(), len(test.past)
    mixture = fit_mixture(latents_of(source, TensorDataset(fit_to.future, fit_to.past)), 10)
    return {
        PRIOR: lambda: vae.prior(test.past).sample(),
        "mixture": lambda: mixture.sample((count,)),
        "NCP": lambda: prior.sample(count, condition=test.past).latents[0],
        "posterior (training rows)": encodings(source, fit_to, count),
        "posterior (held-out rows)": encodings(source, test, count),
        "posterior (own future)": lambda: vae.posterior(test.future, test.past).sample(),
    }


def measured(
    vae: TrajectoryVAE, prior: NCPrior, fit_to: Windows, test: Windows
) -> list[dict[str, Any]]:
    """One row for every arm."""
    found = {
        name: scores(vae, test, draw) for name, draw in arms_of(vae, prior, fit_to, test).items()
    }
    reconstructed = found["posterior (own future)"]["drawn"]
    rows = []
    for name, score in found.items():
        copies = near_copies(fit_to.future, reconstructed, score["drawn"])
        gain = found[PRIOR]["KDE-NLL"] - score["KDE-NLL"]
        columns = {"minADE": score["minADE"], "minFDE": score["minFDE"]}
        columns |= {"KDE-NLL": score["KDE-NLL"], "gain": gain}
        row: dict[str, Any] = {"method": name}
        for column, values in columns.items():
            row |= with_intervals(column, values, test.pedestrian)
        row |= {"copies": copies.share, "copies_low": copies.low, "copies_high": copies.high}
        rows.append(row)
    return rows


def scene_rows(options: argparse.Namespace, bench: Bench, scene: str, seed: int) -> list[Any]:
    """Trains a VAE without one scene, improves its prior, and measures all arms on that scene."""
    torch.manual_seed(seed)
    folder = options.data
    others = load(tuple(file for file in FILES if file not in SCENES[scene]), folder)
    test = load(SCENES[scene], folder)
    test = test.rows(torch.randperm(len(test.past))[: options.most_test])
    held_out = others.pedestrian % 8 == torch.randint(8, ())  # whole pedestrians
    fit_to, choose = others.rows(~held_out), others.rows(held_out)
    fit_to = fit_to.rows(torch.randperm(len(fit_to.past))[: options.most_rows])
    vae = TrajectoryVAE(learned=options.prior == "learned")

    def fit_vae() -> None:
        train(
            vae,
            lambda rows: vae.negative_elbo(fit_to.future[rows], fit_to.past[rows]),
            len(fit_to.past),
            steps=options.steps,
            batch_size=256,
            learning_rate=1e-3,
            name=f"VAE without {scene}",
        )

    name = f"trajectories-{options.prior}-{scene}-{seed}"
    bench.network(name, vae, fit_vae, steps=options.steps, rows=len(fit_to.past))
    prior = improve(
        vae.source(),
        TensorDataset(fit_to.future, fit_to.past),
        held_out=TensorDataset(choose.future, choose.past),
        max_seconds=options.seconds,
        seed=seed,
    )
    report: Any = prior.report
    base = next(choice.chosen for choice in report.choices if choice.part == "base")
    rows = measured(vae, prior, fit_to, test)
    for row in rows:
        row["seconds"] = report.seconds if row["method"] == "NCP" else None
        row["base"] = base if row["method"] == "NCP" else None
    return rows


def averaged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean of each arm over scenes; intervals of independent scenes."""
    means: list[dict[str, Any]] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        mean: dict[str, Any] = {"method": method}
        for name in ("minADE", "minFDE", "KDE-NLL", "gain", "copies"):
            value = sum(row[name] for row in own) / len(own)
            squares = sum((row[f"{name}_high"] - row[f"{name}_low"]) ** 2 for row in own)
            half = math.sqrt(squares) / 2 / len(own)
            mean |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
        seconds = [row["seconds"] for row in own if row["seconds"] is not None]
        mean["seconds"] = sum(seconds) if seconds else None
        means.append(mean)
    return means


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the script."""
    made = parser(__doc__)
    made.add_argument("--prior", choices=["learned", "standard"], default="learned")
    made.add_argument("--scenes", nargs="+", choices=[*SCENES], default=[*SCENES], metavar="NAME")
    options = made.parse_args(arguments)
    options.steps, options.seconds, options.most_test = 4000, 120.0, 2000
    options.most_rows = 10**6
    if options.quick:
        options.scenes = options.scenes[-2:-1] or options.scenes
        options.steps, options.seconds, options.most_test, options.most_rows = 600, 40.0, 500, 8000
    root = os.environ.get("NCPRIOR_DATA")
    options.data = Path(root) / "eth_ucy" if root else options.cache / "eth_ucy"
    return options


def main() -> None:
    options = options_of()
    bench = Bench(options, {"prior": options.prior, "steps": options.steps})
    columns = {"scene": "<6", "seed": ">4d", "method": "<26", "minADE": ">7.3f", "minFDE": ">7.3f"}
    columns |= {"KDE-NLL": ">8.3f", "gain": ">7.3f", "gain_low": ">9.3f", "gain_high": ">10.3f"}
    columns |= {"copies": ">7.3f", "seconds": ">8.0f", "base": "<12"}
    for seed in options.seed:
        rows = []
        for scene in options.scenes:
            make = partial(scene_rows, options, bench, scene, seed)
            rows += bench.add(make, scene=scene, seed=seed)
        if len(options.scenes) == len(SCENES):
            bench.add(partial(averaged, rows), scene="all", seed=seed)
    print(table(bench.rows, columns))
    print(machine())


if __name__ == "__main__":
    main()
