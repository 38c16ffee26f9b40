"""Time and memory of SIR and Langevin dynamics on an NVAE of 30 groups: the paper's table 8.

    python examples/benchmarks/table8.py --device cuda --json table8.json
    python examples/benchmarks/table8.py --quick                 # a CPU: a small tower, same columns

The model has the shape of an NVAE for CelebA-64, with untrained weights: 30 groups of 20 latent
channels, 5 at 8×8, 10 at 16×16 and 15 at 32×32. Its features, which are the context of the heads,
have 512, 256 and 128 channels and pass two inverted residual cells per group. There is one ConvHead
per group. `seconds` is the time of one batch of 1 or 10 images, decoding included: the median of
calls, between events of the device. `peak_gib` is the peak of allocated memory in a call, with VAE
and heads. The rows `at once` draw all proposals of a group in one call of the head. The paper does
not name its GPU.
"""

import statistics
from functools import partial
from typing import Any

import torch
from bench import Bench, Row, machine, parser, table
from clock import add_device, seconds
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import Group, LatentSource, NCPrior, langevin, sir
from ncprior.heads import ConvHead

COLUMNS = {
    "sampler": "<14",
    "images": ">6",
    "how": "<10",
    "seconds": ">9.3f",
    "paper_seconds": ">13.2f",
    "times_faster": ">12.1f",
    "peak_gib": ">8.2f",
}
PAPER = {
    "SIR(5)": (0.34, 0.42), "SIR(50)": (0.40, 1.21), "SIR(500)": (1.25, 9.43), "SIR(5000)": (10.11, 95.67),
    "LD(5)": (3.08, 3.07), "LD(50)": (27.85, 28.55), "LD(500)": (276.13, 260.35), "LD(1000)": (552.0, 561.44),
}  # fmt: skip
STEP = 1e-3


class Cell(nn.Module):
    """NVAE's decoder cell: an inverted residual of expansion 6 with a depthwise 5×5 convolution."""

    def __init__(self, width: int, up: bool = False, out: int | None = None) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2) if up else nn.Identity()
        out, wide = out or width, 6 * width
        self.skip = nn.Identity() if out == width else nn.Conv2d(width, out, 1)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width), nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.SiLU(),
            nn.Conv2d(wide, wide, 5, padding=2, groups=wide), nn.BatchNorm2d(wide), nn.SiLU(),
            nn.Conv2d(wide, out, 1), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, s: Tensor) -> Tensor:
        s = self.up(s)
        return self.skip(s) + 0.1 * self.layers(s)


