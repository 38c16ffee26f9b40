"""Speed of training against the straightforward loop, to the same held-out loss.

    NCPRIOR_DATA=... python examples/benchmarks/training_speed.py --json training.json
    python examples/benchmarks/training_speed.py --quick        # about 10 minutes
    python examples/benchmarks/training_speed.py --device cuda

The straightforward loop takes every batch through the VAE anew, and has one AdamW per group; its
schedule, clipping, averaged weights and held-out losses are those of `fit`. `ratio` is its time over
ours to the larger of the two least held-out losses, what is done once included, in time of the core
with one thread. `train-flat`: a convolutional VAE on MNIST with 16 latents, ours in the precision
that is faster on the device; `train-flat-fp32` in float32. `train-hierarchical`: ten groups of latents, the faster
precision, walks shared for ten epochs; `walk-epochs-E` shares them for E epochs in float32, and `loss_cost` is what
that adds to the held-out loss in nats. `gain-95`: seconds to 95 % of the final gain in held-out loss.
`groups-K`: heads alone; `processes-N`: N processes of one thread, steps of 1,024
rows in all, on the clock: leave the machine to it.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from bench import Bench, Row, machine, parser, table
from clock import Contender, add_device, by_turns, now, peak_mib
from hierarchical_nll import Table6, settings_for
from sampler_cost import Table8
from sampling_speed import Ladder
from torch import Tensor, nn

from ncprior import NCETrainer, NCPrior, SingleGroup, fit
from ncprior.data import CachedGroupsSource
from ncprior.demo import VAE, read_images
from ncprior.distributions import parameters
from ncprior.heads import MLPHead
from ncprior.source import LatentSource
from ncprior.training import FitSettings
from ncprior.utils import fast_precision

COLUMNS = {
    "name": "<24",
    "seed": ">4",
    "seconds": ">8.1f",
    "baseline_seconds": ">16.1f",
    "ratio": ">6.2f",
    "held_out": ">9.4f",
    "baseline_held_out": ">17.4f",
    "loss_cost": ">9.4f",
    "ms_per_step": ">11.2f",
    "peak_mib": ">8.1f",
    "baseline_peak_mib": ">17.1f",
}
Curve = list[tuple[float, float]]  # seconds, held-out loss: the mean over groups


@torch.no_grad()
def held_out_loss(prior: NCPrior, held_out: Tensor, batch: int, seed: int) -> float:
    """Mean held-out NCE loss over groups, with the draws of z that fit makes of the same seed."""
    total, passes = 0.0, math.ceil(2048 / len(held_out))
    with torch.random.fork_rng(devices=[held_out.device] if held_out.is_cuda else []):
        torch.manual_seed(seed)
        for _ in range(passes):
            for x in held_out.split(batch):
                total += len(x) * float(prior.nce_loss(x).double().mean())
    return total / (passes * len(held_out))


def straightforward(
    prior: NCPrior, images: Tensor, held_out: Tensor, *, steps: int, eval_every: int, batch: int
) -> Curve:
    """The loop that ours is measured against."""
    seed = int(torch.randint(2**31, ()))  # as fit draws it: the same held-out draws
    optimizers = [torch.optim.AdamW(head.parameters(), 1e-3) for head in prior.heads]
    average = {name: t.clone() for name, t in prior.heads.state_dict().items()}
    curve, started = [], now(held_out.device.type)
    prior.train()
    for step in range(steps):
        x = images[torch.randint(len(images), (batch,))].to(held_out.device)
        losses = prior.group_losses(x, 1.0, 1)
        for head, optimizer, loss in zip(prior.heads, optimizers, losses, strict=True):
            rate = min(1.0, (step + 1) / 100, 5 * (steps - step) / steps)  # warm-up and decay
            optimizer.param_groups[0]["lr"] = 1e-3 * rate
            optimizer.zero_grad()
            loss.total.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 5.0)
            optimizer.step()
        decay = min(0.999, (2 + step) / (11 + step))
        for name, tensor in prior.heads.state_dict().items():
            average[name].lerp_(tensor, 1 - decay)
        if (step + 1) % eval_every == 0:
            kept = {name: t.clone() for name, t in prior.heads.state_dict().items()}
            prior.heads.load_state_dict(average)
            mean_loss = held_out_loss(prior, held_out, batch, seed)
            prior.heads.load_state_dict(kept)
            curve.append((now(held_out.device.type) - started, mean_loss))
    return curve


def ours(
    prior: NCPrior,
    images: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    eval_every: int,
    batch: int,
    **options: Any,  # noqa: ANN401
) -> Curve:
    """fit, with its history in the same clock."""
    curve: Curve = []
    started = now(held_out.device.type)

    def keep(row: Any) -> None:  # noqa: ANN401
        curve.append((now(held_out.device.type) - started, sum(row.held_out) / len(row.held_out)))

    fit(
        *(prior, images),
        held_out=held_out,
        steps=steps,
        batch_size=batch,
        patience=None,
        callback=keep,
        progress=False,
        eval_every=eval_every,
        settings=FitSettings(**options),
    )
    return curve


def seconds_to(curve: Curve, loss: float) -> float:
    """The time at which a held-out loss was first reached."""
    return next(spent for spent, found in curve if found <= loss)


class Speed:
    """Rows of one machine."""

    def __init__(self, bench: Bench, device: torch.device) -> None:
        self.bench, self.settings, self.device = bench, bench.settings, device
        self.curves: dict[str, Curve] = {}

    def data(self, grey: bool) -> tuple[Tensor, Tensor]:
        """Images to train on, and 3,000 to stop by; grey, or binary once and for all."""
        torch.manual_seed(0)
        try:
            images = read_images("ylecun/mnist", "train").images
        except FileNotFoundError as error:
            raise SystemExit(str(error)) from None
        images = images[torch.randperm(len(images))]
        images = images if grey else images.bernoulli()
        return images[3000:], images[:3000].to(self.device)

    def source(self, kind: str) -> LatentSource[Any, Any]:
        """The frozen VAE, trained here or taken from --cache."""
        if kind == "flat":
            train, test = (read_images("ylecun/mnist", part) for part in ("train", "test"))
            torch.manual_seed(0)
            shuffled = train.rows(torch.randperm(len(train.labels)))
            return Table8(self.bench, shuffled, test).vae.to(self.device).source()
        images, held_out = self.data(grey=False)
        data: Any = argparse.Namespace(train=images, held_out=held_out)
        return Table6(self.bench, data).vae[0]

    def curve(self, kind: str, how: str, seed: int) -> Curve:
        """One training."""
        key = f"{kind} {how} {seed}"
        if key not in self.curves:
            images, held_out = self.data(grey=kind == "flat")
            torch.manual_seed(seed)
            head = {"width": 256} if kind == "flat" else {"width": 128, "kind": MLPHead}
            prior = NCPrior.for_source(self.source(kind), held_out[:512], **head)
            options = {name: self.settings[name] for name in ("eval_every", "batch")}
            options["steps"] = self.settings[f"{kind}_steps"]
            train, more = ways(self.device)[how]
            self.curves[key] = train(prior, images, held_out, **options, **more)
        return self.curves[key]

    def training(self, kind: str, how: str, name: str, seed: int) -> list[Row]:
        """Ours against the straightforward loop."""
        fast, slow = self.curve(kind, how, seed), self.curve(kind, "straightforward", seed)
        least, least_slow = (min(loss for _, loss in curve) for curve in (fast, slow))
        target = max(least, least_slow)
        spent, spent_slow = seconds_to(fast, target), seconds_to(slow, target)
        row = {
            "name": name,
            "seconds": spent,
            "baseline_seconds": spent_slow,
            "ratio": spent_slow / spent,
            "held_out": least,
            "baseline_held_out": least_slow,
            "loss_cost": least - least_slow,
        }
        if kind == "flat" and self.device.type == "cpu":
            row["peak_mib"] = peak_mib(small_training, how)
            row["baseline_peak_mib"] = peak_mib(small_training, "straightforward")
        return [row]

    def gain_95(self, seed: int) -> list[Row]:
        """Seconds on the clock to 95 % of the final gain."""
        curve = self.curve("flat", "kept, fast", seed)
        least = min(loss for _, loss in curve)
        none = 2 * math.log(2)
        target = none - 0.95 * (none - least)
        return [{"name": "gain-95", "seconds": seconds_to(curve, target), "held_out": target}]

    def groups(self, seed: int) -> list[Row]:
        """Time of a step per group, of 1 group and of 30."""
        contenders: dict[str, Contender] = {}
        for count in (1, 30):
            torch.manual_seed(seed)
            trainer, walk = stepping(count, self.device)
            contenders[f"groups-{count}"] = partial(trainer.step, walk)
        times = by_turns(contenders, self.device, rounds=self.settings["rounds"])
        medians = {name: sorted(found)[len(found) // 2] for name, found in times.items()}
        one = medians["groups-1"]
        return [
            {
                "name": name,
                "ms_per_step": 1000 * spent,
                "ratio": one / (spent / int(name.split("-")[1])),
            }
            for name, spent in medians.items()
        ]

    def processes(self, count: int, seed: int) -> list[Row]:
        """Steps of several gloo processes, each with its share of the rows."""
        with tempfile.TemporaryDirectory() as folder:
            steps = self.settings["process_steps"]
            arguments = (count, folder, steps, seed)
            torch.multiprocessing.spawn(_steps, arguments, nprocs=count)
            spent = float(Path(folder, "seconds").read_text())
        return [{"name": f"processes-{count}", "ms_per_step": 1000 * spent / steps}]


def ways(device: torch.device) -> dict[str, tuple[Callable[..., Curve], dict[str, Any]]]:
    """The loops by name, each with its settings of `fit`."""
    fast = {"precision": fast_precision(device)}
    return {
        "straightforward": (straightforward, {}),
        "kept": (ours, {}),
        "kept, fast": (ours, fast),
        "walks, fast": (ours, {"cache_epochs": 10, **fast}),
        **{f"walk-epochs-{e:g}": (ours, {"cache_epochs": e}) for e in (1, 4, math.inf)},
    }


def stepping(count: int, device: torch.device) -> tuple[NCETrainer, Any]:
    """A trainer of so many heads, and a batch of walks for it: nothing of a VAE is run."""
    z = torch.distributions.Normal(torch.zeros(256, 16, device=device), 1.0)
    group = {"prior": parameters(z), "posterior": parameters(z)}
    walk = tuple({**group, "context": torch.randn(256, 64, device=device)} for _ in range(count))
    heads = [MLPHead((16,), context_shape=(64,), width=128).to(device) for _ in range(count)]
    prior = NCPrior(CachedGroupsSource(Ladder(count, device)), heads)
    optimizer = torch.optim.AdamW(prior.parameters(), fused=True)
    return NCETrainer(prior, optimizer), walk


def small_training(how: str) -> Contender:
    """Twenty steps on 2,000 images, for the peak of memory."""
    source: SingleGroup = VAE(28, latents=16, counts=1).eval().source()
    images = torch.rand(2000, 1, 28, 28)
    prior = NCPrior(source, MLPHead((16,)))
    train, more = ways(torch.device("cpu"))[how]
    options = {"steps": 20, "eval_every": 20, "batch": 256}
    run = partial(train, prior, images, images[:500], **options, **more)
    run()
    return run


def _steps(rank: int, count: int, folder: str, steps: int, seed: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=rank, world_size=count)
    torch.manual_seed(seed)
    vae = VAE(28, latents=16, counts=1).eval()
    prior = NCPrior(vae.source(), MLPHead((16,)))
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters(), fused=True))
    x = torch.rand(1024 // count, 1, 28, 28)
    trainer.step(x)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        trainer.step(x)
    if rank == 0:
        Path(folder, "seconds").write_text(str(time.perf_counter() - started))
    dist.destroy_process_group()


def jobs(speed: Speed, quick: bool, seed: int) -> dict[str, Callable[[], list[Row]]]:
    """All rows, by name."""
    found: dict[str, Callable[[], list[Row]]] = {
        "groups": partial(speed.groups, seed),
        "flat": partial(speed.training, "flat", "kept, fast", "train-flat", seed),
        "flat, fp32": partial(speed.training, "flat", "kept", "train-flat-fp32", seed),
        "gain": partial(speed.gain_95, seed),
    }
    if speed.device.type == "cpu":
        for count in (1, 2):
            found[f"processes {count}"] = partial(speed.processes, count, seed)
    hierarchical = {"train-hierarchical": "walks, fast"}
    if not quick:
        hierarchical |= {f"walk-epochs-{e}": f"walk-epochs-{e}" for e in ("1", "4", "inf")}
    for name, how in hierarchical.items():
        found[name] = partial(speed.training, "hierarchical", how, name, seed)
    return found


def main() -> None:
    made = parser(__doc__)
    add_device(made)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"flat_steps": 600, "hierarchical_steps": 300, "steps": 1000, "rounds": 5}
    settings |= {"eval_every": 50, "batch": 256, "process_steps": 20}
    if not options.quick:
        settings |= {"flat_steps": 4000, "hierarchical_steps": 4000, "steps": 4690, "rounds": 30}
        settings |= {"eval_every": 100, "process_steps": 100}
    kept = {name: settings_for(options.quick)[name] for name in ("groups", "epochs")}
    settings |= {"classifier_steps": 0, "device": options.device, "threads": options.threads}
    bench = Bench(options, {**kept, **settings})
    speed = Speed(bench, torch.device(options.device))
    for seed in options.seed:
        for job, make in jobs(speed, options.quick, seed).items():
            bench.add(make, job=job, seed=seed)
    print(f"{machine()}; {settings}\n")
    print(table([{**dict.fromkeys(COLUMNS), **row} for row in bench.rows], COLUMNS))


if __name__ == "__main__":
    main()
