"""NCP against priors that are trained with the VAE: LARS and SNIS on MNIST, Table 2 in small.

    NCPRIOR_DATA=<folder> python examples/lars_snis_mnist.py    # about 10 minutes on one core
    python examples/lars_snis_mnist.py --quick                  # about 1 minute: to see it run

Trains the VAE of the EIM paper (784-300-300-50, tanh, binarised MNIST) three times on the ELBO, with
N(0, I), with the SNIS prior and with the LARS prior; then NCP's ratio head (50-100-100-1) on the
first, frozen. Prints the negative log-likelihood of held-out images in nats by importance-weighted
bounds. Every VAE is trained for a few epochs only, so that the numbers are above the paper's. Seed
0: VAE 93.67, NCP 91.25, SNIS 91.28, LARS 91.28 (paper: 84.82, 82.82, 82.52, 83.03).
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import NCPrior, fit
from ncprior.adapters.lars_snis import (
    EIMVAE,
    Binarised,
    EIMSource,
    EnergyNet,
    LARSPrior,
    SNISPrior,
    train_vae,
)
from ncprior.demo import read_images

LogRatio = Callable[[Tensor], Tensor]


class Row(NamedTuple):
    """One method: what its number bounds, its NLL per image, and seconds of training."""

    method: str
    bounded: str
    nll: Tensor  # (N,), in nats
    seconds: float


@torch.no_grad()
def iwae_nll(vae: EIMVAE, x: Tensor, log_ratio: LogRatio | None, num_samples: int) -> Tensor:
    """Importance-weighted bound of -log p(x) in nats, (N,): on average at least -log p(x).

    The prior is N(0, I) times a ratio. Of SNIS the ratio is estimated without bias from fresh
    proposals for each batch of z, inside the logarithm, so that it stays a bound for its sampler.
    """
    q, base = vae.posterior(x), Independent(Normal(torch.zeros(50), 1.0), 1)
    log_w = []
    for _ in tqdm(range(num_samples), desc="IWAE", leave=False):
        z = q.sample()
        log_prior = base.log_prob(z) + (0.0 if log_ratio is None else log_ratio(z))
        log_w.append(vae.likelihood(z).log_prob(x) + log_prior - q.log_prob(z))
    return math.log(num_samples) - torch.logsumexp(torch.stack(log_w), 0)


def table(rows: list[Row]) -> str:
    """The printed table; gains are paired over the images."""
    lines = [f"{'method':<16} {'NLL':>7} {'gain over the VAE (95 %)':>26} {'s':>5}  bounds"]
    for method, bounded, nll, seconds in rows:
        gain = rows[0].nll - nll
        half = 1.96 * gain.std().item() / math.sqrt(len(gain))
        text = f"{gain.mean():+.2f} ± {half:.2f}" if method != rows[0].method else ""
        lines.append(f"{method:<16} {nll.mean():>7.2f} {text:>26} {seconds:>5.0f}  {bounded}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--quick", action="store_true", help="2 epochs: runs, but shows little")
    parser.add_argument("--epochs", type=int, help="epochs of every VAE (25)")
    parser.add_argument("--head-steps", type=int, help="steps of the ratio head (6000)")
    parser.add_argument("--proposals", type=int, default=1024, help="K of SNIS, LARS and NCP")
    parser.add_argument("--samples", type=int, default=100, help="importance samples per image")
    options = parser.parse_args()
    epochs = options.epochs or (2 if options.quick else 25)
    head_steps = options.head_steps or (300 if options.quick else 6000)
    torch.manual_seed(options.seed)

    try:
        images = read_images("ylecun/mnist", "train").images
        test = read_images("ylecun/mnist", "test").images
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    train, validation = images[:50_000], torch.bernoulli(images[50_000:])
    x = torch.bernoulli(test[torch.randperm(len(test))[: 200 if options.quick else 2000]])

    def row(method: str, bounded: str, vae: EIMVAE, log_ratio: LogRatio | None) -> Row:
        seconds = time.perf_counter() - started
        return Row(method, bounded, iwae_nll(vae, x, log_ratio, options.samples), seconds)

    started = time.perf_counter()
    vae = EIMVAE(train.mean(0))
    train_vae(vae, train, epochs=epochs, batch_size=256)
    rows = [row("VAE, N(0, I)", "-log p(x), from above", vae, None)]
    started = time.perf_counter()

    prior = NCPrior(EIMSource(vae), EnergyNet())
    history = fit(
        *(prior, Binarised(train, 512)),
        held_out=validation,
        steps=head_steps,
        eval_every=head_steps // 20,
    )
    ncp = SNISPrior(num_proposals=options.proposals, energy=prior.heads[0])
    law = f"-log p(x) under SIR({options.proposals}), from above"
    rows.append(row("VAE + NCP", law, vae, ncp.log_ratio))

    started = time.perf_counter()
    snis = SNISPrior(num_proposals=options.proposals)
    with_snis = EIMVAE(train.mean(0), snis)
    train_vae(with_snis, train, epochs=epochs, batch_size=256)
    rows.append(row("VAE + SNIS", law, with_snis, snis.log_ratio))

    started = time.perf_counter()
    lars = LARSPrior(num_proposals=options.proposals)
    with_lars = EIMVAE(train.mean(0), lars)
    train_vae(with_lars, train, epochs=epochs, batch_size=256)
    error = lars.estimate_normaliser(2_000_000)
    bounded = f"-log p(x), from above but for log Z's standard error, {error:.3f} nats"
    rows.append(row("VAE + LARS", bounded, with_lars, lars.log_ratio))

    print(f"ratio head: {history}")
    print(
        f"{len(x)} held-out images of binarised MNIST, {options.samples} importance samples each; "
        f"{epochs} epochs; intervals are over images, for one training. NCP's seconds include "
        f"its VAE's.\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