class Tower(nn.Module):
    """Decoder of an NVAE: features, and the convolutions around every group of latents."""

    def __init__(self, groups: tuple[int, ...], width: int, latents: int, top: int) -> None:
        super().__init__()
        self.num_groups, self.latents = sum(groups), latents
        self.sides = [top * 2**i for i, count in enumerate(groups) for _ in range(count)]
        widths = [width // 2**i for i, count in enumerate(groups) for _ in range(count)]
        self.s0 = nn.Parameter(torch.randn(widths[0], top, top))
        self.parameters_of, self.join, self.cells = (
            nn.ModuleList(),
            nn.ModuleList(),
            nn.ModuleList(),
        )
        for c, after in zip(widths, [*widths[1:], widths[-1]], strict=True):
            self.parameters_of.append(nn.Sequential(nn.ELU(), nn.Conv2d(c, 2 * latents, 1)))
            self.join.append(nn.Conv2d(c + latents, c, 1))
            self.cells.append(nn.Sequential(Cell(c), Cell(c, up=after < c, out=after)))
        self.post = nn.Sequential(
            Cell(widths[-1], up=True), nn.ELU(), nn.Conv2d(widths[-1], 3, 3, padding=1)
        )


State = tuple[int, Tensor]  # number of the next group, features


class TowerSource(LatentSource[Any, State]):
    """The tower as a source; it has a prior and no encoder."""

    def __init__(self, tower: Tower) -> None:
        self.tower, self.num_groups = tower, tower.num_groups

    @property
    def module(self) -> nn.Module:
        """The tower."""
        return self.tower

    def encode(self, x: Any) -> Any:  # noqa: ANN401
        raise NotImplementedError("This model has no encoder.")

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> State:  # noqa: ANN401
        return 0, self.tower.s0.expand(batch_size, *self.tower.s0.shape)

    def group(self, state: State) -> Group:
        k, s = state
        mean, log_sd = self.tower.parameters_of[k](s).chunk(2, 1)
        normal = Normal(mean, (0.1 * log_sd).exp(), validate_args=False)
        return Group(Independent(normal, 3, validate_args=False), None, s if k else None)

    def advance(self, state: State, z: Tensor) -> State:
        k, s = state
        return k + 1, self.tower.cells[k](self.tower.join[k](torch.cat([s, z], 1)))

    def decode(self, state: State) -> Tensor:
        return self.tower.post(state[1])


def made(settings: Row, device: torch.device, **head: Any) -> NCPrior:  # noqa: ANN401
    """A prior on the tower, with heads whose log r is not 0."""
    torch.manual_seed(0)
    with device:
        tower = Tower(*(settings[name] for name in ("groups", "width", "latents", "top"))).eval()
        heads = []
        source = TowerSource(tower)
        state = source.start(2)
        with torch.no_grad():
            for _ in range(tower.num_groups):
                group = source.group(state)
                c = None if group.context is None else tuple(group.context.shape[1:])
                z = group.prior.sample()
                heads.append(ConvHead(tuple(z.shape[1:]), context_shape=c, **head).eval())
                for p in heads[-1].parameters():
                    p.add_(0.02 * torch.randn_like(p))
                state = source.advance(state, z)
    tower.requires_grad_(False)
    return NCPrior(source, heads)


def straightforward(prior: NCPrior, images: int, proposals: int) -> Tensor:
    """All proposals of a group in one call, as the paper's memory suggests."""
    source = prior.source
    with torch.no_grad():
        state = source.start(images)
        for head in prior.heads:
            group = source.group(state)
            z = group.prior.sample((proposals,))
            i = head(z, group.context).softmax(0).T.multinomial(1)
            state = source.advance(state, z[i[:, 0], torch.arange(images, device=z.device)])
        return source.decode(state)


def measured(run: Any, device: torch.device, rounds: int) -> Row:  # noqa: ANN401
    """Median time and peak of memory of a call."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    times = [seconds(run, device) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {"seconds": statistics.median(times), "peak_gib": peak}


def main() -> None:
    options_of = parser(__doc__)
    add_device(options_of)
    options_of.add_argument("--chunk", type=int, nargs="+", default=[], help="chunk sizes of SIR")
    options_of.add_argument(
        "--head", type=int, nargs=2, default=[64, 2], help="width and depth of heads"
    )
    options_of.add_argument("--langevin", type=int, nargs="*", default=None, help="steps")
    options_of.add_argument("--sir", type=int, nargs="*", default=None, help="proposals")
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    settings: Row = {"groups": (5, 10, 15), "width": 512, "latents": 20, "top": 8}
    counts, steps, rounds = (5, 50, 500, 5000), (5, 50, 500), 5
    if options.quick:
        settings = {"groups": (2, 2), "width": 32, "latents": 4, "top": 4}
        counts, steps, rounds = (5, 50), (2, 5), 2
    counts = options.sir if options.sir is not None else counts
    steps = options.langevin if options.langevin is not None else steps
    settings |= {
        "device": options.device,
        "head": list(options.head),
        "groups": list(settings["groups"]),
    }
    bench = Bench(options, settings)
    prior = made(settings, device, width=options.head[0], depth=options.head[1])

    def row(name: str, images: int, how: str, run: Any, rounds: int) -> None:  # noqa: ANN401
        def make() -> list[Row]:
            try:
                found = measured(run, device, rounds)
            except torch.cuda.OutOfMemoryError:
                return [{"seconds": None, "peak_gib": None}]
            paper = None if options.quick else PAPER.get(name, (None, None))[images > 1]
            found |= {"paper_seconds": paper, "times_faster": paper and paper / found["seconds"]}
            return [found]

        print(bench.add(make, sampler=name, images=images, how=how), flush=True)

    for images in (1, 10):
        for m in counts:
            few = 2 if m * images >= 5000 else rounds
            for precision in (torch.float32, torch.bfloat16):
                for chunk in options.chunk or [None]:
                    prior.precision = precision
                    how = {torch.float32: "fp32", torch.bfloat16: "bf16"}[precision]
                    more = {} if chunk is None else {"chunk_size": chunk}
                    how += "" if chunk is None else f", {chunk}"
                    row(
                        f"SIR({m})",
                        images,
                        how,
                        partial(prior.sample, images, partial(sir, num_proposals=m, **more)),
                        few,
                    )
            prior.precision = torch.float32
            if m * images <= 5000:
                row(
                    f"SIR({m})", images, "at once", partial(straightforward, prior, images, m), few
                )
        for n in steps:
            ld = partial(langevin, num_steps=n, step_size=STEP)
            row(f"LD({n})", images, "fp32", partial(prior.sample, images, ld), 1)
    print(f"{machine()}; {settings}\n")
    print(table(bench.rows, COLUMNS))


if __name__ == "__main__":
    main()
