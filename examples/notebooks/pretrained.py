# %% [markdown]
# # A pretrained model of someone else
#
# Yann Dubois and colleagues published VAEs that they trained for 400 epochs on MNIST, under the MIT licence:
# [disentangling-vae](https://github.com/YannDubs/disentangling-vae). Their weights are a file of 1.9 MB in their repository.
# This notebook gives one of them a better prior, without changing it. Needs the extra `demo`, MNIST, and their repository
# beside your working directory or at `$NCPRIOR_DISENTANGLING`; takes a minute on one core:
#
# ```bash
# git clone --depth 1 https://github.com/YannDubs/disentangling-vae
# ```

# %%
# %matplotlib inline
import os
from functools import partial
from pathlib import Path
from textwrap import fill

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.functional import interpolate

from ncprior import NCPrior, SingleGroup, fit, sir
from ncprior.bases import fit_mixture, latents_of
from ncprior.demo import Classifier, in_batches, plot_samples, read_images
from ncprior.evaluation import gap_closed
from ncprior.testing import check_source
from ncprior.utils import train

torch.manual_seed(0)
folder = Path(os.environ.get("NCPRIOR_DISENTANGLING", "disentangling-vae"))
file = folder / "results/VAE_mnist/model.pt"
weights = torch.load(file, weights_only=True, map_location="cpu")
mnist = read_images("ylecun/mnist", "train").rows(torch.randperm(60_000)[:20_000])
others = read_images("ylecun/mnist", "test").images  # which they did not train on
x_train, x_test = (
    interpolate(x, 32, mode="bilinear", antialias=True)
    for x in (mnist.images, others)  # their size
)
print(*(f"{name}: {tuple(weight.shape)}" for name, weight in weights.items()), sep="\n")

# %% [markdown]
# ## Their network
#
# The names and shapes of the weights show the architecture. We build it from plain layers, and fill in the weights in
# their order. If your model can be imported, you skip this step: call its encoder and decoder directly.


# %%
def conv(channels: int) -> nn.Module:
    return nn.Conv2d(channels, 32, 4, stride=2, padding=1)


def deconv(channels: int) -> nn.Module:
    return nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1)


encoder = nn.Sequential(
    *(conv(1), nn.ReLU(), conv(32), nn.ReLU(), conv(32), nn.ReLU(), nn.Flatten()),
    *(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 20)),
)
decoder = nn.Sequential(
    *(
        nn.Linear(10, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 512),
        nn.ReLU(),
    ),
    *(
        nn.Unflatten(1, (32, 4, 4)),
        deconv(32),
        nn.ReLU(),
        deconv(32),
        nn.ReLU(),
        deconv(1),
        nn.Sigmoid(),
    ),
)
vae = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).eval()
print(vae.load_state_dict(dict(zip(vae.state_dict(), weights.values(), strict=True))))

# %% [markdown]
# ## As a source
#
# Three parts: the prior, the posterior and the decoder. In their code, the outputs of the encoder alternate between a
# mean and a log variance: `view(-1, 10, 2)`. Such details are worth a look at the model's own code; `check_source` tests
# the rest, and reconstructions show at once whether they are right.


# %%
def posterior(x: Tensor) -> Independent:
    mean, log_var = encoder(x).view(-1, 10, 2).unbind(-1)
    return Independent(Normal(mean, (0.5 * log_var).exp()), 1)


base = Independent(Normal(torch.zeros(10), torch.ones(10)), 1)
source = SingleGroup(base, posterior, decoder, module=vae)
check_source(source, x_test[:16])
with torch.no_grad():
    reconstructions = decoder(posterior(x_test[:16]).sample())
    samples = decoder(base.sample((16,)))
plot_samples({"data": x_test[:16], "reconstructions": reconstructions, "samples": samples})

# %% [markdown]
# ## A better prior
#
# A classifier learns to tell encodings from draws of N(0, I). For comparison, a mixture of ten Gaussians is fitted to the
# encodings. (`improve(source, x_train)` would try both and combine them, in some minutes.)

# %%
prior = NCPrior.for_source(source, x_train[:256])
print(fill(str(fit(prior, x_train, steps=800, progress=False)), 88))
mixture = fit_mixture(latents_of(source, x_train), 10)

# %% [markdown]
# The new prior draws by sampling-importance-resampling: each sample is chosen among 200 proposals. `prior.disabled()`
# switches the classifier off; samples are then those of the old prior, bit for bit.

# %%
with prior.disabled():
    old = prior.sample(4000).x
new = prior.sample(4000, partial(sir, num_proposals=200)).x
mixed = in_batches(decoder, mixture.sample((4000,)))
rows = {"data": x_test, "their prior": old, "mixture": mixed, "new prior": new}
plot_samples({name: x[:16] for name, x in rows.items()})

# %% [markdown]
# ## How much of the hole is closed?
#
# We compare Fréchet distances on the features of a small classifier of the images: 0 % is their prior, and 100 % is as good as
# decoded encodings.

# %%
judge = Classifier(28, num_features=32)
small = interpolate(x_train, 28, mode="bilinear", antialias=True)


def misfit(rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(judge(small[rows]), mnist.labels[rows])


train(judge, misfit, len(small), steps=200, batch_size=128, progress=False)


def features(x: Tensor) -> Tensor:
    return in_batches(judge.features, interpolate(x, 28, mode="bilinear", antialias=True))


decoded = in_batches(lambda x: decoder(posterior(x).sample()), x_train[:4000])
ends = {"base": features(old).chunk(5), "posterior": features(decoded).chunk(5)}
for name, x in {"mixture": mixed, "new prior": new}.items():
    print(f"{name}: {gap_closed(features(x_test), ours=features(x).chunk(5), **ends)}")

# %% [markdown]
# Next: [your own VAE](../../docs/vae.md), or [when something else is better](../../docs/comparison.md).
