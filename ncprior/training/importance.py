"""Importance resamples in `fit`: one step of EM, with particles that are cached for some epochs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ncprior.data.batches import first_batch, one_pass
from ncprior.data.encodings import CachedEncodings, EncodedSource
from ncprior.data.rows import Rows
from ncprior.heads.checks import naming_parts
from ncprior.prior import NCPrior
from ncprior.source import device_of
from ncprior.training.checkpoints import is_finite, is_like
from ncprior.training.particles import ResampledPosterior, ess_of
from ncprior.utils.batches import own_batch
from ncprior.utils.distributed import rank
from ncprior.utils.gradients import share_weights
from ncprior.utils.random_state import seeded
from ncprior.utils.states import tensors_of

_FEWEST = 2.0  # effective particles; with fewer, most rows have one particle with all the weight


class EStep(NamedTuple):
    """The E step of a training.

    Attributes:
        source: The VAE with particles under the prior with which the training began.
        heads: The heads of that prior.
        ess: Effective sample size of the particles of a row, on average.
    """

    source: ResampledPosterior
    heads: nn.ModuleList
    ess: float


def e_step(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    num_samples: int,
    *,
    batch_size: int,
    seed: int,
    saved: Mapping[str, Any] | None,
) -> EStep:
    """Returns the E step, after a look at the particles of the first batch.

    Arguments:
        prior: The prior that is trained.
        data: The training data.
        num_samples: S, the draws of q(z | x) per row.
        batch_size: Rows that the VAE decodes at once.
        seed: Seed of the first look; the generators outside stay as they are.
        saved: A checkpoint, whose heads of the beginning are taken if it has them, or ``None``. The
            checkpoint is validated when the training resumes.

    Raises:
        TypeError: If a prior or posterior has no density.
        ValueError: If the source has no likelihood, or all draws of q(z | x) are equal.

    Warns:
        UserWarning: If the effective sample size is below 2.
    """
    source = ResampledPosterior(prior, num_samples, chunk_size=batch_size)
    began = source.prior
    assert began is not None  # as a prior was given, of which it is a copy
    heads, begun = tensors_of(began.heads), None if saved is None else saved.get("begun")
    if begun is not None and is_like(begun, heads) and is_finite(begun):
        for name, tensor in heads.items():
            tensor.copy_(begun[name])
    share_weights(began)
    with naming_parts(prior.source, prior.heads):
        return EStep(source, began.heads, _mean_ess(source, data, batch_size, seed))


def _mean_ess(resampled: ResampledPosterior, data: Any, batch_size: int, seed: int) -> float:  # noqa: ANN401
    """Effective sample size of the particles, averaged over the rows of the first batch."""
    device = device_of(resampled)
    with seeded(seed):
        encoding = resampled.encode(own_batch(first_batch(data, batch_size), device))
    if all(bool((z == z[:, :1]).all()) for z in encoding.latents):
        raise ValueError(
            "Importance samples are draws of q(z | x) with different weights; got draws that are all "
            "equal, as of an encoder without noise. Leave importance_samples out."
        )
    ess = ess_of(encoding.log_w).mean().item()
    if ess < _FEWEST:
        warnings.warn(
            f"Of {resampled.num_samples} importance samples per row, {ess:.1f} are effective: the "
            f"particles are closer to q(z | x) than to the posterior under the prior. Pass more "
            f"importance_samples.",
            stacklevel=4,
        )
    return ess


class CachedParticles(CachedEncodings):
    """Cache of the particles of all rows of a data set, renewed from time to time.

    The encodings themselves are cached, also with several groups: a row keeps all of its particles,
    of which every step draws one. All ranks make the same particles.

    Arguments:
        source: A source with importance resamples as its posterior, or one with another base on it.
        data: The data, as for :func:`ncprior.data.one_pass`.
        progress: Whether to show a progress bar of each pass.
        options: Further arguments of :class:`ncprior.data.CachedEncodings`.
    """

    def __init__(self, source: Any, data: Any, *, progress: bool, **options: Any) -> None:  # noqa: ANN401
        self.progress = progress
        super().__init__(source, data, **options)

    def renewal(self, epochs: float) -> Callable[[int], None] | None:
        """Returns a function of the batch index that renews the cache every ``epochs`` epochs."""
        return None if math.isinf(epochs) else self._every(epochs)

    def _kind(self) -> type[EncodedSource]:
        return EncodedSource

    @torch.no_grad()
    def _walk(self, device: torch.device) -> Iterator[Any]:
        batches = one_pass(self.data, self.batch_size, device)
        disable = not self.progress or rank() > 0
        for x in tqdm(batches, desc="particles", unit=" batches", disable=disable):
            yield self.vae.encode(x)


def epochs_of_particles(
    data: Any,  # noqa: ANN401
    epochs: float | Literal["auto"] | None,
    ess: float,
    *,
    rows_drawn: float,
) -> float | None:
    """Returns the number of epochs for which particles are cached, or ``None`` for no cache.

    Arguments:
        data: The training data.
        epochs: The number asked for. ``"auto"`` is their effective sample size, for rows of a
            tensor that are read twice or more: then each particle is used about once.
        ess: Effective sample size of the particles of a row.
        rows_drawn: Rows in all batches of the training; infinite if it is not known.

    Example:
        >>> epochs_of_particles(torch.zeros(100, 3), "auto", 5.7, rows_drawn=1000)
        5
    """
    if epochs != "auto":
        return epochs
    again = isinstance(data, Tensor | Rows) and rows_drawn >= 2 * len(data)
    return max(1, int(ess)) if again else None
