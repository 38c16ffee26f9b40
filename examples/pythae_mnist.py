"""A pythae VAE: NCP next to pythae's own Gaussian mixture sampler, and on top of it.

    pip install -c constraints.txt '.[pythae,demo]'
    python examples/pythae_mnist.py                   # MNIST, about 7 minutes on one core
    python examples/pythae_mnist.py --data digits     # scikit-learn's 8×8 digits, about a minute

Trains a VAE of pythae with its default networks, fits pythae's GaussianMixtureSampler to it, and
trains two ratio heads: on the VAE's own N(0, I), and on the sampler's mixture, which is a base like
any other: rebase(source, GaussianMixture.from_sklearn(sampler.gmm)). Prints the gap that each
prior closes: Fréchet distances to held-out images, on features of a classifier trained
here, between those of N(0, I) (0 %) and of decoded posterior samples of training images (100 %).
MNIST, seed 0: NCP 80 %, pythae's mixture 88 %, NCP on that mixture 95 %.

Where MNIST can be had from neither $NCPRIOR_DATA nor the Hugging Face Hub, it takes the digits.
"""

import argparse
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ncprior import LatentSource, NCPrior, fit, sir
from ncprior.bases import GaussianMixture, rebase
from ncprior.demo import Classifier, Labelled, digits, draw_arms, in_batches, read_images, split
from ncprior.evaluation import gap_closed, gap_difference
from ncprior.training import FitSettings
from ncprior.utils import train

try:
    from pythae.models import VAE, VAEConfig
    from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig

    from ncprior.adapters.pythae import PythaeSource
except ImportError as error:
    raise SystemExit(
        f"This example needs pythae ({error}): pip install '.[pythae,demo]' in the clone"
    ) from None


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    latents: int
    vae_steps: int
    classifier_steps: int
    head_steps: int
    num_features: int
    num_samples: int
    width: int
    proposals: int


SETTINGS = {
    "mnist": Settings(16, 9000, 900, 2500, 64, 4000, 128, 300),
    "digits": Settings(8, 2500, 500, 800, 16, 2000, 64, 100),
}


def read(name: str, seed: int) -> tuple[str, Labelled, Labelled]:
    """The data set's name, its training images and its held-out images."""
    if name == "mnist":
        try:
            data, test = (read_images("ylecun/mnist", part) for part in ("train", "test"))
        except FileNotFoundError as error:
            print(f"{error}\nTaking the digits instead.")
        else:
            return name, *(part.rows(torch.randperm(len(part.labels))) for part in (data, test))
    return "digits", *split(digits(), 600, seed)


def trained_vae(x: Tensor, latents: int, steps: int) -> VAE:
    """A VAE of pythae with its default perceptrons and Bernoulli pixels."""
    config = VAEConfig(input_dim=x.shape[1:], latent_dim=latents, reconstruction_loss="bce")
    vae = VAE(config)

    def loss(rows: Tensor) -> Tensor:
        return vae({"data": x[rows]}).loss

    train(vae, loss, len(x), steps=steps, batch_size=128, learning_rate=1e-3, name="VAE")
    return vae


def trained_classifier(data: Labelled, num_features: int, steps: int) -> Classifier:
    classifier = Classifier(data.images.shape[-1], num_features=num_features)

    def loss(rows: Tensor) -> Tensor:
        return cross_entropy(classifier(data.images[rows]), data.labels[rows])

    train(classifier, loss, len(data.labels), steps=steps, batch_size=128, name="classifier")
    return classifier


def trained_prior(
    source: LatentSource, x: Tensor, *, width: int, steps: int, name: str
) -> NCPrior:
    prior = NCPrior.for_source(source, x[:500], width=width, dropout=0.1)
    settings = FitSettings(weight_decay=0.1)
    history = fit(prior, x, steps=steps, eval_every=steps // 20, settings=settings)
    print(f"head on {name}: {history}")
    return prior


def pythaes_own(
    sampler: GaussianMixtureSampler, features: nn.Module, count: int, generations: int
) -> list[Tensor]:
    """Features of what pythae's sampler itself draws; it takes its randomness from NumPy."""
    drawn = []
    for seed in tqdm(torch.randint(2**31, (generations,)).tolist(), desc="pythae's sampler"):
        np.random.seed(seed)
        drawn.append(in_batches(features, sampler.sample(count)))
    return drawn


def percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=SETTINGS, default="mnist", help="default: %(default)s")
    parser.add_argument("--components", type=int, default=10, help="components of the mixture")
    parser.add_argument("--proposals", type=int, help="M of SIR")
    parser.add_argument("--generations", type=int, default=5, help="generations of every arm")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--quick", action="store_true", help="a tenth of all steps, to try it out")
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)
    name, data, test = read(options.data, options.seed)
    settings, part = SETTINGS[name], 10 if options.quick else 1

    vae = trained_vae(data.images, settings.latents, settings.vae_steps // part)
    classifier = trained_classifier(data, settings.num_features, settings.classifier_steps // part)
    sampler = GaussianMixtureSampler(
        vae, GaussianMixtureSamplerConfig(n_components=options.components)
    )
    sampler.fit(data.images)

    source = PythaeSource(vae)
    closer = rebase(source, GaussianMixture.from_sklearn(sampler.gmm))
    options.proposals = options.proposals or settings.proposals
    heads = partial(
        trained_prior, x=data.images, width=settings.width, steps=settings.head_steps // part
    )
    on_normal = heads(source, name="N(0, I)")
    on_mixture = heads(closer, name="the mixture")

    draw = partial(
        draw_arms,
        sampler=partial(sir, num_proposals=options.proposals),
        x=data.images,
        features=classifier.features,
        num_samples=settings.num_samples,
        generations=options.generations,
    )
    arms, _ = draw(on_normal)
    more, _ = draw(on_mixture)
    own = pythaes_own(sampler, classifier.features, settings.num_samples, options.generations)
    reference = in_batches(classifier.features, test.images)
    compare = partial(gap_closed, reference, base=arms["base prior"], posterior=arms["posterior"])
    results = {
        "NCP": compare(ours=arms["NCP"]),
        f"pythae's GMM-{options.components}": compare(ours=own),
        f"NCP on GMM-{options.components}": compare(ours=more["NCP"]),
    }
    first = results["NCP"]
    print(
        f"\npythae VAE on {name}, {settings.latents} latents; M = {options.proposals}; "
        f"{options.generations} generations of {settings.num_samples} samples, "
        f"{settings.num_features} features; 95 % intervals, for one training.\n"
        f"\n{'prior':<16} {'distance':>8}   gap closed\n"
        f"{'N(0, I)':<16} {first.d_base:>8.2f}   0 %"
    )
    for prior, result in results.items():
        closed = percent(result.gap_closed, result.low, result.high)
        print(f"{prior:<16} {result.d_ours:>8.2f}   {closed}")
    print(f"{'posterior':<16} {first.d_post:>8.2f}   100 %\n")
    _, mixture, both = results.values()
    for label, a, b in (("NCP", first, mixture), ("NCP on the mixture", both, mixture)):
        print(f"{label} less pythae's mixture: {percent(*gap_difference(a, b))}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
