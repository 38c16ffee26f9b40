"""Remaining gap of a prior: new classifiers tell its draws from encodings of held-out data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncprior.bases.joint import JointSource
from ncprior.data.batches import one_pass, spread_rows, until
from ncprior.data.encodings import CachedGroupsSource, drawn_once
from ncprior.data.stream import Stream
from ncprior.diagnostics.calibration import Mean
from ncprior.diagnostics.walks import evaluating
from ncprior.heads.probe import more_heads
from ncprior.heads.product import factors, fresh_head
from ncprior.prior import NCPrior
from ncprior.recipe.caches import draws_in_time, draws_to_store, walk_cache
from ncprior.recipe.choices import BASE, GROUPS, NEW, OLD, Candidate, Choice, Score
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.recipe.sources import OWN_DRAW, draws_slowly, has_condition, off
from ncprior.samplers.base import Sampler
from ncprior.source import LatentSource, device_of
from ncprior.training.fit import fit
from ncprior.training.held_out import HeldOut, mean_and_error
from ncprior.training.settings import FitSettings
from ncprior.training.stages import cache_size, nested
from ncprior.utils.batches import to_device
from ncprior.utils.precision import fast_precision

_STEPS = 1000

_FEWEST = 0.5  # of the steps; a classifier with fewer misses too much

_SHARE = 0.25  # of the time that is left, for the classifiers of one prior

_FEWEST_SECONDS = 2.0  # for them

_CACHED = (2000, 20_000)  # draws that are made once, at least and at most

_CACHED_WALKS = (2000, 10_000)  # through all groups, which take long

_PER_ROW = 10  # of them per row of training data

_BATCH = 256

_PROBED = 512  # rows for the shapes and scales of new heads

_Z = 1.96  # standard errors of a 95 % interval

NO_TIME = "there was too little time to compare draws with encodings"


class Divergences(NamedTuple):
    """Jensen-Shannon divergences of encodings and draws, in nats, with standard errors.

    Attributes:
        groups: That of every group.
        total: Their sum, at least 0. All groups have the same rows, which its error knows.
        num_rows: N, the rows that they are measured on.
    """

    groups: list[Mean]
    total: Mean
    num_rows: int

    def interval(self) -> Score:
        """Returns the sum with its 95 % interval, at least 0.

        The best classifier's estimate of a small divergence D has the variance D/N, so that D is
        inside up to z²/N even if the estimate is 0, with the same for every row.
        """
        value, half = self.total.value, _Z * self.total.error
        most = max(half, _Z**2 / max(self.num_rows, 1))
        return Score(value, max(0.0, value - half), value + most)

    @classmethod
    def of(cls, losses: Tensor) -> Divergences:
        """Divergences log 2 - L/2, from NCE losses L with shape ``(K, N)``.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        for k, loss in enumerate(losses):
            if wrong := int((~loss.isfinite()).sum()):
                raise FloatingPointError(
                    f"The divergence of group {k} is unknown: a classifier's loss of {wrong} of "
                    f"{len(loss)} held-out rows is not finite. Look for NaN, infinity or huge numbers "
                    f"in the output of the encoder for these rows, and leave them out."
                )
        groups = [cls._sum_of(loss) for loss in losses[:, None]]
        value, error = cls._sum_of(losses)
        return cls(groups, Mean(max(0.0, value), error), losses.shape[1])

    @staticmethod
    def _sum_of(losses: Tensor) -> Mean:
        (loss,), (error,) = mean_and_error(losses.sum(0, keepdim=True))
        return Mean(len(losses) * math.log(2) - loss / 2, error / 2)


_UNKNOWN = Divergences([], Mean(0.0, 0.0), 0)


class Gap(NamedTuple):
    """Jensen-Shannon divergence of encodings and draws, for every group.

    Attributes:
        choose: On the data for choices.
        judge: On the data for the report.
        num_steps: Steps that the classifiers were trained for.
        seconds: Time that they took.
    """

    choose: Divergences
    judge: Divergences
    num_steps: int
    seconds: float = 0.0

    @property
    def is_measured(self) -> bool:
        """Whether there was time to train the classifiers."""
        return self.num_steps >= _FEWEST * _STEPS

    @property
    def is_sure(self) -> bool:
        """Whether it is surely more than nothing on the data for choices."""
        return is_worse(self.choose.total, Mean(0.0, 0.0))

    def is_worse_than(self, other: Gap) -> bool:
        """Whether both are measured, and it is surely larger on the data for choices."""
        measured = self.is_measured and other.is_measured
        return measured and is_worse(self.choose.total, other.choose.total)

    def is_less_than(self, other: Gap) -> bool:
        """Whether both are measured, and it is less on the data for choices."""
        measured = self.is_measured and other.is_measured
        return measured and self.choose.total.value < other.choose.total.value


