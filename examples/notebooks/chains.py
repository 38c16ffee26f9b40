# %% [markdown]
# # Chains of an energy, as an animation
#
# VAEBM puts an energy on the images of a frozen VAE. A sample starts as a draw of the VAE, and a short Langevin chain
# moves it downhill in the energy. This notebook trains such an energy and shows the chains step by step. Needs the
# extra `demo`; takes a minute on one core.

# %%
# %matplotlib inline
import torch
from IPython import display
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ncprior.demo import VAE, digits, plot_samples, split
from ncprior.utils import train
from ncprior.vaebm import VAEBM, EnergyNet, GaussianDecoder, fit_vaebm

torch.manual_seed(0)
data, held_out = split(digits(), 300, seed=0)
vae = VAE(8, latents=6, counts=16)


def negative_elbo(rows: Tensor) -> Tensor:
    return vae.negative_elbo(data.images[rows]).mean()


train(vae, negative_elbo, len(data.images), steps=1500, batch_size=128, progress=False)

# %% [markdown]
# ## The energy
#
# It is a small convolutional network, low on data and high where chains end. The decoder and the data get noise of the
# same σ, so that the energy cannot tell them apart by their sharpness alone.

# %%
sigma = 0.12
source = GaussianDecoder(vae.source(), sigma)
model = VAEBM(source, EnergyNet((1, 8, 8), width=16), step_size=0.05, data_noise=sigma)
print(fit_vaebm(model, data.images, steps=300, progress=False))

# %% [markdown]
# ## The chains
#
# All chains start from the noise that makes z and x, and go 24 steps, a little further than in training.

# %%
torch.manual_seed(1)
noise = model.draw_noise(32)
frames = []
for _ in range(25):
    chains = model.run_chains(noise, num_steps=0 if not frames else 1)
    noise = chains.noise
    frames.append(chains.mean.detach())
plot_samples({f"after {step} steps": frames[step][:16] for step in (0, 4, 8, 16, 24)})


# %%
def picture(images: Tensor, columns: int = 8, scale: int = 6) -> Image.Image:
    """Images side by side, dark on white."""
    large = interpolate(1 - images.clamp(0, 1), scale_factor=scale)
    large = torch.nn.functional.pad(large, (scale, scale, scale, scale), value=1.0)
    lines = [torch.cat(list(part), 2) for part in large.split(columns)]
    return Image.fromarray((torch.cat(lines, 1)[0] * 255).byte().numpy())


film = [picture(frame) for frame in frames]
film[0].save(
    "chains.gif",
    save_all=True,
    append_images=film[1:],
    duration=[800] + [160] * 23 + [1600],
    loop=0,
)
display.Image("chains.gif")

# %% [markdown]
# The animation shows 32 chains of 24 steps. Many digits change little: they were good already. Others move from a
# mixture of two digits to one of them. This energy was trained for seconds; `examples/vaebm.py` trains longer and measures it.
#
# [Energies on images](../../docs/energies.md) explains the choices, and
# [the benchmarks](../../examples/benchmarks/RESULTS.md#energies-on-images) say whether it is worth it.
