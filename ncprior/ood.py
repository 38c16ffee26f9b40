r"""Out-of-distribution detection by unnormalised log-density, and how well it tells data apart.

The score of an image is

.. math::
    \log p_{VAE}(x) + \log \frac{E_{q(z|x)}[w \, r]}{E_{q(z|x)}[w]} - E(x),
    \qquad w = \frac{p(x|z) \, p(z)}{q(z|x)},

log p of VAE, NCP, VAEBM or both, up to a constant that is the same for every x: log Z of each is
left out. Expectations are over the same S draws of z, by importance sampling; log p_VAE is the
lower bound of the importance weighted autoencoder, IWAE-S.

A VAEBM of data with noise, x + σε, knows no images without. Its score is the mean over the noise:
E(x + σε) is averaged over S draws, and the bound on log p_VAE(x), with p(x|z) of this σ, is one on
the mean of log p_VAE(x + σε) too, but for a constant, by Jensen's inequality:

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
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from ncprior.batches import in_order
from ncprior.likelihood import log_likelihood
from ncprior.normaliser import LogZ
from ncprior.prior import NCPrior
from ncprior.source import LatentSource, device_of
from ncprior.vaebm import VAEBM

__all__ = ["AUROC", "OODScore", "auroc", "auroc_gain", "ood_score"]


class OODScore(NamedTuple):
    """Unnormalised log p(x) by its parts, each in nats with shape ``(N,)``.

    Attributes:
        vae: The IWAE-S lower bound of log p(x) of the VAE.
        ncp: What the heads add, 0 without.
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
        """The score: the sum of the parts, larger for what the model takes for its own."""
        return self.vae + self.ncp + self.energy


class AUROC(NamedTuple):
    """Area under the receiver operating characteristic, or a difference of two such areas.

    Attributes:
        value: The area, from 0 to 1, or the difference, from -1 to 1.
        low: Lower end of its interval.
        high: Upper end.
        error: Its standard error.
    """

    value: float
    low: float
    high: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


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
    """Scores images by unnormalised log-density.

    Arguments:
        model: A VAE, an NCP prior on it, or a VAEBM on either. The source needs ``likelihood``, and
            densities of priors and posteriors.
        data: Images: a tensor or map-style dataset, a ``DataLoader``, or a list of batches.
        num_samples: S, the draws of z per image, and of noise where data have any.
        batch_size: Images per batch, where batches are made here.
        chunk_size: Most z at once.
        progress: Whether to show a progress bar.

    Returns:
        The scores by their parts.

    Raises:
        ValueError: If the source does not know p(x | z).
        TypeError: If a prior has no density, or the data can be read only once.

    Example:
        >>> ood_score(VAEBM(prior, lambda x: x.square().sum(1)), x, num_samples=8).total.shape
        torch.Size([4])
    """
    prior = (model.prior or model.source) if isinstance(model, VAEBM) else model
    has_heads = isinstance(prior, NCPrior)
    zero = torch.zeros(1, dtype=torch.float64)
    log_z = LogZ(zero, zero, True, 0, 0, math.nan, 0) if has_heads else None
    parts = []
    for batch in tqdm(in_order(data, batch_size), desc="scores", disable=not progress):
        found = log_likelihood(  # one batch at a time: read again, data might be in another order
            prior, [batch], num_samples=num_samples, log_z=log_z, chunk_size=chunk_size
        )
        vae = found["base"].lower
        ncp = found["ncp"].lower - vae if has_heads else torch.zeros_like(vae)
        energy = vae * 0
        if isinstance(model, VAEBM):
            energy = _energy(model, batch, num_samples).to(vae)
        parts.append((vae, ncp, -energy))
    return OODScore(*map(torch.cat, zip(*parts, strict=True)))


