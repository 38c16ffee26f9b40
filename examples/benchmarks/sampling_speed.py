"""Speed and memory of SIR against the straightforward sampler, and against the roofline.

    python examples/benchmarks/sampling_speed.py --json sampling.json
    python examples/benchmarks/sampling_speed.py --quick        # about 5 minutes
    python examples/benchmarks/sampling_speed.py --device cuda

The straightforward sampler draws all proposals, evaluates the head at all of them, and picks one:

    z = prior.sample((M,)); lw = head(cat([z, c.expand(M, …)], -1)); i = lw.softmax(0).T.multinomial(1)

Rows `sir-mlp-…`: 16 latents, batches of 16, M = 5,000, a head of width 256 with two residual
blocks. `sir-conv-context-…`: latents 20×4×4 with a context of 64×4×4. Contenders take turns in one
process with --threads threads (one: in time of that core): `ratio` is the median of straightforward
over ours, `roofline_fraction` what our best time makes of the best rate of (4096×256) @ (256×256),
counting the products of the head alone. Peaks of memory are of fresh processes, above that before.
`kl_nats` is KL(float32, bfloat16) between the laws that one draw has. Growth, `ms` being per batch:
in M (`proposals-`), B (`batch-`), D (`latents-`), K (`groups-`: 16 latents each, the one before as context,
M = 1,000) and processes; and of a job of N samples to disk in parts of 256 (`samples-`, M = 1,000), per job.
`match_strength` and `diagnose`, without its new head, on 2,048 rows: their baseline is SIR itself with
as many evaluations of the head, so that a ratio of 0.5 is twice the time of these draws. `bf16` is left out on a
CPU without instructions for it, where it takes tens of times as long.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench import Bench, Row, machine, parser, table
from clock import FLOPS, Contender, add_device, by_turns, mlp_flops, peak_mib, ratio, roofline
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ncprior import Group, LatentSource, NCPrior, SingleGroup, sir
from ncprior.diagnostics import diagnose, match_strength
from ncprior.heads import ConvHead, MLPHead, prepare_head
from ncprior.jobs import sample_parts
from ncprior.utils import fast_precision

COLUMNS = {
    "name": "<26",
    "seed": ">4",
    "proposals": ">9",
    "batch": ">5",
    "ms": ">9.1f",
    "baseline_ms": ">11.1f",
    "ratio": ">6.2f",
    "roofline_fraction": ">17.2f",
    "peak_mib": ">8.1f",
    "baseline_peak_mib": ">17.1f",
    "kl_nats": ">9.1e",
}
LATENTS, WIDTH, BLOCKS = 16, 256, 2
EVENT, CONTEXT = (20, 4, 4), (64, 4, 4)
BATCH, PROPOSALS, CONV_PROPOSALS = 16, 5000, 1000
PART = 256  # samples of a job's part


def moved(head: nn.Module, device: torch.device) -> nn.Module:
    """A head whose log r is not 0, without training it."""
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return head.to(device).eval()


def base(batch: int, event: tuple[int, ...], device: torch.device) -> Distribution:
    """N(0, I) in so many rows."""
    zeros = torch.zeros(batch, *event, device=device)
    return Independent(Normal(zeros, 1.0, validate_args=False), len(event))


def straightforward(
    prior: Distribution, head: nn.Module, context: Tensor | None, proposals: int
) -> Tensor:
    """SIR in one call: the sampler that ours is measured against."""
    with torch.no_grad():
        z = prior.sample((proposals,))
        inputs = (
            z if context is None else torch.cat([z, context.expand(proposals, *context.shape)], 2)
        )
        i = head(inputs).softmax(0).T.multinomial(1)
        return z[i[:, 0], torch.arange(z.shape[1], device=z.device)]


def contenders(
    kind: str, proposals: int, batch: int, seed: int, device: str = "cpu", latents: int = LATENTS
) -> dict[str, Contender]:
    """The straightforward sampler and ours, on the same head."""
    torch.manual_seed(seed)
    where = torch.device(device)
    if kind == "conv":
        prior, c = base(batch, EVENT, where), torch.randn(batch, *CONTEXT, device=where)
        head = moved(ConvHead(EVENT, context_shape=CONTEXT), where)
        joined = moved(ConvHead((EVENT[0] + CONTEXT[0], *EVENT[1:])), where)
    else:
        prior, c = base(batch, (latents,), where), None
        joined = head = moved(MLPHead((latents,), width=WIDTH, depth=BLOCKS), where)

    def ours(*, share: bool = False, **options: Any) -> Tensor:  # noqa: ANN401
        log_r = prepare_head(head, c, **options)
        return sir(prior, log_r, num_proposals=proposals, share_proposals=share).z

    found: dict[str, Contender] = {
        "straightforward": partial(straightforward, prior, joined, c, proposals),
        "fp32": ours,
        "bf16": partial(ours, precision=torch.bfloat16),
    }
    return found | ({"shared": partial(ours, share=True)} if c is None else {})


def one(
    kind: str, which: str, proposals: int, batch: int, seed: int, device: str, latents: int
) -> Contender:
    """One contender, for a process of its own; it is warm."""
    small = contenders(kind, min(proposals, 100), batch, seed, device, latents)[which]
    small()
    return contenders(kind, proposals, batch, seed, device, latents)[which]


class Ladder(LatentSource[Any, Any]):
    """K groups of latents; the context of each is the latents of the one before."""

    def __init__(self, num_groups: int, device: torch.device) -> None:
        self.num_groups, self.device = num_groups, device

    def encode(self, x: Tensor) -> Tensor:
        raise NotImplementedError("This source is sampled from, and has no encoder.")

    def start(self, batch_size: int, encoding: None = None, condition: None = None) -> Tensor:
        return torch.zeros(batch_size, LATENTS, device=self.device)

    def group(self, state: Tensor) -> Group:
        return Group(base(len(state), (LATENTS,), state.device), context=state)

    def advance(self, state: Tensor, z: Tensor) -> Tensor:
        return z

    def decode(self, state: Tensor) -> Tensor:
        return state


def of_groups(num_groups: int, seed: int, device: str = "cpu") -> dict[str, Contender]:
    """A batch from K groups, one after the other."""
    torch.manual_seed(seed)
    where = torch.device(device)
    shape = {"width": WIDTH, "depth": BLOCKS}
    joined = [moved(MLPHead((2 * LATENTS,), **shape), where) for _ in range(num_groups)]
    shape["context_shape"] = (LATENTS,)
    heads = [moved(MLPHead((LATENTS,), **shape), where) for _ in range(num_groups)]
    prior = NCPrior(Ladder(num_groups, where), heads)  # type: ignore[arg-type]

    def in_turn() -> Tensor:
        z = torch.zeros(BATCH, LATENTS, device=where)
        for head in joined:
            z = straightforward(base(BATCH, (LATENTS,), where), head, z, 1000)
        return z

    ours = partial(prior.sample, BATCH, partial(sir, num_proposals=1000))
    return {"straightforward": in_turn, "fp32": ours}


def job(num_samples: int, seed: int, device: str = "cpu") -> Contender:
    """So many samples to disk; the first part once before, so that it is warm."""
    torch.manual_seed(seed)
    where = torch.device(device)
    head = moved(MLPHead((LATENTS,), width=WIDTH, depth=BLOCKS), where)
    p = Independent(Normal(torch.zeros(LATENTS, device=where), 1.0, validate_args=False), 1)
    prior = NCPrior(SingleGroup(p, lambda x: p.expand((len(x),)), lambda z: z), head)
    sampler = partial(sir, num_proposals=1000)

    def run(count: int = num_samples) -> None:
        with tempfile.TemporaryDirectory() as folder:
            sample_parts(
                prior, folder, sampler=sampler, num_samples=count, part_size=PART, seed=seed
            )

    run(PART)
    return run


def kl_of_bfloat16(kind: str, seed: int) -> float:
    """KL between the laws by which one of 20,000 proposals is drawn, of a head of 3 nats' spread."""
    torch.manual_seed(seed)
    head, c = (
        (moved(MLPHead((LATENTS,), width=WIDTH, depth=BLOCKS), torch.device("cpu")), None)
        if kind == "mlp"
        else (
            moved(ConvHead(EVENT, context_shape=CONTEXT), torch.device("cpu")),
            torch.randn(1, *CONTEXT),
        )
    )
    z = torch.randn(20_000, 1, *((LATENTS,) if kind == "mlp" else EVENT))
    with torch.no_grad():
        head.rescale(3 / float(prepare_head(head, c)(z).std()), 0.0)  # type: ignore[operator]
        log_w, log_v = (
            prepare_head(head, c, precision=precision)(z).double().log_softmax(0)
            for precision in (torch.float32, torch.bfloat16)
        )
    return float((log_w.exp() * (log_w - log_v)).sum())


