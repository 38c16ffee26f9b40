"""Training of all stages of one `fit`: the first heads, and further ones on the remaining gap."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from ncprior.data.batches import first_batch, one_pass
from ncprior.data.device_loader import Loader
from ncprior.data.encodings import CachedEncodings, epochs_to_cache
from ncprior.data.stream import Stream
from ncprior.heads.product import ProductHead, factors, fresh_head
from ncprior.prior import NCPrior
from ncprior.saving.identity import heads_on
from ncprior.source import LatentSource, device_of, num_rows
from ncprior.trainer import NCETrainer
from ncprior.training.head_training import HeadTraining
from ncprior.training.held_out import HeldOut
from ncprior.training.history import History, Row
from ncprior.training.importance import CachedParticles, EStep, epochs_of_particles
from ncprior.training.resumable import BY_CALLBACK, length_of, load, weights_of
from ncprior.training.settings import FitSettings, TrainingTerms
from ncprior.training.stages import cache_size, reweighted, with_cached_proposals
from ncprior.utils.batches import to_device
from ncprior.utils.distributed import align_generators, num_ranks, on_rank_zero, own_seed, rank
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.random_state import random_state, seed_for, set_random_state

_DRAWS_PER_ROW = 10  # cached draws of the prior so far, per row of data

_CACHED = (5000, 50_000)  # of them, at least and at most

_WORTH = 0.02  # nats of Jensen-Shannon divergence that are worth another stage

_TOO_LITTLE = 0.05  # of the time, to begin another stage

_MOST_STAGES = 5  # with stages="auto"

FilePath = str | os.PathLike[str]


class _Inputs(NamedTuple):
    """Source and data of the training and of the held-out losses, and a hook before batches."""

    source: LatentSource[Any, Any]
    data: Any
    held_out_source: LatentSource[Any, Any]
    held_out: Any
    before: Callable[[int], None] | None = None


@dataclass(frozen=True)
class StageRuns:
    """Data and terms of all stages of one `fit`.

    Arguments:
        data: The training data.
        held_out: The held-out data, or ``None``.
        terms: The terms of the training.
        split_seed: Seed of the random split into training and held-out rows.
        e_step: The importance resamples to train on, or ``None`` to train on q(z | x) itself.
        patience: Evaluations without improvement before the decay, or ``None``.
        max_seconds: Seconds for all stages, or ``None``.
        callback: Called with each new row; stops training by returning True.
        checkpoint_every: Steps between checkpoints.
        progress: Whether to show a progress bar.
    """

    data: Any
    held_out: Any
    terms: TrainingTerms[FitSettings]
    split_seed: int
    e_step: EStep | None
    patience: int | None
    max_seconds: float | None
    callback: Callable[[Row], Any] | None
    checkpoint_every: int
    progress: bool

    def first(
        self, prior: NCPrior, stages: int | Literal["auto"], checkpoint: FilePath | None
    ) -> History:
        """Trains the heads of a prior against its own base, in the first stage's share of time."""
        cache = self.terms.settings.num_cached_proposals
        seconds = self._seconds_left(0.0, 1 if stages == "auto" else stages)
        return self._train(prior, self._encodes(prior), checkpoint, cache, seconds)

    def further(
        self,
        prior: NCPrior,
        history: History,
        stages: int | Literal["auto"],
        checkpoint: FilePath | None,
    ) -> Iterator[History]:
        """Trains further stages, and multiplies in the heads that have learnt something."""
        most = _MOST_STAGES if stages == "auto" else stages
        spent = _seconds(history)
        for stage in range(2, most + 1):
            if history.stopped.startswith(BY_CALLBACK) or self._is_over(spent):
                return
            seconds = self._seconds_left(spent, 1 if stages == "auto" else most - stage + 1)
            new = NCPrior(prior.source, map(fresh_head, prior.heads))
            path = None if checkpoint is None else f"{os.fspath(checkpoint)}.stage{stage}"
            cache = self._stage_cache() if self.can_cache(prior.source) else None
            so_far = f"{module_fingerprint(prior.heads)} {heads_on(prior)}"
            source = reweighted(prior, self._encodes(prior))
            history = self._train(new, source, path, cache, seconds, stage, so_far)
            spent += _seconds(history)
            learnt = history.has_learnt(_WORTH if stages == "auto" else 0.0)
            kept = [on and has for on, has in zip(prior.active, learnt, strict=True)]
            history = history._replace(kept=tuple(kept))
            for k in (k for k, keep in enumerate(kept) if keep):
                prior.heads[k] = ProductHead([*factors(prior.heads[k]), new.heads[k]]).eval()
            yield history
            if not any(kept):
                return

    def _encodes(self, prior: NCPrior) -> LatentSource[Any, Any]:
        """The source of the posterior samples."""
        return prior.source if self.e_step is None else self.e_step.source

    def _seconds_left(self, spent: float, stages: int) -> float | None:
        """Seconds for the next of some stages, all of which have the same share of what is left."""
        return None if self.max_seconds is None else (self.max_seconds - spent) / stages

    def _is_over(self, spent: float) -> bool:
        """Whether too little time is left to begin another stage."""
        return self.max_seconds is not None and spent > (1 - _TOO_LITTLE) * self.max_seconds

    def can_cache(self, source: LatentSource[Any, Any]) -> bool:
        """Whether all rows have the same prior, so that its draws can be cached."""
        if source.num_groups > 1:
            return False
        x = first_batch(self.data, self.terms.batch_size)
        device = device_of(source)
        with torch.no_grad():
            encoding = source.encode(to_device(x, device))
            group = source.group(source.start(num_rows(encoding), encoding))
        return group.context is None

    def _train(
        self,
        prior: NCPrior,
        source: LatentSource[Any, Any],
        checkpoint: FilePath | None,
        cache: int | None,
        seconds: float | None,
        stage: int = 1,
        so_far: str | None = None,
    ) -> History:
        """Trains the heads of a prior against the base of a source, or cached draws of it."""
        begun = time.perf_counter()
        outside = random_state()
        align_generators()
        inputs = self._inputs(source, cache, stage)
        trained = prior if inputs.source is prior.source else NCPrior(inputs.source, prior.heads)
        trainer = self._trainer(trained, stage)
        facts = {**self.terms.facts, "stage": stage, "heads so far": so_far}
        saved = on_rank_zero(lambda: load(checkpoint))
        stream = Stream(inputs.data, self.terms.batch_size, resumable=checkpoint is not None)
        run = HeadTraining(
            trained,
            trainer,
            replace(self.terms, facts=facts),
            "heads" if stage == 1 else f"heads of stage {stage}",
            split_seed=self.split_seed,
            begun=None if self.e_step is None else weights_of(self.e_step.heads),
            held_out=self._held_out(inputs, prior, trainer),
            patience=self.patience,
            max_seconds=seconds,
            callback=self.callback,
        )
        run.since = begun
        if saved is not None:
            try:
                run.restore(saved, stream)
            except ValueError:
                set_random_state(outside)
                raise
        else:
            if rank() > 0:  # so far all ranks draw the same; from here on, each its own z
                torch.manual_seed(own_seed(self.split_seed + stage, rank()))
            run.start()
        share = (0, 1) if trainer.group_parallel else (rank(), num_ranks())
        batches = Loader(stream, run.device, share, before=inputs.before, first=trainer.steps)
        run.run(
            batches,
            checkpoint=checkpoint,
            checkpoint_every=self.checkpoint_every,
            progress=self.progress,
        )
        return run.history()

    def _trainer(self, prior: NCPrior, stage: int) -> NCETrainer:
        settings = self.terms.settings
        optimizer = _adamw(prior, float(self.terms.learning_rate), float(settings.weight_decay))
        return NCETrainer(
            prior,
            optimizer,
            noise_weight=settings.noise_weight,
            num_draws=settings.num_draws,
            score_weight=settings.score_weight if stage == 1 else 0.0,
            max_grad_norm=settings.max_grad_norm,
            precision=settings.precision,
            group_parallel=settings.group_parallel,
        )

    def _held_out(self, inputs: _Inputs, prior: NCPrior, trainer: NCETrainer) -> HeldOut | None:
        if inputs.held_out is None:
            return None
        measured = NCPrior(inputs.held_out_source, prior.heads)
        groups = trainer.groups if trainer.group_parallel else None
        size = self.terms.batch_size
        return HeldOut(inputs.held_out, measured, size, seed=self.split_seed, groups=groups)

    def _inputs(self, source: LatentSource[Any, Any], cache: int | None, stage: int) -> _Inputs:
        """Sources and data, cached where the settings say so."""
        held_out_source = source
        if cache is not None:
            source, held_out_source = with_cached_proposals(
                source, cache, seed_for(f"proposals of stage {stage}", self.split_seed)
            )
        inputs = _Inputs(source, self.data, held_out_source, self.held_out)
        epochs = self._epochs(source, stage)
        if epochs is not None:
            walks = self._cached("training rows", source, self.data)
            before = walks.renewal(epochs)
            inputs = inputs._replace(source=walks.source, data=walks, before=before)
        if self.held_out is not None and (epochs is not None or self.e_step is not None):
            held_out = self._cached("held-out rows", held_out_source, self.held_out)
            inputs = inputs._replace(held_out_source=held_out.source, held_out=held_out)
        return inputs

    def _epochs(self, source: LatentSource[Any, Any], stage: int) -> float | None:
        """Epochs for which encodings of the training data are cached, ``None`` for no cache."""
        epochs = self.terms.settings.cache_epochs
        rows_drawn = self.terms.batch_size * (self.terms.steps or math.inf)
        if self.e_step is not None:
            return epochs_of_particles(self.data, epochs, self.e_step.ess, rows_drawn=rows_drawn)
        return epochs_to_cache(source, self.data, epochs, rows_drawn=rows_drawn, stage=stage)

    def _cached(
        self,
        name: str,
        source: LatentSource[Any, Any],
        data: Any,  # noqa: ANN401
    ) -> CachedEncodings:
        options: dict[str, Any] = {
            "batch_size": self.terms.batch_size,
            "seed": seed_for(name, self.split_seed),  # no z of one is noise of the other
            "budget": self.terms.settings.cache_memory * 2**30,
        }
        if self.e_step is None:
            return CachedEncodings(source, data, **options)
        return CachedParticles(source, data, progress=self.progress, **options)

    def _stage_cache(self) -> int:
        batch_size = self.terms.batch_size
        batches = length_of(one_pass(self.data, batch_size))
        rows = None if batches is None else batches * batch_size
        return cache_size(rows, _DRAWS_PER_ROW, _CACHED)


def _seconds(history: History) -> float:
    """The time that a training took, in seconds, up to its last row."""
    return history.rows[-1].seconds if history.rows else 0.0


def _adamw(prior: NCPrior, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with a fused step where the device has one, about five times as fast on a CPU."""
    try:
        return torch.optim.AdamW(
            prior.parameters(), learning_rate, weight_decay=weight_decay, fused=True
        )
    except RuntimeError:  # the device or dtype of a parameter has none
        return torch.optim.AdamW(prior.parameters(), learning_rate, weight_decay=weight_decay)
