"""Draws rows of samples of one frozen VAE: data, the VAE's own prior, `improve(50)`, the posterior.

    python examples/benchmarks/samples_figure.py --model hierarchical --out hierarchical-samples.png

The VAE and the prior are those of prior_hole.py, from its --cache, or trained here (hours). The samples
are the first ones under the seed, not chosen. Not a benchmark itself.
"""

import argparse
from pathlib import Path

import torch
from bench import Bench, parser
from hole_cases import Case, make_case
from hole_methods import automatic, references
from prior_hole import with_options
from torch import Tensor

from ncprior.demo import plot_samples
from ncprior.saving import write_atomically

COUNT = 16  # images in a row


def rows(bench: Bench, case: Case, seed: int) -> dict[str, Tensor]:
    """Images by the label of their row."""
    (own, posterior, *_), (new, *_) = references(case), automatic(bench)
    labels = {"the VAE's prior": own, "the new prior": new, "posterior samples": posterior}
    found = {"data": case.images[:COUNT]}
    for label, method in labels.items():
        torch.manual_seed(seed)
        found[label] = method.fit(case, seed).draw(COUNT)[0].clamp(0, 1)
    return found


def main() -> None:
    made: argparse.ArgumentParser = with_options(parser(__doc__))
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="the PNG")
    options = made.parse_args()
    bench = Bench(options, {"data": options.data, "model": options.model})
    case = make_case(bench, options.data, options.model)
    figure = plot_samples(rows(bench, case, options.seed[0]))
    with write_atomically(options.out) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    print(f"{options.out}: {COUNT} samples a row, seed {options.seed[0]}")


if __name__ == "__main__":
    main()
