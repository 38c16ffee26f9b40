"""Training of heads on the chosen base, regularised as the amount of data demands."""

from __future__ import annotations

import math
import time
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from ncprior.data.batches import spread_rows
from ncprior.heads.probe import more_heads
from ncprior.prior import NCPrior
from ncprior.recipe.caches import walk_cache
from ncprior.recipe.choices import Candidate, Choice
from ncprior.recipe.files import heads_file
from ncprior.recipe.parts import Parts
from ncprior.recipe.record import Record
from ncprior.recipe.score_term import has_scores
from ncprior.recipe.sources import draws_slowly, has_condition
from ncprior.source import LatentSource, device_of
from ncprior.training.fit import fit
from ncprior.training.gating import gate
from ncprior.training.history import History
from ncprior.training.resumable import time_limit
from ncprior.training.settings import FitSettings
from ncprior.training.stages import cache_size
from ncprior.utils.precision import fast_precision

_PROBED = 512  # rows for the shapes and scales of a head

_MOST_STEPS = 10_000  # if held-out losses still improve

_MOST_WITH_SCORES = 6_000  # steps, which take as long

_SCORE_WEIGHT = 10.0

_SHARE = 0.6  # of the time that is left

_PER_ROW = 2  # cached draws of a base that is slow to sample, per row of training data

_CACHED = (2000, 50_000)  # of them, at least and at most

_WALK_EPOCHS = 2  # for which a walk through several groups is cached


class _Kind(NamedTuple):
    """Size and regularisation of heads; narrower ones have a fraction of the default width."""

    fraction: int
    dropout: float
    weight_decay: float

    def named(self, widest: int) -> str:
        """Name of heads of this kind, for a default width."""
        width = widest // self.fraction
        return f"width {width}, dropout {self.dropout:g}, weight decay {self.weight_decay:g}"


_LARGE = _Kind(1, 0.1, 1e-2)

_SMALL = (_Kind(2, 0.2, 0.1), _Kind(8, 0.3, 0.3))  # tried besides where data is scarce


def train_heads(
    source: LatentSource[Any, Any],
    parts: Parts,
    record: Record,
    folder: Path | None,
    *,
    only: str | None = None,
    name: str = "",
) -> NCPrior:
    """Returns a prior with trained heads; with little data, the best of several sizes of heads.

    Heads are trained until their held-out losses stop improving. The size is chosen by the held-out
    loss, summed over groups.

    Arguments:
        source: The VAE on its base.
        parts: The data.
        record: The record of the recipe, to which the choice and the best history are added.
        folder: The folder where the trainings are saved, if any.
        only: Name of the only size, as an earlier choice has it.
        name: Text in front of the choice in the record, and of the names of files.
    """
    batch = spread_rows(parts.train, _PROBED)
    untrained = NCPrior(source, more_heads(source, batch)).eval()
    widest = _default_width(untrained)
    kinds = {
        kind.named(widest): kind for kind in ((_LARGE, *_SMALL) if parts.is_small else (_LARGE,))
    }
    if only is not None:
        kinds = {only: kinds[only]}
    score_weight = _SCORE_WEIGHT if has_scores(untrained, batch) else 0.0
    precision = fast_precision(device_of(source))
    started, limit = time.monotonic(), record.left(_SHARE)
    found: list[tuple[NCPrior, History, Candidate]] = []
    for number, (title, kind) in enumerate(kinds.items()):
        if found and record.is_over():
            break
        before = time.monotonic()
        record.begin(f"trains heads: {title} ({number + 1} of {len(kinds)})")
        width = widest // kind.fraction
        heads = more_heads(source, batch, width=width, dropout=kind.dropout)
        prior = NCPrior(source, heads).eval()
        file = heads_file(folder, name, number)
        history = fit(
            prior,
            parts.train,
            held_out=parts.choose,
            steps=_MOST_WITH_SCORES if score_weight else _MOST_STEPS,
            patience=parts.patience,
            max_seconds=time_limit(file, _part(limit, before - started, len(kinds) - number)),
            checkpoint=file,
            progress=record.progress,
            settings=FitSettings(
                weight_decay=kind.weight_decay,
                score_weight=score_weight,
                precision=precision,
                **_caches(source, parts, record),
            ),
        )
        found.append((prior, history, _candidate(title, history, time.monotonic() - before)))
    prior, history, best = min(found, key=lambda one: one[2].score)
    off = gate(prior, history)
    chosen, reason = best.name, f"the lowest NCE loss of held-out data; {history.stopped}"
    reason += f"; with{'' if score_weight else 'out'} the score term"
    if len(off) == source.num_groups:
        chosen, reason = "none", f"heads have learnt nothing for sure; {history.stopped}"
    elif off:
        reason += f"; groups {list(off)} have learnt nothing for sure and keep the base"
    record.histories.append(history)
    record.add(
        Choice(
            part=f"{name}heads",
            chosen=chosen,
            reason=reason,
            candidates=tuple(candidate for _, _, candidate in found),
            criterion="held-out NCE loss",
            unit="nats",
            higher_is_better=False,
            seconds=time.monotonic() - started,
        )
    )
    return prior


def _part(limit: float | None, spent: float, count: int) -> float | None:
    """Seconds of the next of so many trainings, which share the time that is left."""
    return None if limit is None else max(0.1, limit - spent) / count


def _caches(source: LatentSource[Any, Any], parts: Parts, record: Record) -> dict[str, Any]:
    """Settings under which walks, and draws of a base that is slow to sample, are reused."""
    if not draws_slowly(source):
        several = source.num_groups > 1
        return walk_cache(source, parts, record, _WALK_EPOCHS) if several else {}
    if source.num_groups > 1 or has_condition(source, parts.choose):  # a draw for each row
        return {"cache_epochs": math.inf}
    return {"num_cached_proposals": cache_size(parts.num_train, _PER_ROW, _CACHED)}


def _default_width(prior: NCPrior) -> int:
    """The default width of the heads, such as 64 of feature maps; the least of several kinds."""
    kinds = {type(head) for head in prior.heads}
    widths: list[int] = [signature(kind).parameters["width"].default for kind in kinds]
    return min(widths)


def _candidate(name: str, history: History, seconds: float) -> Candidate:
    losses, errors = history.best_loss or [], history.best_error or []
    loss, half = sum(losses), 1.96 * sum(errors)  # at most: all groups have the same rows
    return Candidate(name, loss, loss - half, loss + half, seconds)
