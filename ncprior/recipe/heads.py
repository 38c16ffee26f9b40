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
from ncprior.recipe.parts import Parts, draws_slowly, has_condition
from ncprior.recipe.record import Record
from ncprior.recipe.score_term import has_scores
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


_LARGE = _Kind(1, 0.1, 1e-2)

_SMALL = (_Kind(2, 0.2, 0.1), _Kind(8, 0.3, 0.3))  # tried besides where data is scarce


def train_heads(
    source: LatentSource[Any, Any], parts: Parts, record: Record, folder: Path | None
) -> NCPrior:
    """Returns a prior with trained heads; with little data, the best of several sizes of heads.

    Heads are trained until their held-out losses stop improving. The size is chosen by the held-out
    loss, summed over groups. In the folder, if there is one, the trainings are saved.
    """
    batch = spread_rows(parts.train, _PROBED)
    kinds = (_LARGE, *_SMALL) if parts.is_small else (_LARGE,)
    untrained = NCPrior(source, more_heads(source, batch)).eval()
    widest = _default_width(untrained)
    score_weight = _SCORE_WEIGHT if has_scores(untrained, batch) else 0.0
    precision = fast_precision(device_of(source))
    started = time.monotonic()
    found: list[tuple[NCPrior, History, Candidate]] = []
    for number, kind in enumerate(kinds):
        if found and record.is_over():
            break
        before = time.monotonic()
        width = widest // kind.fraction
        name = f"width {width}, dropout {kind.dropout:g}, weight decay {kind.weight_decay:g}"
        record.begin(f"trains heads: {name} ({number + 1} of {len(kinds)})")
        heads = more_heads(source, batch, width=width, dropout=kind.dropout)
        prior = NCPrior(source, heads).eval()
        file = None if folder is None else folder / f"heads-{number}"
        history = fit(
            prior,
            parts.train,
            held_out=parts.choose,
            steps=_MOST_WITH_SCORES if score_weight else _MOST_STEPS,
            patience=parts.patience,
            max_seconds=time_limit(file, record.left(_SHARE / (len(kinds) - number))),
            checkpoint=file,
            progress=record.progress,
            settings=FitSettings(
                weight_decay=kind.weight_decay,
                score_weight=score_weight,
                precision=precision,
                **_caches(source, parts, record),
            ),
        )
        found.append((prior, history, _candidate(name, history, time.monotonic() - before)))
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
            part="heads",
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


def _caches(source: LatentSource[Any, Any], parts: Parts, record: Record) -> dict[str, Any]:
    """Settings under which walks, and draws of a base that is slow to sample, are reused."""
    if not draws_slowly(source):
        several = source.num_groups > 1
        return walk_cache(source, parts, record, _WALK_EPOCHS) if several else {}
    if has_condition(source, parts) or source.num_groups > 1:  # a draw of its own for each row
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
