"""Choice of the base prior by the held-out likelihood of encodings."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ncprior.bases.code_network import fit_code_network
from ncprior.bases.codes import fit_code_frequencies
from ncprior.bases.conditional import ConditionalBase
from ncprior.bases.groups import group_data
from ncprior.bases.latents import draws_of, latents_of
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.mixture_em import fit_mixture, is_too_wide
from ncprior.bases.rebase import Rebased, rebase
from ncprior.data.batches import one_pass
from ncprior.data.rows import is_map_style
from ncprior.distributions import num_categories_of
from ncprior.recipe.choices import OWN, Candidate, Choice
from ncprior.recipe.cross_validation import FOLDS, cross_validated
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.recipe.sources import first_group, has_prior
from ncprior.source import LatentSource, device_of, num_rows, posterior_of
from ncprior.utils.supports import support_of

_SIZES = (1, 10)  # numbers of components; heads correct the rest better than more components

_SIZES_OF_FEW = (*_SIZES, 30, 100)  # for data of which heads learn little

_ROWS_PER_COMPONENT = 20  # at least

_FEW_DRAWS = 20_000  # of smaller data, several draws are taken per row

_MOST_DRAWS = 10  # per row

_FEW = 6000  # training rows: half of a thousand held-out rows tell less than all of these

_FEWEST = 10 * FOLDS  # rows for a cross-validation

_SURE = 2.0  # standard errors by which a larger mixture must be better

_AVERAGED = 4  # mixtures of small data

_COUNTED, _NETWORK = "frequencies of codes", "network over codes"

_BATCH = 1000  # rows, as of latents_of
_MOST_AXES = 4  # of rows of codes that a network takes

_SHARE = 0.3  # of the time that is left


def choose_base(
    source: LatentSource[Any, Any],
    parts: Parts,
    record: Record,
    *,
    only: str | None = None,
    name: str = "",
) -> Any:  # noqa: ANN401
    """Returns the source on the base with the highest held-out likelihood of the encodings.

    Candidates are the VAE's own prior, a Gaussian, and a mixture of ten Gaussians, as far as each gains
    two standard errors of the paired difference. With little data, larger mixtures are candidates,
    too, and the average of several mixtures of the best size. With much data, heads on ten components
    end up with a higher likelihood than larger mixtures, with heads or alone. For a grid of codes,
    candidates are the frequencies of the codes and a network over them, which sees the condition. For
    real latents of a VAE with a condition, log p(z | c) of each held-out row is compared with mixtures,
    which do not see c. The prior of several groups, a conditional prior of codes, and that of other
    latents that do not fill R^n stays the VAE's own. A source that the user has rebased has the given
    base in its place.

    With fewer than 6,000 training rows, log p is cross-validated on them, in five folds.

    Arguments:
        source: The VAE.
        parts: The data.
        record: The record of the recipe, to which the choice is added.
        only: Name of the only candidate beside the VAE's own prior, as an earlier choice has it.
        name: Text in front of the choice in the record.
    """
    if reason := _why_not(source, parts):
        record.add(Choice(f"{name}base", _own_name(source), reason))
        return source
    z = posterior_of(first_group(source, parts.choose)).sample()
    kind = _Search if z.is_floating_point() else _CodeSearch
    search = kind(source, parts, record, once=only is not None)
    search.run() if only is None else search.run_again(only)
    record.add(
        Choice(
            part=f"{name}base",
            chosen=search.name,
            reason=f"encodings of held-out data are most likely; a {search.larger} must gain two standard errors",
            candidates=tuple(search.candidates),
            criterion=search.criterion,
            unit="nats",
            seconds=search.seconds(),
        )
    )
    return source if search.best is None else rebase(source, search.best)


class _Search:
    """Search of the base under which encodings of held-out data are most likely.

    Attributes:
        best: The best base so far, or ``None`` for that of the source.
        name: Name of the best base so far.
        candidates: All bases so far, with their held-out log p.
    """

    larger = "larger mixture"
    criterion = "held-out log p"

    def __init__(
        self, source: LatentSource[Any, Any], parts: Parts, record: Record, *, once: bool
    ) -> None:
        self.started, self.record = time.monotonic(), record
        self.took = 0.0  # seconds, for the last candidate
        self.own = source.shared_prior()
        self.is_small = parts.is_small
        self.few = not once and self._are_few(parts)
        if self.few:
            self.criterion = "cross-validated log p"
        self.best: Any = None
        self.name = _own_name(source)
        self.candidates: list[Candidate] = []
        log_p = self._read(source, parts)
        if isinstance(self.own, Distribution):
            with suppress(NotImplementedError):  # a distribution without a density
                log_p = self.own.log_prob(self.compared)
        self.log_p: Tensor | None = log_p  # of the best base, (N,)
        if log_p is not None:
            self._note(self.name, log_p)
        elif has_prior(source, parts.choose):
            self.criterion += f" (unknown for {self.name})"

    def run(self) -> None:
        """Fits larger and larger mixtures, and averages of the best size."""
        for size in _SIZES_OF_FEW if self.is_small else _SIZES:
            if self.log_p is not None and (
                self._is_late() or size * _ROWS_PER_COMPONENT > len(self.z)
            ):
                break
            if not self._try(size) and size > 1:
                break
        size = 1 if self.best is None else len(self.best.logits)
        if size > 1 and self.is_small and not self._is_late():
            self._try(size, _AVERAGED)

    def run_again(self, name: str) -> None:
        """Fits the base that an earlier search has named; the VAE's own prior stays if it is better."""
        for size in _SIZES_OF_FEW:
            for averaged in (1, _AVERAGED):
                if name == self._name(size, averaged):
                    self._try(size, averaged)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    @staticmethod
    def _are_few(parts: Parts) -> bool:
        """Whether candidates are compared by cross-validation of the training rows."""
        known = parts.num_train is not None and is_map_style(parts.train)
        return known and _FEWEST <= (parts.num_train or 0) < _FEW

    def _try(self, size: int, averaged: int = 1) -> bool:
        """Fits a mixture, or an average of some, and keeps it if it is surely better."""
        name, started = self._name(size, averaged), time.monotonic()
        self.record.begin(f"fits {'an' if averaged > 1 else 'a'} {name}")
        fit = partial(self._fit, size=size, averaged=averaged)
        base = fit(self.z)
        new = cross_validated(fit, self.z, self.compared) if self.few else self._log_p(base)
        self.took = time.monotonic() - started
        return self._keep_if_better(name, base, new)

    def _fit(self, z: Tensor, *, size: int, averaged: int) -> GaussianMixture:
        covariance = "diagonal" if self._is_diagonal(size) else "full"
        fitted = [self.best] if averaged > 1 and self.best is not None and z is self.z else []
        while len(fitted) < averaged:
            fitted.append(fit_mixture(z, size, covariance=covariance, held_out=self.held_out))
        return fitted[0] if averaged == 1 else GaussianMixture.average(fitted)

    def _is_diagonal(self, size: int) -> bool:
        return is_too_wide(size, self.z.shape[1:])

    def _name(self, size: int, averaged: int = 1) -> str:
        name = "Gaussian" if size == 1 else f"mixture of {size}"
        if averaged > 1:
            name = f"average of {averaged} {name.replace('mixture', 'mixtures')}"
        return f"{name}, diagonal" if self._is_diagonal(size) else name

    def _read(self, source: LatentSource[Any, Any], parts: Parts) -> Tensor | None:
        """Keeps encodings, several draws per row of small data; returns log p(z | c) of held-out ones."""
        num_draws = 1 if parts.num_train is None else math.ceil(_FEW_DRAWS / parts.num_train)
        self.z = draws_of(source, parts.train, min(_MOST_DRAWS, num_draws))
        log_p = None
        if self.own is None:  # p(z | c) of every row
            self.held_out, log_p = _latents_and_log_p(source, parts.choose)
        else:
            self.held_out = latents_of(source, parts.choose)
        self.compared = self.held_out
        if self.few and self.own is None:
            self.compared, log_p = _latents_and_log_p(source, parts.train)
        elif self.few:
            self.compared = self.z[: parts.num_train]
        return log_p

    def _keep_if_better(self, name: str, base: Distribution, new: Tensor) -> bool:
        self._note(name, new)
        if self.log_p is not None and not _is_better(new, self.log_p):
            return False
        self.best, self.name, self.log_p = base, name, new
        return True

    def _log_p(self, base: Any) -> Tensor:  # noqa: ANN401
        log_p: Tensor = base.log_prob(self.compared)
        return log_p

    def _note(self, name: str, log_p: Tensor) -> None:
        seconds = self.seconds() - sum(it.seconds or 0.0 for it in self.candidates)
        self.candidates.append(_candidate(name, log_p, seconds))

    def _is_late(self) -> bool:
        """Whether the next fit, which takes about three times as long, has too little time."""
        left = self.record.left(_SHARE)
        return left is not None and 3 * self.took > left


