r"""Out-of-distribution (OOD) scores: the unnormalised log-density of images.

The score of an image is

.. math::
    \log p_{VAE}(x) + \log \frac{E_{q(z|x)}[w \, r]}{E_{q(z|x)}[w]} - E(x),
    \qquad w = \frac{p(x|z) \, p(z)}{q(z|x)},

the log-density of x under the VAE, NCP, VAEBM or VAEBM on NCP, without log Z, which is the same
for every x. Both expectations are importance-sampling estimates over the same S draws of z; log
p_VAE is the lower bound of the importance weighted autoencoder, IWAE-S.

A VAEBM of noisy data, x + σε, is trained on noisy images only. Its score is the mean over the
noise: E(x + σε) is averaged over S draws of ε. By Jensen's inequality, the bound on log p_VAE(x),
with p(x|z) of the same σ, is up to a constant also a bound on the mean of log p_VAE(x + σε):

.. math::
    E_ε \log E_{q(z|x)} [w(x + σε)] \ge
    \log E_{q(z|x)} \exp E_ε \log w(x + σε) = \log E_{q(z|x)} [w(x)] - \tfrac{1}{2} D.

References:
    | VAEBM: A Symbiosis between Variational Autoencoders and Energy-based Models
    | (Xiao, Kreis, Kautz & Vahdat, ICLR 2021), table 6
    | Importance Weighted Autoencoders (Burda et al., ICLR 2016)
    | Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves
    | (DeLong, DeLong & Clarke-Pearson, 1988)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from ncprior.data.batches import one_pass
from ncprior.data.checked import checked_batches
from ncprior.evaluation.likelihood import log_likelihood
from ncprior.evaluation.normaliser import LogZ
from ncprior.prior import NCPrior
from ncprior.source import LatentSource, device_of, require_source
from ncprior.utils.precision import at_least_float32
from ncprior.utils.require import require_counts, require_flags
from ncprior.vaebm.checks import require_steady_energy
from ncprior.vaebm.model import VAEBM


class OODScore(NamedTuple):
    """Unnormalised log p(x) as a sum of terms, each in nats with shape ``(N,)``.

    Attributes:
        vae: The IWAE-S lower bound of log p(x) of the VAE.
        ncp: Contribution of the ratio heads; 0 without heads.
        energy: -E(x), or its mean over the noise on data; 0 without an energy.

    Example:
        >>> OODScore(torch.ones(2), torch.ones(2), -torch.ones(2)).total
        tensor([1., 1.])
    """

    vae: Tensor
    ncp: Tensor
    energy: Tensor

    @property
    def total(self) -> Tensor:
        """The score: the sum of the terms, larger for in-distribution images."""
        return self.vae + self.ncp + self.energy


@torch.no_grad()
def ood_score(
    model: VAEBM | NCPrior | LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    *,
    num_samples: int = 32,
    batch_size: int = 50,
    chunk_size: int = 4096,
    progress: bool = False,
) -> OODScore:
    """Out-of-distribution scores of images, by unnormalised log-density.

    Arguments:
        model: A VAE, an NCP prior on it, or a VAEBM on either. The source needs ``likelihood``,
            and densities of its priors and posteriors.
        data: Images: a tensor or map-style dataset, a ``DataLoader``, or a list of batches.
        num_samples: S, the draws of z per image, and of the noise on data if the model has any.
        batch_size: Images per batch, where batches are made here.
        chunk_size: Largest number of z in memory at once.
        progress: Whether to show a progress bar.

    Returns:
        The scores with their terms.

    Raises:
        ValueError: If the source has no method ``likelihood``, a number is out of range, or the
            data has no rows or NaN.
        TypeError: If a prior has no density, the data can be read only once, or an argument has
            the wrong type.
        FloatingPointError: If a weight or an energy is NaN or infinite.

    Example:
        >>> ood_score(VAEBM(prior, lambda x: x.square().sum(1)), x, num_samples=8).total.shape
        torch.Size([4])
    """
    require_counts(num_samples=num_samples, batch_size=batch_size, chunk_size=chunk_size)
    require_flags(progress=progress)
    prior = (model.prior or model.source) if isinstance(model, VAEBM) else model
    source = prior.source if isinstance(prior, NCPrior) else prior
    require_source(source)
    has_heads = isinstance(prior, NCPrior)
    zero = torch.zeros(1, dtype=torch.float64)
    log_z = LogZ(zero, zero, True, 0, 0, math.nan) if has_heads else None
    terms = []
    batches = tqdm(one_pass(data, batch_size), desc="scores", disable=not progress)
    for batch in checked_batches(batches, device_of(source)):
        found = log_likelihood(  # one batch at a time, as the order of the data may differ in a second pass
            prior, [batch], num_samples=num_samples, log_z=log_z, chunk_size=chunk_size
        )
        vae = found["base"].lower
        ncp, energy = torch.zeros_like(vae), torch.zeros_like(vae)
        if has_heads:
            ncp = torch.where(vae > -math.inf, found["ncp"].lower - vae, ncp)
        if isinstance(model, VAEBM):
            energy = _energy(model, batch, num_samples).to(vae)
        terms.append((vae, ncp, -energy))
    return OODScore(*map(torch.cat, zip(*terms, strict=True)))


def _energy(model: VAEBM, batch: Any, num_samples: int) -> Tensor:  # noqa: ANN401
    """Energy of a batch in nats, ``(B,)``, averaged over the noise on data."""
    require_steady_energy(model.energy)
    x = model.source.observed(batch)
    x = at_least_float32(x) if x.is_floating_point() else x.float()
    if model.data_noise:
        noisy = (x + model.data_noise * torch.randn_like(x) for _ in range(num_samples))
        energy = torch.stack([model(one) for one in noisy]).mean(0)
    else:
        energy = model(x)
    if not torch.isfinite(energy).all():
        raise FloatingPointError(
            "The energy is NaN or infinite for some rows. Look for NaN or infinity in its weights."
        )
    return energy.cpu()
