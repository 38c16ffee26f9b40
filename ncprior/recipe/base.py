"""Choice of the base prior by the held-out likelihood of encodings."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ncprior.bases.latents import latents_of
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.mixture_em import MOST_NUMBERS, fit_mixture
from ncprior.bases.rebase import rebase
from ncprior.recipe.choices import Candidate, Choice
from ncprior.recipe.parts import Parts, first_group, has_condition
from ncprior.recipe.record import Record
from ncprior.source import LatentSource, posterior_of

_SIZES = (1, 10, 30, 100, 300)  # numbers of components

_ROWS_PER_COMPONENT = 20  # at least

_FEW_DRAWS = 20_000  # of smaller data, each row is drawn from several times

_SURE = 2.0  # standard errors by which a larger mixture must be better

_SHARE = 0.3  # of the time that is left


def choose_base(source: LatentSource[Any, Any], parts: Parts, record: Record) -> Any:  # noqa: ANN401
    """Returns the source on the base with the highest held-out likelihood of the encodings.

    Candidates are the VAE's own prior, a Gaussian, and mixtures of more and more Gaussians, up to
    the first size that gains nothing by two standard errors of the paired difference. The prior of
    several groups, of codes, or with a context stays the VAE's own.
    """
    if reason := _why_not(source, parts):
        record.add(Choice("base", "the VAE's own prior", reason))
        return source
    started, end = time.monotonic(), record.left(_SHARE)
    z, held_out = _encodings(source, parts), latents_of(source, parts.choose)
    own = source.shared_prior()
    candidates, best, log_p = [], None, None
    if isinstance(own, Distribution):
        log_p = own.log_prob(held_out)
        candidates.append(_candidate(_OWN, log_p, 0.0))
    for size in _SIZES:
        took = time.monotonic() - started
        is_late = end is not None and 3 * took > end
        if candidates and (is_late or size * _ROWS_PER_COMPONENT > len(z)):
            break
        is_wide = size * z[0].numel() ** 2 > MOST_NUMBERS
        covariance = "diagonal" if is_wide else "full"
        mixture = fit_mixture(z, size, covariance=covariance, held_out=held_out)
        new = mixture.log_prob(held_out)
        candidates.append(_candidate(_name(mixture), new, time.monotonic() - started - took))
        if log_p is not None and not _is_better(new, log_p):
            if size > 1:
                break
            continue
        best, log_p = mixture, new
    chosen = _OWN if best is None else _name(best)
    record.add(
        Choice(
            *("base", chosen, "the highest likelihood of encodings of held-out data"),
            candidates=tuple(candidates),
            criterion="held-out log p",
            unit="nats",
            seconds=time.monotonic() - started,
        )
    )
    return source if best is None else rebase(source, best)


_OWN = "the VAE's own prior"


def _name(mixture: GaussianMixture) -> str:
    size = len(mixture.logits)
    name = "Gaussian" if size == 1 else f"mixture of {size}"
    return name if mixture.is_full else f"{name}, diagonal"


def _why_not(source: LatentSource[Any, Any], parts: Parts) -> str:
    """Reason why no base can be fitted, or an empty text."""
    if source.num_groups > 1:
        return f"the VAE has {source.num_groups} groups of latents, each with its own prior"
    if has_condition(source, parts):
        return "the prior depends on a condition"
    z = posterior_of(first_group(source, parts)).sample()
    return "" if z.is_floating_point() else "the latents are codes"


def _encodings(source: LatentSource[Any, Any], parts: Parts) -> Tensor:
    """Encodings of the training data, with several draws per row of small data."""
    z = latents_of(source, parts.train)
    passes = min(10, math.ceil(_FEW_DRAWS / len(z)))
    return torch.cat([z, *(latents_of(source, parts.train) for _ in range(passes - 1))])


def _candidate(name: str, log_p: Tensor, seconds: float) -> Candidate:
    mean, half = log_p.mean().item(), 1.96 * _error(log_p)
    return Candidate(name, mean, mean - half, mean + half, seconds)


def _is_better(new: Tensor, old: Tensor) -> bool:
    gain = (new - old).cpu().double()
    return gain.mean().item() > _SURE * _error(gain)


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return (values.cpu().double().std() / math.sqrt(len(values))).item()