class _CodeSearch(_Search):
    """Search of the base for a grid of codes, with a network that sees the condition."""

    larger = "network"

    def run(self) -> None:
        """Counts the codes, and fits a network over them."""
        self._count()
        if 1 < self.z.ndim <= _MOST_AXES:  # of one code, frequencies are all
            self._fit_network()

    def run_again(self, name: str) -> None:
        """Fits the base that an earlier search has named."""
        if name == _COUNTED:
            self._count()
        elif name == _NETWORK:
            self._fit_network()

    def _count(self) -> None:
        count = num_categories_of(self.own)
        frequencies = fit_code_frequencies(self.z, num_categories=count)
        self._keep_if_better(_COUNTED, frequencies, self._log_p(frequencies))

    def _fit_network(self) -> None:
        self.record.begin("fits a network over the codes")
        network = fit_code_network(
            self.z,
            context=self.context,
            num_categories=num_categories_of(self.own),
            max_seconds=self.record.left(_SHARE),
            progress=self.record.progress,
        )
        self._keep_if_better(_NETWORK, network, self._log_p(network))

    @staticmethod
    def _are_few(parts: Parts) -> bool:
        return False  # a network over codes takes minutes

    def _read(self, source: LatentSource[Any, Any], parts: Parts) -> Tensor | None:
        self.z, self.context, _ = group_data(source, parts.train)[0]
        self.compared, self.held_out_context, _ = group_data(source, parts.choose)[0]
        return None

    def _log_p(self, base: Any) -> Tensor:  # noqa: ANN401
        if self.held_out_context is not None and isinstance(base, ConditionalBase):
            rows = torch.arange(len(self.compared), device=self.compared.device)
            base = base.given(self.held_out_context(rows))
        return super()._log_p(base)