class Speed:
    """Rows of one machine."""

    def __init__(self, options: argparse.Namespace, settings: Row) -> None:
        self.device, self.settings = torch.device(options.device), settings
        self.on_cpu = self.device.type == "cpu"

    def kind(self, kind: str, names: dict[str, str], seed: int) -> list[Row]:
        """All contenders of one kind of head, by turns."""
        proposals = PROPOSALS if kind == "mlp" else CONV_PROPOSALS
        found = contenders(kind, proposals, BATCH, seed, str(self.device))
        found = {name: found[name] for name in ("straightforward", *names)}
        mm = roofline(self.device)
        times = by_turns({"roofline": mm, **found}, self.device, rounds=self.settings["rounds"])
        rate = FLOPS / min(min(times["roofline"]), self._best(mm))
        rows = []
        for which, name in names.items():
            flops = mlp_flops(LATENTS, WIDTH, BLOCKS) * proposals * BATCH
            is_full = kind == "mlp" and which == "fp32"  # the roofline is of float32
            rows.append(
                {
                    "name": name,
                    "proposals": proposals,
                    "batch": BATCH,
                    **self._times(times, which),
                    "roofline_fraction": flops / min(times[which]) / rate if is_full else None,
                    "peak_mib": self._peak(kind, which, proposals, seed),
                    "baseline_peak_mib": self._peak(kind, "straightforward", proposals, seed),
                    "kl_nats": kl_of_bfloat16(kind, seed) if which == "bf16" else None,
                }
            )
        return rows

    def growth(
        self, proposals: int, batch: int, seed: int, name: str, latents: int = LATENTS
    ) -> list[Row]:
        """One size; the straightforward sampler only where it fits."""
        found = contenders("mlp", proposals, batch, seed, str(self.device), latents)
        count = proposals * batch
        fits = count <= 200_000
        chosen = {key: found[key] for key in ("fp32", *(("straightforward",) if fits else ()))}
        rounds = self.settings["rounds"] if count <= 64_000 else 3 if fits else 1
        times = by_turns(chosen, self.device, rounds=rounds)
        row = self._times(times, "fp32") if fits else {"ms": 1000 * min(times["fp32"])}
        peak = self._peak("mlp", "fp32", proposals, seed, batch, latents)
        return [{"name": name, "proposals": proposals, "batch": batch, **row, "peak_mib": peak}]

    def groups(self, count: int, seed: int) -> list[Row]:
        """K groups."""
        times = by_turns(of_groups(count, seed, str(self.device)), self.device, rounds=3)
        times_of = self._times(times, "fp32")
        return [{"name": f"groups-{count}", "proposals": 1000, "batch": BATCH, **times_of}]

    def samples(self, count: int, seed: int) -> list[Row]:
        """A job of N samples to disk."""
        run = job(count, seed, str(self.device))
        (spent,) = by_turns({"": run}, self.device, rounds=1)[""]
        peak = peak_mib(job, count, seed) if self.on_cpu else None
        row = {"proposals": 1000, "batch": PART, "ms": 1000 * spent, "peak_mib": peak}
        return [{"name": f"samples-{count}", **row}]

    def measured(self, name: str, seed: int) -> list[Row]:
        """What measures a prior, against SIR with as many evaluations of the head."""
        torch.manual_seed(seed)
        head = moved(MLPHead((LATENTS,), width=WIDTH, depth=BLOCKS), self.device)
        p = Independent(Normal(torch.zeros(LATENTS, device=self.device), 1.0), 1)
        prior = NCPrior(SingleGroup(p, lambda x: p.expand((len(x),)), lambda z: z), head)
        x = torch.zeros(2048, LATENTS, device=self.device)
        few = partial(sir, num_proposals=50)
        run = {
            "match_strength": partial(match_strength, prior, x, few, progress=False),
            "diagnose": partial(diagnose, prior, x, fresh_steps=0),
        }[name]
        count = evaluations(head, run)
        draw = partial(sir, base(BATCH, (LATENTS,), self.device), prepare_head(head))
        sampled = partial(draw, num_proposals=-(-count // BATCH))
        times = by_turns({"straightforward": sampled, "fp32": run}, self.device, rounds=3)
        row = {"proposals": count // BATCH, "batch": BATCH}
        return [{"name": name, **row, **self._times(times, "fp32")}]

    def processes(self, count: int, seed: int) -> list[Row]:
        """Samples per second of several processes of one thread each, each with its own draws."""
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            pool.map(_draw_some, [(2, seed)] * count, chunksize=1)
            repeats = self.settings["repeats"]
            spent = pool.map(_draw_some, [(repeats, seed + i) for i in range(count)], chunksize=1)
        ms = 1000 * max(spent) / repeats / count
        return [{"name": f"processes-{count}", "proposals": PROPOSALS, "batch": BATCH, "ms": ms}]

    def _best(self, mm: Contender) -> float:
        return min(by_turns({"mm": mm}, self.device, rounds=30)["mm"])

    def _times(self, times: dict[str, list[float]], which: str) -> Row:
        return {
            "ms": 1000 * statistics.median(times[which]),
            "baseline_ms": 1000 * statistics.median(times["straightforward"]),
            "ratio": ratio(times, "straightforward", which),
        }

    def _peak(
        self,
        kind: str,
        which: str,
        proposals: int,
        seed: int,
        batch: int = BATCH,
        latents: int = LATENTS,
    ) -> float | None:
        if not self.on_cpu:
            return None
        return peak_mib(one, kind, which, proposals, batch, seed, "cpu", latents)


def evaluations(head: nn.Module, run: Contender) -> int:
    """Number of latents that a head is evaluated at in a call."""
    seen = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], log_r: Tensor) -> None:
        nonlocal seen
        seen += log_r.numel()

    with head.register_forward_hook(count):
        run()
    return seen


def _draw_some(arguments: tuple[int, int]) -> float:
    repeats, seed = arguments
    torch.set_num_threads(1)
    ours = contenders("mlp", PROPOSALS, BATCH, seed)["fp32"]

    ours()
    started = time.perf_counter()
    for _ in range(repeats):
        ours()
    return time.perf_counter() - started


def slope(rows: list[Row]) -> float:
    """The slope of log time over log M."""
    x, y = (torch.tensor([float(row[key]) for row in rows]).log() for key in ("proposals", "ms"))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def jobs(speed: Speed, quick: bool, seed: int) -> dict[str, Callable[[], list[Row]]]:
    """All rows, by name."""
    mlp = {"fp32": "sir-mlp-fp32", "bf16": "sir-mlp-bf16", "shared": "sir-mlp-shared-fp32"}
    if speed.on_cpu and fast_precision("cpu") != torch.bfloat16:
        del mlp["bf16"]
    conv = {"fp32": "sir-conv-context-fp32"}
    found: dict[str, Callable[[], list[Row]]] = {
        "mlp": partial(speed.kind, "mlp", mlp, seed),
        "conv": partial(speed.kind, "conv", conv, seed),
    }
    for proposals in (1000, 10_000, 100_000) if quick else (1000, 10_000, 100_000, 1_000_000):
        name = f"proposals-{proposals}"
        found[name] = partial(speed.growth, proposals, BATCH, seed, name)
    for batch in (1, 4, 16, 64):
        found[f"batch-{batch}"] = partial(speed.growth, 1000, batch, seed, f"batch-{batch}")
    for latents in (4, 64, 256, 1024):
        name = f"latents-{latents}"
        found[name] = partial(speed.growth, 1000, BATCH, seed, name, latents)
    for count in (1, 10, 30):
        found[f"groups-{count}"] = partial(speed.groups, count, seed)
    for samples in (256, 512, 1024) if quick else (256, 1024, 4096):
        found[f"samples-{samples}"] = partial(speed.samples, samples, seed)
    for name in ("match_strength", "diagnose"):
        found[name] = partial(speed.measured, name, seed)
    for count in (1, 2) if speed.on_cpu else ():
        found[f"processes-{count}"] = partial(speed.processes, count, seed)
    return found


def main() -> None:
    made = parser(__doc__)
    add_device(made)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"rounds": 8, "repeats": 5} if options.quick else {"rounds": 30, "repeats": 20}
    settings |= {"device": options.device, "threads": options.threads}
    bench = Bench(options, settings)
    speed = Speed(options, settings)
    for seed in options.seed:
        for job, make in jobs(speed, options.quick, seed).items():
            bench.add(make, job=job, seed=seed)
    print(f"{machine()}; {settings}\n")
    print(table(bench.rows, COLUMNS))
    in_m = [row for row in bench.rows if row["name"].startswith("proposals-")]
    print(f"\ntime grows like M^{slope(in_m):.2f}")


if __name__ == "__main__":
    main()