def is_worse(after: Mean, before: Mean, among: int = 1) -> bool:
    """Whether a divergence is surely larger than another one; by more, among several such pairs.

    One pair is sure from two standard errors on. Among several pairs, as many are taken as leave the
    same chance that any of them is worse by chance alone.
    """
    sure = NormalDist().inv_cdf(1 - NormalDist().cdf(-2.0) / among)
    return after.value - before.value > sure * math.hypot(after.error, before.error)


def kept(chosen: str, reason: str, gaps: Mapping[str, Gap], seconds: float) -> Choice:
    """Returns the choice of the prior to keep, by the gaps of the candidates that were measured."""
    candidates = (
        Candidate(name, *gap.choose.interval()) for name, gap in gaps.items() if gap.is_measured
    )
    return Choice(
        part="keep",
        chosen=chosen,
        reason=reason,
        candidates=tuple(candidates),
        criterion="remaining gap (JSD)",
        unit="nats",
        higher_is_better=False,
        seconds=seconds,
    )


def measure_gaps(
    prior: NCPrior,
    sampler: Sampler,
    bases: Mapping[str, LatentSource[Any, Any]],
    parts: Parts,
    record: Record,
) -> dict[str, Gap]:
    """Returns the gaps of the bases' own draws and of the new prior, by their names.

    A prior without heads that are on has the gap of its base. Where there is too little time to
    measure one gap, the further ones are not measured either.

    Arguments:
        prior: The new prior.
        sampler: Its sampler.
        bases: The sources that it must beat, the closest last, see :func:`bases_of`.
        parts: The data.
        record: The record of the recipe.
    """
    arms: list[tuple[str, NCPrior, Sampler]] = [
        (name, off(NCPrior(source, prior.heads)), OWN_DRAW) for name, source in bases.items()
    ]
    if any(prior.active):
        arms.append((NEW, prior, sampler))
    gaps: list[Gap] = []
    for name, arm, draw in arms:
        if gaps and not gaps[-1].is_measured:
            gaps.append(Gap(_UNKNOWN, _UNKNOWN, gaps[-1].num_steps))
        else:
            gaps.append(remaining_gap(arm, draw, parts, record, name=name))
    names = [name for name, _, _ in arms]
    return {**dict(zip(names, gaps, strict=True)), NEW: gaps[-1]}


def remaining_gap(
    prior: NCPrior, sampler: Sampler, parts: Parts, record: Record, *, name: str
) -> Gap:
    """Returns the gap that the draws of a prior leave to the encodings.

    New heads are trained to tell encodings of the training data from the draws, and measured on
    held-out data. They see all that base, heads, sampler and strength have left. The divergence is
    a lower bound, and 0 if the new heads find nothing.
    """
    device = device_of(prior.source)
    single = prior.source.num_groups == 1 and not has_condition(prior.source, parts.choose)
    of_walks = isinstance(prior.source, JointSource)
    limits = _CACHED_WALKS if of_walks else _CACHED
    count = draws_to_store(prior.source, cache_size(parts.num_train, _PER_ROW, limits))
    used, left, started = parts, record.left(_SHARE), time.monotonic()
    record.begin(f"trains a classifier to tell draws of the {name} from encodings")
    with evaluating(prior):
        source: LatentSource[Any, Any] = nested(prior, sampler)
        if single and left is not None:
            least, count = min(count, limits[0]), draws_in_time(source, count, left / 2)
            if count < least:
                return Gap(_UNKNOWN, _UNKNOWN, 0, time.monotonic() - started)
        if source.num_groups > 1 or (draws_slowly(prior.source) and not single):
            source, used = _with_draws(source, parts, None if left is None else left / 2)
        if left is not None:
            left = max(_FEWEST_SECONDS, left - (time.monotonic() - started))
        fresh = NCPrior(source, _fresh_heads(prior, parts)).eval()
        history = fit(
            fresh,
            used.train,
            held_out=used.choose,
            steps=_STEPS,
            patience=parts.patience,
            max_seconds=left,
            progress=record.progress,
            settings=FitSettings(
                num_cached_proposals=count if single else None,
                precision=fast_precision(device),
                **(walk_cache(prior.source, parts, record, math.inf) if of_walks else {}),
            ),
        )
        choose, judge = (
            Divergences.of(HeldOut(rows, fresh, _BATCH, int(torch.randint(2**31, ())))(device))
            for rows in (used.choose, used.judge)
        )
    return Gap(
        choose,
        judge,
        history.rows[-1].step if history.rows else 0,
        time.monotonic() - started,
    )


