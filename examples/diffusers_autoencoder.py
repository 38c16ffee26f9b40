"""An autoencoder of diffusers: a prior where there is none, and how much better heads make it.

    pip install -c constraints.txt '.[diffusers,demo]'
    python examples/diffusers_autoencoder.py                  # MNIST, about 15 minutes on one core
    python examples/diffusers_autoencoder.py --data digits    # scikit-learn's 8×8 digits, 3 minutes

Trains a small AutoencoderKL on the squared error plus 1e-6 times KL(q, N(0, I)), as such models are
trained for latent diffusion: N(0, I) is no prior of its latents, and DiffusersSource says so. A full
Gaussian fitted to the latents is one, a mixture a closer one, and a ratio head improves that. Prints
how much of what the fitted Gaussian leaves open the other two close: Fréchet distances to held-out
images, on features of a classifier trained here, between those of the fitted Gaussian (0 %) and of
decoded posterior samples of training images (100 %). MNIST, seed 0: the mixture 97 %, NCP on it
97 %.

Where MNIST can be had from neither $NCPRIOR_DATA nor the Hugging Face Hub, it takes the digits.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ncprior import LatentSource, NCPrior, fit, sir
from ncprior.bases import fit_gaussian, fit_mixture, latents_of, rebase
from ncprior.demo import Classifier, Labelled, digits, draw_arms, in_batches, read_images, split
from ncprior.evaluation import gap_closed
from ncprior.heads import MLPHead
from ncprior.training import FitSettings
from ncprior.utils import train

try:
    from diffusers import AutoencoderKL

    from ncprior.adapters.diffusers import DiffusersSource
except ImportError as error:
    raise SystemExit(
        f"This example needs diffusers ({error}): pip install '.[diffusers,demo]' in the clone"
    ) from None


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    margin: int  # pixels put around an image, so that its size is a multiple of the model's factor
    widths: tuple[int, ...]  # channels at every size; each but the last is followed by a halving
    model_steps: int
    classifier_steps: int
    head_steps: int
    num_features: int
    num_samples: int


SETTINGS = {
    "mnist": Settings(2, (16, 32, 32, 32), 900, 900, 2500, 64, 2000),
    "digits": Settings(0, (16, 32), 1000, 500, 600, 16, 2000),
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


def trained_autoencoder(
    x: Tensor, *, widths: tuple[int, ...], channels: int, steps: int
) -> AutoencoderKL:
    """An AutoencoderKL whose KL term has next to no weight."""
    model = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=8,
        layers_per_block=1,
        mid_block_add_attention=False,
    )

    def loss(rows: Tensor) -> Tensor:
        q = model.encode(x[rows]).latent_dist
        error = (model.decode(q.sample()).sample - x[rows]).square().sum((1, 2, 3))
        return (error + 1e-6 * q.kl()).mean()

    train(model, loss, len(x), steps=steps, batch_size=64, name="AutoencoderKL")
    return model


def trained_classifier(data: Labelled, num_features: int, steps: int) -> Classifier:
    classifier = Classifier(data.images.shape[-1], num_features=num_features)

    def loss(rows: Tensor) -> Tensor:
        return cross_entropy(classifier(data.images[rows]), data.labels[rows])

    train(classifier, loss, len(data.labels), steps=steps, batch_size=128, name="classifier")
    return classifier


@torch.no_grad()
def from_base(
    source: LatentSource, features: Callable[[Tensor], Tensor], generations: int, count: int
) -> list[Tensor]:
    """Features of what is drawn from a source's own prior."""

    def draw() -> Tensor:
        state = source.start(count)
        return source.decode(source.advance(state, source.group(state).prior.sample()))

    return [features(draw()) for _ in range(generations)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=SETTINGS, default="mnist", help="default: %(default)s")
    parser.add_argument("--channels", type=int, default=2, help="channels of the 4×4 latents")
    parser.add_argument("--width", type=int, default=256, help="width of the head")
    parser.add_argument("--proposals", type=int, default=500, help="M of SIR")
    parser.add_argument("--generations", type=int, default=5, help="generations of every arm")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--quick", action="store_true", help="a tenth of all steps, to try it out")
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    name, data, test = read(options.data, options.seed)
    settings, part = SETTINGS[name], 10 if options.quick else 1

    x = 2 * pad(data.images, (settings.margin,) * 4) - 1  # as diffusers takes images
    model = trained_autoencoder(
        x, widths=settings.widths, channels=options.channels, steps=settings.model_steps // part
    )
    classifier = trained_classifier(data, settings.num_features, settings.classifier_steps // part)

    source = DiffusersSource(model)
    z = latents_of(source, x)
    gaussian, mixture = (rebase(source, base) for base in (fit_gaussian(z), fit_mixture(z, 50)))
    # On maps of 4×4 a perceptron costs a fraction of a convolutional head.
    prior = NCPrior.for_source(mixture, x[:500], kind=MLPHead, width=options.width, dropout=0.1)
    steps = settings.head_steps // part
    schedule = {"steps": steps, "batch_size": 128, "eval_every": max(1, steps // 20)}
    # An encoder costs more than the head: four draws of z per image make better use of it.
    rarer = FitSettings(num_draws=4, weight_decay=0.1)
    history = fit(prior, x, learning_rate=2e-3, settings=rarer, **schedule)
    print(f"head: {history}")

    def features(images: Tensor) -> Tensor:
        """Features of what is inside the margin, in [0, 1]."""
        images = pad(images, (-settings.margin,) * 4)
        return classifier.features((images.clamp(-1, 1) + 1) / 2)

    arms, first = draw_arms(
        prior,
        partial(sir, num_proposals=options.proposals),
        x,
        features=features,
        num_samples=settings.num_samples,
        generations=options.generations,
    )
    drawn = {
        "fitted Gaussian": from_base(
            gaussian, features, options.generations, settings.num_samples
        ),
        "mixture of 50": arms["base prior"],
        "NCP on it": arms["NCP"],
    }
    reference = in_batches(classifier.features, test.images)
    shape = "×".join(map(str, first["NCP"].latents[0].shape[1:]))
    print(
        f"\nAutoencoderKL on {name}, latents {shape}; M = {options.proposals} "
        f"(ESS {first['NCP'].ess.mean():.0f}); {options.generations} generations of "
        f"{settings.num_samples} samples, {settings.num_features} features; 95 % intervals, for one "
        f"training.\n"
    )
    common = {"base": drawn["fitted Gaussian"], "posterior": arms["posterior"]}
    for prior_name, ours in drawn.items():
        if prior_name != "fitted Gaussian":
            gap = gap_closed(reference, ours=ours, **common)
            closed = f"{100 * gap.gap_closed:.1f} % ({100 * gap.low:.1f} to {100 * gap.high:.1f})"
            print(f"{prior_name:<16} {gap.d_ours:>8.2f}   {closed}")
    print(f"{'fitted Gaussian':<16} {gap.d_base:>8.2f}   0 %")
    print(f"{'posterior':<16} {gap.d_post:>8.2f}   100 %")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
