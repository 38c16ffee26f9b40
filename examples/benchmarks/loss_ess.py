"""Classification loss against effective sample size, group by group: the paper's figure 5.

    NCPRIOR_DATA=... python examples/benchmarks/loss_ess.py --json ess.json --figure ess.png
    python examples/benchmarks/loss_ess.py --quick              # about 8 minutes

The heads are those of `hierarchical_nll.py`, taken from --cache where it has run. For every group of
the hierarchical VAE on MNIST it prints the NCE loss on held-out images and the effective sample size
of 100 proposals, and how the two go together (Spearman's rank correlation). A group of loss 2 log 2
= 1.386 has nothing to correct, and its 100 proposals are worth 100.
"""

from functools import partial
from pathlib import Path

import torch
from bench import Bench, BinaryMNIST, Row, machine, parser, table
from hierarchical_nll import Table6, settings_for
from torch import Tensor

from ncprior.diagnostics import diagnose

COLUMNS = {
    "method": "<8",
    "seed": ">4",
    "group": ">5",
    "nce_loss": ">8.3f",
    "nce_loss_se": ">11.3f",
    "ess": ">6.1f",
    "verdict": "<30",
}


def groups(table_6: Table6, seed: int) -> list[Row]:
    """One row per group."""
    prior, _ = table_6.heads(seed)
    report = diagnose(prior, table_6.data.held_out[2000:4000], num_proposals=(10, 100))
    return [
        {
            "group": group.group,
            "nce_loss": group.nce_loss,
            "nce_loss_se": group.nce_loss_error,
            "ess": group.ess[100],
            "verdict": str(group.verdict),
        }
        for group in report.groups
    ]


def spearman(x: list[float], y: list[float]) -> float:
    """The correlation of ranks."""

    def ranks(values: list[float]) -> Tensor:
        return torch.tensor(values).argsort().argsort().double()

    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def draw(rows: list[Row], path: Path) -> None:
    """Loss per group, and effective sample size against loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bars, cloud = figure.subplots(1, 2)
    loss = [row["nce_loss"] for row in rows]
    bars.bar([row["group"] for row in rows], loss, color="C0")
    bars.set(xlabel="group", ylabel="NCE loss (nats)", xticks=[row["group"] for row in rows])
    bars.axhline(2 * torch.log(torch.tensor(2.0)).item(), color="0.2", linestyle=":")
    cloud.scatter(loss, [row["ess"] for row in rows])
    for row in rows:
        place = (row["nce_loss"], row["ess"])
        cloud.annotate(row["group"], place, xytext=(4, 2), textcoords="offset points", fontsize=8)
    cloud.set(xlabel="NCE loss (nats)", ylabel="effective sample size of 100", ylim=(0, 100))
    figure.savefig(path, dpi=150)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--figure", type=Path, metavar="PNG", help="draw the figure")
    options = made.parse_args()
    settings = settings_for(options.quick)
    bench = Bench(options, settings)
    table_6 = Table6(bench, BinaryMNIST(settings["test"]))
    for seed in options.seed:
        bench.add(partial(groups, table_6, seed), method="NCP", seed=seed)
    print(f"{machine()}; {settings}\n")
    print(table(bench.rows, COLUMNS))
    columns = [[row[name] for row in bench.rows] for name in ("nce_loss", "ess")]
    print(f"\nrank correlation of loss and effective sample size: {spearman(*columns):.2f}")
    if options.figure is not None:
        draw([row for row in bench.rows if row["seed"] == options.seed[0]], options.figure)


if __name__ == "__main__":
    main()
