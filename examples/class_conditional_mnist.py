"""A class-conditional VAE on MNIST whose ratio head sees the label, and samples of one class.

    NCPRIOR_DATA=... python examples/class_conditional_mnist.py    # about 10 minutes on one core
    python examples/class_conditional_mnist.py --digit 7 --out seven

The VAE's encoder and decoder see the label and its prior, N(0, I), does not: each class has a hole
of its own. `SingleGroup(condition=...)` picks the label out of a batch; the head gets it as context,
and `prior.sample(..., condition=...)` draws the class that is asked for. Prints the gap closed with
its interval, and how often a classifier agrees with the class that was asked for.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from ncprior import NCPrior, SingleGroup, fit, sir
from ncprior.demo import (
    ARMS,
    Classifier,
    Labelled,
    draw_arms,
    in_batches,
    plot_samples,
    read_images,
)
from ncprior.evaluation import gap_closed
from ncprior.utils import train


class ConditionalVAE(nn.Module):
    """q(z | x, c), p(x | z, c) and p(z) = N(0, I): a perceptron on grey 28×28 images."""

    def __init__(self, latents: int = 16, width: int = 512) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(784 + 10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.to_posterior = nn.Linear(width, 2 * latents)
        self.decoder = nn.Sequential(
            nn.Linear(latents + 10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.to_pixels = nn.Linear(width, 784)
        self.latents = latents

    def posterior(self, x: Tensor, c: Tensor) -> Distribution:
        """Returns q(z | x, c) of images ``(B, 1, 28, 28)`` and classes ``(B, 10)``."""
        h = self.to_posterior(self.encoder(torch.cat([x.flatten(1), c], dim=1)))
        mean, log_var = h.chunk(2, dim=1)
        return Independent(Normal(mean, (0.5 * log_var).exp()), 1)

    def logits(self, z: Tensor, c: Tensor) -> Tensor:
        """Returns the logits of p(x | z, c)."""
        return self.to_pixels(self.decoder(torch.cat([z, c], dim=1))).unflatten(1, (1, 28, 28))

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """Returns the mean of p(x | z, c)."""
        return self.logits(z, c).sigmoid()

    def prior(self) -> Distribution:
        """Returns p(z)."""
        return Independent(Normal(torch.zeros(self.latents), torch.ones(self.latents)), 1)

    def negative_elbo(self, x: Tensor, c: Tensor) -> Tensor:
        """Returns the negative ELBO in nats, ``(B,)``."""
        q = self.posterior(x, c)
        misfit = binary_cross_entropy_with_logits(self.logits(q.rsample(), c), x, reduction="none")
        return misfit.flatten(1).sum(1) + kl_divergence(q, self.prior())


def train_networks(data: Labelled, epochs: int) -> tuple[ConditionalVAE, Classifier]:
    """Trains the VAE on the plain ELBO, and the classifier whose features judge its samples."""
    vae, classifier = ConditionalVAE(), Classifier(28, num_features=64)
    classes = one_hot(data.labels, 10).float()

    def negative_elbo(rows: Tensor) -> Tensor:
        return vae.negative_elbo(data.images[rows], classes[rows]).mean()

    def misfit(rows: Tensor) -> Tensor:
        return cross_entropy(classifier(data.images[rows]), data.labels[rows])

    steps = len(data.labels) // 128
    do = partial(train, num_rows=len(data.labels), batch_size=128)
    do(vae, negative_elbo, steps=epochs * steps, name="VAE", learning_rate=1e-3)
    do(classifier, misfit, steps=2 * steps, name="classifier")
    return vae, classifier


def shuffled(data: Labelled) -> Labelled:
    """Returns the data in random order."""
    return data.rows(torch.randperm(len(data.labels)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digit", type=int, default=7, choices=range(10), help="the class shown")
    parser.add_argument("--quick", action="store_true", help="a tenth of the training")
    parser.add_argument("--out", type=Path, default=Path("class-conditional"), metavar="DIR")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    epochs, steps, samples = (2, 400, 2000) if options.quick else (20, 4000, 10_000)

    data = shuffled(read_images("ylecun/mnist", "train"))
    test = shuffled(read_images("ylecun/mnist", "test"))
    vae, classifier = train_networks(data, epochs)

    source = SingleGroup(
        vae.prior(), vae.posterior, vae.decode, module=vae, condition=lambda batch: batch[1]
    )
    x = (data.images, one_hot(data.labels, 10).float())  # a batch is (images, classes)
    probe = (x[0][:512], x[1][:512])
    prior = NCPrior.for_source(source, probe, width=256, dropout=0.1)
    rows = torch.utils.data.TensorDataset(*x)
    print(fit(prior, rows, steps=steps, batch_size=512))

    sampler = partial(sir, num_proposals=200)
    agreement = {}

    def features(images: Tensor) -> Tensor:
        return classifier.features(images)

    generated, first = draw_arms(
        prior,
        sampler,
        x,
        features=features,
        num_samples=samples,
        generations=5,
        condition=lambda batch: batch[1],
    )
    base, ours, posterior = (generated[arm] for arm in ARMS)
    gap = gap_closed(in_batches(features, test.images), base=base, ours=ours, posterior=posterior)

    asked = one_hot(torch.arange(10).repeat_interleave(200), 10).float()
    for name in ("base prior", "NCP"):
        with prior.disabled() if name == "base prior" else torch.no_grad():
            drawn = prior.sample(len(asked), sampler, condition=asked).x
        right = in_batches(classifier, drawn).argmax(1) == asked.argmax(1)
        agreement[name] = 100 * right.double().mean().item()

    one_class = asked[asked.argmax(1) == options.digit][:16]
    with prior.disabled():
        before = prior.sample(16, sampler, condition=one_class).x
    after = prior.sample(16, sampler, condition=one_class).x
    real = data.images[data.labels == options.digit][:16]
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = {f"data, class {options.digit}": real, "base prior": before, "NCP": after}
    plot_samples(pictures).savefig(options.out / "one-class.png", dpi=150)
    prior.save_pretrained(options.out / "prior")

    print(f"Fréchet distance: base {gap.d_base:.1f}, NCP {gap.d_ours:.1f}, floor {gap.d_post:.1f}")
    print(f"ESS of 200 proposals: {first['NCP'].ess.mean():.0f}")
    print(
        f"classified as the class that was asked for: base prior {agreement['base prior']:.1f} %, "
        f"NCP {agreement['NCP']:.1f} % (2,000 samples each)"
    )
    print(gap)


if __name__ == "__main__":
    main()