def auroc(inside: Tensor, outside: Tensor, *, level: float = 0.95) -> AUROC:
    """Returns the probability that a score from inside is larger than one from outside.

    Ties count one half. The variance is DeLong's, the interval that of a normal law, cut to [0, 1];
    where every pair is in order it has no width.

    Arguments:
        inside: Scores of in-distribution data, with shape ``(N,)``.
        outside: Scores of other data, with shape ``(N',)``.
        level: Coverage of the interval.

    Returns:
        The area with its interval.

    Raises:
        ValueError: If there are fewer than two scores of either, a NaN, or the level is no share.

    References:
        DeLong et al. (1988), equations 4 and 5

    Example:
        >>> print(auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0])))
        0.917 (0.686 to 1.000)
    """
    above, below = _placements(inside, outside)
    error = math.sqrt((above.var() / len(above) + below.var() / len(below)).item())
    return _with_interval(above.mean().item(), error, level, lowest=0.0)


def auroc_gain(
    inside: Tensor,
    outside: Sequence[Tensor],
    *,
    than: tuple[Tensor, Sequence[Tensor]],
    level: float = 0.95,
) -> AUROC:
    """Returns how much larger the AUROC of one score is than another's, on average over sets.

    Both score the same images, whose variance they share: the difference is paired, image by image.

    Arguments:
        inside: Scores of in-distribution data, with shape ``(N,)``.
        outside: Scores of every other set, each ``(N_k,)``.
        than: The other's scores of the same images in the same order, inside and outside.
        level: Coverage of the interval.

    Returns:
        The mean difference of the areas, with its interval.

    Raises:
        ValueError: As :func:`auroc` does, and if the two scores are not of as many images and sets.

    References:
        DeLong et al. (1988), on correlated areas

    Example:
        >>> inside, outside = torch.tensor([1.0, 2.0, 3.0]), [torch.tensor([0.0, 1.0])]
        >>> print(auroc_gain(inside, outside, than=(inside, outside)))
        0.000 (0.000 to 0.000)
    """
    others, other_outside = than
    if not outside or [len(inside), *map(len, outside)] != [len(others), *map(len, other_outside)]:
        raise ValueError(
            f"A paired difference needs two scores of the same images, of one set outside or more; "
            f"got {len(inside)} inside and {[len(s) for s in outside]} outside, and {len(others)} "
            f"and {[len(s) for s in other_outside]}."
        )
    pairs = [
        (_placements(inside, ours), _placements(others, theirs))
        for ours, theirs in zip(outside, other_outside, strict=True)
    ]
    above = torch.stack([ours[0] - theirs[0] for ours, theirs in pairs]).mean(0)
    below = [(ours[1] - theirs[1]) / len(pairs) for ours, theirs in pairs]
    variance = sum(share.var().item() / len(share) for share in (above, *below))
    return _with_interval(above.mean().item(), math.sqrt(variance), level, lowest=-1.0)


def _with_interval(value: float, error: float, level: float, *, lowest: float) -> AUROC:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}.")
    margin = NormalDist().inv_cdf(0.5 + 0.5 * level) * error
    return AUROC(value, max(lowest, value - margin), min(1.0, value + margin), error)


def _placements(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Of each score, the share of the other kind that it is in order with; their mean is the area."""
    inside, outside = (scores.to("cpu", torch.float64).flatten() for scores in (inside, outside))
    if min(len(inside), len(outside)) < 2:
        raise ValueError(
            f"An AUROC needs two scores or more of either kind; got {len(inside)} inside and "
            f"{len(outside)} outside."
        )
    if inside.isnan().any() or outside.isnan().any():
        raise ValueError("Some scores are NaN. Look at the images they belong to.")
    return _share_below(inside, outside), 1 - _share_below(outside, inside)


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Of each score, the share of others below it, ties counted by half."""
    others = others.sort().values
    ends = [torch.searchsorted(others, scores, right=right) for right in (False, True)]
    return (ends[0] + ends[1]).double() / (2 * len(others))


def _energy(model: VAEBM, batch: Any, num_samples: int) -> Tensor:  # noqa: ANN401
    """E of a batch in nats, ``(B,)``, averaged over the noise on data."""
    x = (batch[0] if isinstance(batch, tuple | list) else batch).to(device_of(model.source))
    if not model.data_noise:
        return model(x)  # type: ignore[no-any-return]
    noisy = (x + model.data_noise * torch.randn_like(x) for _ in range(num_samples))
    return torch.stack([model(one) for one in noisy]).mean(0)