def _own_name(source: LatentSource[Any, Any]) -> str:
    return "the given base" if isinstance(source, Rebased) else OWN


def _why_not(source: LatentSource[Any, Any], parts: Parts) -> str:
    """Reason why no base can be fitted, or an empty text."""
    if source.num_groups > 1:
        return f"the VAE has {source.num_groups} groups of latents, each with a prior of its own"
    group = first_group(source, parts.choose)
    z = posterior_of(group).sample()
    if not z.is_floating_point():
        return "the prior of the codes depends on a condition" * (source.shared_prior() is None)
    if z.ndim == 1:
        return "a latent is a number, and a mixture of Gaussians needs an axis, such as (1,)"
    if support := support_of(posterior_of(group)) or support_of(group.prior):
        return f"the latents are {support}, and a mixture of Gaussians is not"
    without = source.shared_prior() is None and not _has_density(group.prior, z)
    return "the prior depends on a condition, and has no density" if without else ""


def _has_density(prior: Any, z: Tensor) -> bool:  # noqa: ANN401
    try:
        return isinstance(prior, Distribution) and prior.log_prob(z) is not None
    except NotImplementedError:
        return False


@torch.no_grad()
def _latents_and_log_p(source: LatentSource[Any, Any], data: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Encodings, one draw per row, with their log p(z | c) in nats."""
    latents, log_p = [], []
    for batch in one_pass(data, _BATCH, device_of(source)):
        encoding = source.encode(batch)
        group = source.group(source.start(num_rows(encoding), encoding))
        prior: Any = group.prior
        latents.append(posterior_of(group).sample())
        log_p.append(prior.log_prob(latents[-1]))
    return torch.cat(latents), torch.cat(log_p)


def _candidate(name: str, log_p: Tensor, seconds: float) -> Candidate:
    mean, half = log_p.mean().item(), 1.96 * _error(log_p)
    return Candidate(name, mean, mean - half, mean + half, seconds)


def _is_better(new: Tensor, old: Tensor) -> bool:
    """Whether log p of a base is surely higher; one that is finite for all rows beats one that is not."""
    finite = (bool(new.isfinite().all()), bool(old.isfinite().all()))
    if not all(finite):
        return finite[0]
    gain = (new - old).cpu().double()
    return gain.mean().item() > _SURE * _error(gain)


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return (values.cpu().double().std() / math.sqrt(len(values))).item()
