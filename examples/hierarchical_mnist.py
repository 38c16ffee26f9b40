"""A hierarchical VAE with K groups of 4×4 latents on MNIST, and a ratio head for every group.

    NCPRIOR_DATA=... python examples/hierarchical_mnist.py                # about an hour
    python examples/hierarchical_mnist.py --quick                         # about 8 minutes
    python examples/hierarchical_mnist.py --groups 2 5 10                 # one row per K

Trains, on dynamically binarised images: a flat VAE, for comparison; the hierarchical VAE of
`ncprior.adapters.hvae` on the ELBO, with a warm-up; and K heads in parallel, from one walk per
batch. Prints the IWAE-100 bounds of both VAEs, a report per group (loss, ESS: the paper's figure 5),
MMD per group after PCA (its table 9), the gain in log p(x), and the gap closed; draws samples, loss
against ESS, and nearest neighbours in the training set (its figure 4). With several K it makes the
paper's table 7. Trained networks are kept in --out and used again.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ncprior import NCPrior, SingleGroup, fit, sir
from ncprior.adapters.hvae import HVAE, HVAESource, train_hvae
from ncprior.demo import (
    ARMS,
    VAE,
    Classifier,
    Generation,
    Labelled,
    draw_arms,
    in_batches,
    plot_samples,
    read_images,
)
from ncprior.diagnostics import diagnose
from ncprior.evaluation import gap_closed, log_likelihood, mmd
from ncprior.heads import MLPHead
from ncprior.saving import load_tensors, save_tensors
from ncprior.training import FitSettings, gate
from ncprior.utils import train


class Binarised(Dataset[Tensor]):
    """Images whose grey pixels are drawn anew as black or white at every visit."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].bernoulli()


def cached(
    module: nn.Module, path: Path, settings: dict[str, Any], run: Callable[[], None]
) -> None:
    """Trains a network, or reads the one that was trained with the same settings."""
    if path.exists():
        tensors, found = load_tensors(path)
        if found == settings:
            module.load_state_dict(tensors)
            module.eval()
            return
    run()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, module.state_dict(), settings)


def train_flat(vae: VAE, images: Tensor, epochs: int) -> None:
    """Trains the flat VAE on the plain ELBO."""

    def negative_elbo(rows: Tensor) -> Tensor:
        return vae.negative_elbo(images[rows].bernoulli()).mean()

    steps = epochs * len(images) // 128
    train(vae, negative_elbo, len(images), steps=steps, batch_size=128, name="flat VAE")


def train_classifier(classifier: Classifier, data: Labelled) -> None:
    """Trains the classifier whose features judge the samples."""

    def misfit(rows: Tensor) -> Tensor:
        return cross_entropy(classifier(data.images[rows]), data.labels[rows])

    steps = 2 * len(data.labels) // 128
    train(classifier, misfit, len(data.labels), steps=steps, batch_size=128, name="classifier")


def flat_source(vae: VAE) -> SingleGroup:
    """The flat VAE with its Bernoulli likelihood."""

    def likelihood(z: Tensor) -> torch.distributions.Distribution:
        pixels = torch.distributions.Bernoulli(logits=vae.decoder(z))
        return torch.distributions.Independent(pixels, 3)

    return SingleGroup(vae.prior(), vae.posterior, vae.decode, module=vae, likelihood=likelihood)


def print_mmd(first: dict[str, Generation]) -> list[tuple[float, float]]:
    """Prints MMD² of (q, p) and of (q, NCP), of the latents z_≤k, at one bandwidth each."""
    rows = []
    print("\nlatents   MMD²(q, p)   MMD²(q, NCP)    (5,000 samples, PCA to at most 500)")
    for k in range(len(first["NCP"].latents)):
        p, ours, q = (
            torch.cat([z.flatten(1)[:5000] for z in first[arm].latents[: k + 1]], dim=1)
            for arm in ARMS
        )
        mean, (_, _, v) = q.mean(0), torch.linalg.svd(q - q.mean(0), full_matrices=False)
        p, ours, q = ((z - mean) @ v[:500].mT for z in (p, ours, q))  # principal components of q
        bandwidth = torch.pdist(torch.cat([p, q])[::10]).median().item()
        pair = (mmd(q, p, bandwidth=bandwidth).item(), mmd(q, ours, bandwidth=bandwidth).item())
        print(f"z_0..{k:<4} {pair[0]:>10.5f} {pair[1]:>14.5f}")
        rows.append(pair)
    return rows


def log_likelihoods(prior: NCPrior, flat: SingleGroup, x: Tensor, quick: bool) -> dict[str, float]:
    """Means over x of the bounds on log p(x), in nats, and the gain of SIR with its error."""
    count = 20 if quick else 100
    few = x[: 100 if quick else 300]
    ours = log_likelihood(prior, few, num_samples=10, num_proposals=100, chunk_size=20_000)
    gain = ours["sir"].gain_over(ours["base"])
    return {
        "nll_flat": log_likelihood(flat, x, num_samples=count)["base"].nll_upper,
        "nll_base": log_likelihood(prior, x, num_samples=count)["base"].nll_upper,
        "gain": gain.value,
        "gain_error": gain.error,
    }


