# %% [markdown]
# # Digit by digit
#
# A small VAE of handwritten digits, its prior hole, and a better prior, with a picture of every step. Needs the
# extra `demo`; takes a minute on one core.

# %%
# %matplotlib inline
from textwrap import fill

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ncprior import improve
from ncprior.demo import (
    VAE,
    Classifier,
    digits,
    discriminant_axes,
    in_batches,
    plot_latents,
    plot_samples,
    split,
)
from ncprior.evaluation import frechet_distance
from ncprior.utils import train

torch.manual_seed(0)
data, held_out = split(digits(), 300, seed=0)
print(f"{len(data.images):,} images for training, {len(held_out.images)} held out")

# %% [markdown]
# ## An ordinary VAE
#
# It has six latents with the prior N(0, I), and is trained on the plain ELBO. Nothing in it knows of `ncprior`.

# %%
vae = VAE(8, latents=6, counts=16)


def negative_elbo(rows: Tensor) -> Tensor:
    return vae.negative_elbo(data.images[rows]).mean()


train(vae, negative_elbo, len(data.images), steps=1500, batch_size=128, progress=False)
source = vae.source()

# %% [markdown]
# Reconstructions are good, and samples are not. Both rows come from the same decoder: only z differs.

# %%
with torch.no_grad():
    reconstructions = vae.decode(vae.posterior(held_out.images[:16]).sample())
    samples = vae.decode(vae.prior().sample((16,)))
plot_samples(
    {"data": held_out.images[:16], "reconstructions": reconstructions, "samples": samples}
)

# %% [markdown]
# ## The prior hole
#
# The encodings of the digits lie in clusters. The prior is one round cloud, which also covers the empty regions
# between them. The decoder was never trained there.

# %%
encodings = in_batches(lambda x: vae.posterior(x).sample(), data.images)
axes = discriminant_axes(encodings, data.labels)
plot_latents({"the VAE's prior": vae.prior().sample((1500,)), "encodings": encodings}, axes)

# %% [markdown]
# ## A better prior
#
# One call fits base priors and trains classifiers, and keeps what is better on held-out encodings. With so few images,
# a mixture of Gaussians is enough here, and no classifier is kept.

# %%
prior = improve(source, data.images, seed=0, progress=False)
print(fill(prior.report.verdict, 88))

# %%
clouds = {"the new prior": prior.sample(1500).latents[0], "encodings": encodings}
plot_latents(clouds, axes)

# %% [markdown]
# ## Digit by digit
#
# A classifier of the training images says which digit a sample shows. For each digit, the Fréchet distance compares the
# features of such samples with those of the training images, which decoded encodings partly copy.

# %%
judge = Classifier(8, num_features=12)


def misfit(rows: Tensor) -> Tensor:
    return cross_entropy(judge(data.images[rows]), data.labels[rows])


train(judge, misfit, len(data.images), steps=500, batch_size=128, progress=False)


def of_digit(images: Tensor, digit: int) -> Tensor:
    return images[in_batches(judge, images).argmax(1) == digit]


def distances(images: Tensor) -> list[float]:
    """For each digit, the Fréchet distance of the images that show it to those of the data."""
    real = [in_batches(judge.features, data.images[data.labels == d]) for d in range(10)]
    shown = [in_batches(judge.features, of_digit(images, d)) for d in range(10)]
    return [frechet_distance(*pair).item() for pair in zip(shown, real, strict=True)]


old = in_batches(vae.decode, vae.prior().sample((5000,)))
new = prior.sample(5000).x
decoded = in_batches(vae.decode, encodings)
found = {"old prior": old, "new prior": new, "decoded encodings": decoded}
print("Fréchet distance  ", *(f"{d:>5}" for d in range(10)), "  mean")
for name, images in found.items():
    numbers = distances(images)
    print(f"{name:18}", *(f"{it:5.1f}" for it in [*numbers, sum(numbers) / 10]))

# %% [markdown]
# The first samples that are taken for each digit, not picked by quality. Many of the old prior's lie between two digits:


# %%
plot_samples(
    {
        f"{d}, {name}": of_digit(x, d)[:16]
        for d in range(10)
        for name, x in (("old", old), ("new", new))
    }
)

# %% [markdown]
# ## Keep it
#
# The file holds the new prior alone, nothing of the VAE. [Get started](../../docs/start.md) has the same steps for your own
# VAE, and [the report](../../docs/diagnosis.md) explains the numbers.

# %%
prior.save_pretrained("digits-prior")
