# %% [markdown]
# # Cells
#
# SCVI of scvi-tools is a VAE of gene counts. Cells drawn from its prior N(0, I) lie between the cell types. This
# notebook trains a small SCVI on 500 of 700 blood cells that scanpy ships, and gives it a better prior. Needs
# the extras `cells` and `plot`; takes less than a minute on one core.

# %%
# %matplotlib inline
import warnings
from functools import partial

import numpy as np
import scanpy
import scvi
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from ncprior import NCPrior, fit, sir
from ncprior.adapters.scvi import SCVISource
from ncprior.bases import fit_mixture, latents_of, rebase
from ncprior.demo import discriminant_axes, plot_latents
from ncprior.evaluation import two_sample_test

warnings.simplefilter("ignore")  # of the libraries
scvi.settings.seed = 0
read = scanpy.datasets.pbmc68k_reduced()
counts = csr_matrix(read.raw.X).expm1()  # it ships logarithms of normalised counts
least = np.minimum.reduceat(counts.data, counts.indptr[:-1])  # one molecule of each cell
counts.data = (counts.data / np.repeat(least, np.diff(counts.indptr))).round()
cells = AnnData(counts.astype(np.float32))
cells.obs["type"] = read.obs["bulk_labels"].to_numpy()
cells = cells[np.random.default_rng(0).permutation(len(cells))].copy()
cells, new = (
    cells[:500].copy(),
    cells[500:].copy(),
)  # new cells stop the training of a head, and judge it
print(cells)

# %% [markdown]
# ## The model, as usual

# %%
scvi.model.SCVI.setup_anndata(cells)
model = scvi.model.SCVI(cells, n_latent=6, n_hidden=64)
model.train(max_epochs=120, accelerator="cpu", enable_progress_bar=False, logger=False)
source = SCVISource(model)

# %% [markdown]
# ## The hole
#
# Encodings of the cell types are islands; the prior is one round cloud.

# %%
loader = source.loader(batch_size=128, shuffle=True)
latents = torch.as_tensor(model.get_latent_representation(give_mean=False))
types = torch.as_tensor(cells.obs["type"].astype("category").cat.codes.to_numpy()).long()
axes = discriminant_axes(latents, types)
plot_latents({"the VAE's prior": torch.randn(500, 6), "encodings": latents}, axes)

# %% [markdown]
# ## A mixture, and a head on it
#
# With 500 cells a mixture of few components is the right size for a base; the head corrects what it has missed.

# %%
encodings = latents_of(source, loader)
stopping, judging = (source.loader(new, indices=range(*rows)) for rows in ((0, 100), (100, 200)))
based = rebase(source, fit_mixture(encodings, 10))
prior = NCPrior.for_source(based, next(iter(loader)), width=32)
fit(prior, loader, held_out=stopping, steps=300, progress=False)
prior.sampler = partial(sir, num_proposals=50)

# %% [markdown]
# Counts depend on the library size of a cell. It is a condition, read from real cells:

# %%
some = next(iter(source.loader(batch_size=256)))
drawn = prior.sample(256, condition=source.condition(some), draw_x=True)
plot_latents({"the new prior": drawn.latents[0], "encodings": latents}, axes)

# %% [markdown]
# A classifier tells draws of N(0, I) from encodings of new cells easily. 0.5 would mean that it cannot tell them apart:

# %%
judge = latents_of(source, judging)
for name, z in {"N(0, I)": torch.randn(256, 6), "new prior": drawn.latents[0]}.items():
    print(f"{name}: {two_sample_test(judge, z, folds=2)}")

# %% [markdown]
# [Single cells](../../docs/cells.md) has conditions, minified models and measurements on two data sets. With more cells, call
# `improve(source, loader, held_out=...)`, which chooses base, head and sampler.