def run(num_groups: int, options: argparse.Namespace) -> dict[str, Any]:
    """Does everything for one number of groups."""
    torch.manual_seed(options.seed)
    quick = options.quick
    epochs, steps, samples = (2, 500, 2000) if quick else (16, 4000, 5000)
    data = read_images("ylecun/mnist", "train")
    data = data.rows(torch.randperm(len(data.labels)))
    test = read_images("ylecun/mnist", "test")
    test = test.rows(torch.randperm(len(test.labels)))
    x_test = test.images[: 200 if quick else 500].bernoulli()

    out: Path = options.out / f"{num_groups}-groups"
    kept = options.out / "networks"
    tag = {"seed": options.seed, "epochs": epochs}
    flat, vae = VAE(28, latents=16, counts=1), HVAE(num_groups=num_groups)
    classifier = Classifier(28, num_features=64)
    cached(
        flat,
        kept / f"flat-{options.seed}.safetensors",
        tag,
        lambda: train_flat(flat, data.images, epochs),
    )
    cached(
        vae,
        kept / f"hvae-{num_groups}-{options.seed}.safetensors",
        {**tag, "groups": num_groups},
        lambda: train_hvae(vae, data.images, epochs=epochs),
    )
    cached(
        classifier,
        kept / f"classifier-{options.seed}.safetensors",
        tag,
        lambda: train_classifier(classifier, data),
    )

    source, images = HVAESource(vae), Binarised(data.images)
    probe = data.images[:512].bernoulli()
    prior = NCPrior.for_source(source, probe, kind=MLPHead, width=128)
    # A walk costs more than the heads: four draws of every z_k make better use of it.
    settings = FitSettings(num_draws=4)
    history = fit(prior, images, steps=steps, learning_rate=2e-3, settings=settings)
    print(history)
    gated = gate(prior, history) if options.gate else ()
    if gated:
        print(f"left at their base: {', '.join(map(str, gated))}")
    report = diagnose(prior, test.images[:1000].bernoulli(), train=probe, num_proposals=(10, 100))
    print(report)

    sampler = partial(sir, num_proposals=100, chunk_size=20_000)
    features = classifier.features
    generated, first = draw_arms(
        prior,
        sampler,
        data.images.bernoulli(),
        features=features,
        num_samples=samples,
        generations=5,
    )
    base, ours, posterior = (generated[arm] for arm in ARMS)
    reference = in_batches(features, test.images)
    gap = gap_closed(reference, base=base, ours=ours, posterior=posterior)
    mmds = print_mmd(first)
    nll = log_likelihoods(prior, flat_source(flat), x_test, quick)

    out.mkdir(parents=True, exist_ok=True)
    arms = {"data": test.images, "base prior": first["base prior"].x, "NCP": first["NCP"].x}
    arms["posterior samples"] = first["posterior"].x
    plot_samples({name: x[:16] for name, x in arms.items()}).savefig(out / "samples.png", dpi=150)
    report.plot().savefig(out / "report.png", dpi=150)
    queries = first["NCP"].x[:8]
    distances = torch.cdist(queries.flatten(1), data.images.flatten(1))
    rows = distances.topk(5, largest=False).indices.T
    neighbours = {"NCP": queries}
    neighbours |= {f"neighbour {i + 1}": data.images[row] for i, row in enumerate(rows)}
    plot_samples(neighbours).savefig(out / "neighbours.png", dpi=150)
    prior.save_pretrained(out / "prior", report=report)

    print(f"\nnegative log-likelihood, upper bounds, {len(x_test)} binarised test images:")
    print(f"  flat VAE, 16 latents        {nll['nll_flat']:.2f} nats")
    print(f"  {num_groups} groups, base prior      {nll['nll_base']:.2f} nats")
    print(f"  gain of SIR(100)            {nll['gain']:.2f} ± {nll['gain_error']:.2f} nats")
    print(f"Fréchet distance: base {gap.d_base:.2f}, NCP {gap.d_ours:.2f}, floor {gap.d_post:.2f}")
    print(gap)
    return {
        "groups": num_groups,
        "seed": options.seed,
        "gap_closed": gap.gap_closed,
        "gap_low": gap.low,
        "gap_high": gap.high,
        "d_base": gap.d_base,
        "d_ncp": gap.d_ours,
        "d_post": gap.d_post,
        **nll,
        "loss": history.best_loss,
        "gated": list(gated),
        "mmd": mmds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, nargs="+", default=[10], metavar="K")
    parser.add_argument(
        "--gate", action="store_true", help="leave groups that learn nothing alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="little training: same columns")
    parser.add_argument("--out", type=Path, default=Path("hierarchical-mnist"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results here")
    options = parser.parse_args()
    rows = [run(k, options) for k in options.groups]
    if len(rows) > 1:
        print("\ngroups   D base    D NCP   gap closed")
        for row in rows:
            print(
                f"{row['groups']:>6} {row['d_base']:>8.2f} {row['d_ncp']:>8.2f} "
                f"{row['gap_closed']:>8.2f} ({row['gap_low']:.2f} to {row['gap_high']:.2f})"
            )
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