def _fresh_heads(prior: NCPrior, parts: Parts) -> Iterable[nn.Module]:
    """Untrained heads like those of a prior, or the package's own if theirs cannot be made anew."""
    if all(hasattr(factors(head)[0], "config") for head in prior.heads):
        return map(fresh_head, prior.heads)
    return more_heads(prior.source, spread_rows(parts.train, _PROBED))


def _with_draws(
    source: LatentSource[Any, Any], parts: Parts, seconds: float | None
) -> tuple[LatentSource[Any, Any], Parts]:
    """Source and data with one walk, and one draw of every group, per row.

    Later groups are drawn given z_<k of an encoding, and slow bases given a condition. At every step of a
    training, such draws would take most of its time.
    """
    device, budget = device_of(source), FitSettings().cache_memory * 2**30
    count = cache_size(parts.num_train, _PER_ROW, _CACHED)
    drawn: dict[str, Any] = {}
    for name, batches, share in (
        ("train", Stream(parts.train, _BATCH), 0.5),
        ("choose", one_pass(parts.choose, _BATCH), 0.25),
        ("judge", one_pass(parts.judge, _BATCH), 0.25),
    ):
        end = math.inf if seconds is None else time.monotonic() + share * seconds
        drawn[name] = drawn_once(source, _some(batches, device, count, end), budget=budget)
    return CachedGroupsSource(source), parts._replace(**drawn)


def _some(batches: Iterable[Any], device: torch.device, count: int, end: float) -> Iterator[Any]:
    """Batches until there are that many rows, or until the end of the time; at least one."""
    for batch in until(batches, count):
        yield to_device(batch, device)
        if time.monotonic() > end:
            return


def share_closed(before: Mean, after: Mean) -> tuple[float, float, float]:
    """Part of a divergence that is gone, with its 95 % interval.

    A classifier that finds nothing returns a constant, whose loss hardly varies. The error of the
    gap before then stands for its own.
    """
    share = 1 - after.value / before.value
    finds_nothing = after.value <= 2 * after.error
    error = max(after.error, before.error) if finds_nothing else after.error
    relative = math.hypot(error, (1 - share) * before.error) / before.value
    return share, share - _Z * relative, share + _Z * relative


def verdict(gaps: Mapping[str, Gap]) -> str:
    """The result in one or two sentences that need no knowledge of the method."""
    before, after = next(gaps[arm] for arm in (OLD, BASE, GROUPS, NEW) if arm in gaps), gaps[NEW]
    steps = min(before.num_steps, after.num_steps)
    if not (before.is_measured and after.is_measured):
        return (
            f"The prior hole was not measured. There was time for {steps} of the {_STEPS:,} steps "
            f"of the classifiers that measure it. Allow more time."
        )
    return in_words(before.judge.total, after.judge.total)


def in_words(before: Mean, after: Mean) -> str:
    """The part of the divergence that is gone, in words; before and after in nats."""
    found = (
        f"Between samples of the prior and encodings of held-out data, a classifier measured a "
        f"Jensen-Shannon divergence of {before.value:.3f} nats before, and {after.value:.3f} nats now."
    )
    if before.value <= 2 * before.error:
        worse = " before, but the new prior has one" if is_worse(after, before) else ""
        return f"No prior hole was found{worse}. {found}"
    share, low, high = (round(100 * min(1.0, part)) for part in share_closed(before, after))
    if share < 0:
        return f"The prior hole has grown by {-share} % ({-high} to {-low}). {found}"
    return f"Prior hole closed: {share} % ({low}–{high}). {found}"
