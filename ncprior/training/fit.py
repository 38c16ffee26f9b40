"""`fit`: the whole training of ratio heads, with early stopping and exact resume."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ncprior.data.batches import one_pass, require_rows_and_end
from ncprior.data.parts import split
from ncprior.data.rows import Rows, as_data, is_map_style
from ncprior.heads.checks import naming_parts
from ncprior.heads.product import ProductHead, factors
from ncprior.prior import NCPrior
from ncprior.trainer import require_trainable
from ncprior.training.arguments import (
    require_no_later_stages,
    training_facts,
    validate_fit_arguments,
    validate_loop_arguments,
)
from ncprior.training.checkpoints import are_numbers
from ncprior.training.history import History, Row
from ncprior.training.importance import EStep, e_step
from ncprior.training.resumable import length_of, load, unchanged
from ncprior.training.settings import FitSettings, TrainingTerms
from ncprior.training.stage_runs import StageRuns
from ncprior.utils.distributed import align_generators, on_rank_zero
from ncprior.utils.gradients import gradients_enabled
from ncprior.utils.require import require_counts, require_instance, require_numbers

_HELD_OUT_FRACTION = 0.05

_EVAL_EVERY = 100  # steps between evaluations of few held-out rows

_CHEAP = 15  # batches of held-out data for so many steps

_DEFAULTS = FitSettings()


def fit(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    *,
    held_out: Any = None,  # noqa: ANN401
    steps: int | None = None,
    max_seconds: float | None = None,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    patience: int | None = 10,
    stages: int | Literal["auto"] = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[Row], Any] | None = None,
    progress: bool = True,
    eval_every: int | None = None,
    checkpoint_every: int = 500,
    settings: FitSettings = _DEFAULTS,
) -> History:
    """Trains the heads of a prior, and leaves the VAE as it was.

    The optimizer is AdamW. After a short warm-up, the learning rate is constant while the held-out
    loss of a group improves by more than its noise, and then falls to 0 in a fifth of all steps. An
    exponential moving average of the weights is evaluated and kept, for each group at its own best
    held-out loss. If ``checkpoint`` exists, training resumes from it as if it had never stopped:
    the weights come out the same, bit for bit.

    In several processes with a process group, as ``torchrun`` starts them, call ``fit`` in each
    process with the same arguments. Only rank 0 calls back, shows progress and writes the
    checkpoint.

    A training can be followed by :func:`ncprior.training.gate` and
    :func:`ncprior.training.calibrate_heads`.

    Arguments:
        prior: The prior; its heads end up with the kept weights, in evaluation mode.
        data: A tensor, array, table or map-style dataset of x, a ``DataLoader``, or any iterable
            of batches. Rows of a float64 array become torch's default dtype.
        held_out: Data for early stopping, of any of these kinds. By default, 5 % of data with rows
            are held out at random; with any other data, nothing is held out, and there is a
            warning.
        steps: The largest number of optimizer steps; ``None`` sets no limit. If it was too small,
            ``stopped`` of the history says so.
        max_seconds: The largest time of the whole training, in seconds; ``None`` sets no limit.
            The learning rate falls in time. Numbered stages share the time equally; with
            ``stages="auto"``, further stages take what is left.
        batch_size: Rows per batch, where batches are made here.
        learning_rate: The learning rate between warm-up and decay.
        patience: The least number of evaluations without improvement of any group before the
            learning rate falls; they must also take a third of the steps so far. ``None`` trains
            to the end of ``steps`` or ``max_seconds``.
        stages: Heads per group, which are multiplied. Each further head learns the remaining gap
            between q and the prior so far, and is kept if it has learnt something that holds on
            held-out data. ``"auto"`` adds heads until the next one has less than 0.02 nats of
            Jensen-Shannon divergence to learn. Every stage costs as much as the first one. For
            the other form of stages, see :func:`ncprior.training.nested`.
        checkpoint: A file to save to and to resume from; further stages have files of their own
            beside it. It must be of the same data, settings, limits and patience.
        callback: Called with each new :class:`Row`; stops the whole training by returning True.
            From its checkpoint, such a training goes on when ``fit`` is called again.
        progress: Whether to show a progress bar.

    Other arguments:
        eval_every: Steps between rows of the history, which hold the held-out losses. By default,
            100 for every 15 batches of held-out data, so that they take little of the time.
        checkpoint_every: Steps between checkpoints.
        settings: All rarely used settings, such as ``FitSettings(num_draws=4)``.

    Returns:
        The history of the training.

    Raises:
        FloatingPointError: If a loss is not finite; the message names group and step. The heads
            keep the best weights so far on held-out data, among them those from before the
            training; without held-out data, the averaged weights. Look for NaN or infinity in the
            data, or take a lower learning rate.
        ValueError: If the checkpoint belongs to another training, one of a later stage has none of
            the first, arguments are out of range or exclude each other, nothing would end the
            training, the heads cannot be trained, or ranks have other data or a
            ``DistributedSampler``. The message names the remedy.
        TypeError: If an argument is of the wrong type, the data can be read only once and are
            needed again, or the heads or the base do not support stages. The message
            names the remedy; stages can also be nested by :func:`ncprior.training.nested`.
        OSError: If the checkpoint cannot be written. Pass a path that can.
        RuntimeError: If the VAE changes itself; it is found after the first step. Look for
            buffers that its encoder or decoder writes to.

    Warns:
        UserWarning: If nothing is held out. Pass ``held_out``. Or if less than 2 of the importance
            samples of a row are effective on average. Pass more of them. Or if rows differ when
            they are read twice under one seed, and there is a checkpoint.

    Example:
        >>> history = fit(prior, torch.randn(500, 3), steps=20, progress=False)
        >>> len(history.rows[-1].loss)
        1
    """
    require_trainable(prior)
    require_instance("settings", settings, FitSettings, "Pass FitSettings(...).")
    require_counts("[1, inf) or None", steps=steps, patience=patience, eval_every=eval_every)
    require_numbers("(0, inf) or None", max_seconds=max_seconds)
    validate_loop_arguments(
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        callback=callback,
        progress=progress,
    )
    data, held_out = as_data(data), None if held_out is None else as_data(held_out)
    terms = TrainingTerms(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        eval_every=eval_every or _EVAL_EVERY,
        settings=settings,
        facts=training_facts(
            prior,
            data,
            held_out,
            batch_size=batch_size,
            patience=patience,
            max_seconds=None if max_seconds is None else float(max_seconds),
            resumable=checkpoint is not None,
            weighs=settings.importance_samples is not None,
        ),
    )
    validate_fit_arguments(prior, data, terms, stages=stages)
    _validate_end(terms, data, held_out)
    if held_out is not None:
        require_rows_and_end(held_out, batch_size)
    align_generators()
    saved = on_rank_zero(lambda: load(checkpoint))
    if saved is None and checkpoint is not None:
        on_rank_zero(lambda: require_no_later_stages(checkpoint))
    # A checkpoint of another kind of training has no seed; its terms will differ.
    split_seed = int(torch.randint(2**31, ())) if saved is None else saved.get("split_seed", 0)
    train, held_out = _parts(data, held_out, split_seed)
    if eval_every is None:
        terms = replace(terms, eval_every=_eval_every(held_out, batch_size))
    with _without_later_factors(prior, saved):
        posterior: EStep | None = None
        if settings.importance_samples is not None:
            first: dict[str, Any] = {"batch_size": batch_size, "seed": split_seed, "saved": saved}
            posterior = e_step(prior, train, settings.importance_samples, **first)
        runs = StageRuns(
            data=train,
            held_out=held_out,
            terms=terms,
            split_seed=split_seed,
            e_step=posterior,
            patience=patience,
            max_seconds=terms.facts["max_seconds"],
            callback=callback,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
        with (
            naming_parts(prior.source, prior.heads),
            gradients_enabled(),
            unchanged(prior.source),
            _evaluating_after(prior),
        ):
            _validate_parts(prior, runs, stages)
            history = runs.first(prior, stages, checkpoint)
            further = runs.further(prior, history, stages, checkpoint)
            ess = None if posterior is None else posterior.ess
            history = history._replace(stages=tuple(further), ess=ess)
            align_generators()
    return history


def _validate_end(terms: TrainingTerms[FitSettings], data: Any, held_out: Any) -> None:  # noqa: ANN401
    """Validates that a number of steps, a time or held-out losses end the training."""
    if terms.steps is not None or terms.facts["max_seconds"] is not None:
        return
    if held_out is None and not isinstance(data, Tensor) and not is_map_style(data):
        raise ValueError(
            f"Training without a number of steps ends when held-out losses stop improving; got "
            f"steps=None, and nothing can be held out of {type(data).__name__}. Pass held_out=, "
            f"steps= or max_seconds=."
        )
    if terms.facts["patience"] is None:
        raise ValueError(
            "Training must have an end; got steps=None, max_seconds=None and patience=None. Pass "
            "one of them."
        )


def _eval_every(held_out: Any, batch_size: int) -> int:  # noqa: ANN401
    """Returns steps between evaluations; a batch of held-out data costs no more than a step."""
    batches = 0 if held_out is None else length_of(one_pass(held_out, batch_size)) or 0
    return _EVAL_EVERY * max(1, -(-batches // _CHEAP))


def _validate_parts(prior: NCPrior, runs: StageRuns, stages: int | Literal["auto"]) -> None:
    """Validates that there is held-out data, and a prior to cache, where they are needed."""
    if runs.held_out is None and stages == "auto":
        raise ValueError("stages='auto' needs held-out data, and there is none. Pass held_out=.")
    cached = runs.terms.settings.num_cached_proposals is not None
    if cached and not runs.can_cache(prior.source):
        raise ValueError(
            "num_cached_proposals caches draws of one prior for all rows: it needs a source with "
            "one group and without a context. Leave it out."
        )


@contextmanager
def _without_later_factors(prior: NCPrior, saved: Mapping[str, Any] | None) -> Iterator[None]:
    """Context with the factors of heads that the first stage of a checkpoint trains.

    A prior that `fit` returned has those of further stages, too, which are multiplied in again. After
    an error, those that were not are there as before.
    """
    heads, counts = list(prior.heads), (saved or {}).get("factors")
    if counts is not None and are_numbers(counts, len(heads), (int,)):
        for k, count in enumerate(counts):
            first = factors(heads[k])[: max(1, count)]
            if len(first) < len(factors(heads[k])):
                prior.heads[k] = (ProductHead(first) if len(first) > 1 else first[0]).eval()
    try:
        yield
    except BaseException:
        for k, head in enumerate(heads):
            if len(factors(prior.heads[k])) < len(factors(head)):
                prior.heads[k] = head
        raise


@contextmanager
def _evaluating_after(prior: NCPrior) -> Iterator[None]:
    try:
        yield
    finally:
        prior.eval()


def _parts(data: Any, held_out: Any, seed: int) -> tuple[Any, Any]:  # noqa: ANN401
    """Returns the training and the held-out part of the data."""
    if held_out is not None:
        return data, held_out
    rows = Rows(data) if isinstance(data, Tensor) else data  # not copied by the split
    parts: tuple[Any, Any] | None = split(rows, _HELD_OUT_FRACTION, seed)
    if parts is None:
        warnings.warn(
            f"Nothing is held out of {type(data).__name__}: overfitting cannot be detected. "
            f"Pass held_out= for early stopping.",
            stacklevel=3,
        )
    return parts or (data, None)
