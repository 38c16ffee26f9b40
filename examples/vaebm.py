"""An energy on the images of a frozen VAE: three lines to wrap it, one to train it.

    NCPRIOR_DATA=... python examples/vaebm.py            # MNIST, some 20 minutes on one core
    python examples/vaebm.py --data digits               # 8×8 digits, a few minutes
    python examples/vaebm.py --data digits --quick       # under a minute; the numbers mean little

Trains a small VAE, then

    source = GaussianDecoder(vae.source(), 0.4)             # σ of decoder noise
    model = VAEBM(source, EnergyNet((1, 28, 28)), data_noise=0.4)  # as noisy as its draws
    fit_vaebm(model, images)

VAEBM moves draws of the VAE by 16 Langevin steps in the VAE's own noise, downhill in an energy that
was trained to be low on data and high on where such chains end. Both have noise of one σ, on MNIST
four times the decoder's residuals: it hides that a VAE's images are less sharp than data, which no
latent can mend, and leaves to the energy what they show. Prints the Fréchet distance of the
VAE's samples and of the chains', and how well the density tells test images from interpolations of
them. Saves a picture of chains, and the energy.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ncprior.demo import (
    VAE,
    Classifier,
    Labelled,
    digits,
    in_batches,
    plot_samples,
    read_images,
    split,
)
from ncprior.evaluation import auroc, frechet_distance, ood_score
from ncprior.utils import train
from ncprior.vaebm import VAEBM, EnergyNet, GaussianDecoder, fit_vaebm


def read(name: str) -> tuple[Labelled, Labelled]:
    """Training and test images, shuffled."""
    if name == "digits":
        return split(digits(), 600, 0)
    parts = (read_images("ylecun/mnist", part) for part in ("train", "test"))
    train_part, test = (part.rows(torch.randperm(len(part.labels))) for part in parts)
    return train_part, test


def train_networks(data: Labelled, name: str, quick: bool) -> tuple[VAE, Classifier]:
    """Trains the VAE on the plain ELBO, and the classifier whose features judge."""
    if name == "digits":
        vae, net, steps = VAE(8, latents=6, counts=16), Classifier(8, num_features=16), (2500, 500)
    else:
        vae, net, steps = (
            VAE(28, latents=16, counts=1),
            Classifier(28, num_features=64),
            (9000, 900),
        )

    def loss(rows: Tensor) -> Tensor:
        return vae.negative_elbo(data.images[rows]).mean()

    def misfit(rows: Tensor) -> Tensor:
        return cross_entropy(net(data.images[rows]), data.labels[rows])

    for module, of, count in ((vae, loss, steps[0]), (net, misfit, steps[1])):
        count = count // 5 if quick else count
        train(module, of, len(data.labels), steps=count, batch_size=128)
    return vae, net


@torch.no_grad()
def chains_of(model: VAEBM, count: int) -> dict[str, Tensor]:
    """The decoder's means of the same chains, after more and more steps."""
    noise, taken, rows = model.draw_noise(count), 0, {}
    for steps in (0, 4, 8, 16):
        chains = model.run_chains(noise, num_steps=steps - taken)
        noise, taken = chains.noise, steps
        rows[f"{steps} steps"] = chains.mean
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["mnist", "digits"], default="mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a fifth of the training or less")
    parser.add_argument("--out", type=Path, default=Path("vaebm"), metavar="DIR")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    data, test = read(options.data)
    vae, net = train_networks(data, options.data, options.quick)

    small = options.data == "digits"
    sigma, rate = (0.12, 1e-3) if small else (0.4, 3e-4)
    energy = EnergyNet(data.images.shape[1:], width=16 if small else 24)
    source = GaussianDecoder(vae.source(), sigma)
    model = VAEBM(source, energy, step_size=0.05 if small else 0.1, data_noise=sigma)
    print(model)
    steps = 100 if options.quick else 600
    print(fit_vaebm(model, data.images, steps=steps, learning_rate=rate))

    count = 500 if options.quick else 5000
    reference = in_batches(net.features, test.images)
    distances = {}
    for name, number in (("VAE", 0), ("VAEBM", model.num_steps)):
        x = [
            model.sample(len(part), num_steps=number).mean
            for part in torch.empty(count).split(500)
        ]
        features = in_batches(net.features, torch.cat(x).clamp(0, 1))
        distances[name] = frechet_distance(features, reference).item()
    inside = test.images[-300:]
    scores = ood_score(model, inside), ood_score(model, 0.5 * (inside + inside.roll(1, 0)))
    areas = [auroc(*(getattr(s, part) for s in scores)) for part in ("vae", "total")]

    options.out.mkdir(parents=True, exist_ok=True)
    plot_samples(chains_of(model, 16)).savefig(options.out / "chains.png", dpi=150)
    model.save_pretrained(options.out / "energy")
    print(f"Fréchet distance: VAE {distances['VAE']:.1f}, VAEBM {distances['VAEBM']:.1f}")
    print(f"AUROC against interpolations: VAE {areas[0]}, VAEBM {areas[1]}")


if __name__ == "__main__":
    main()
