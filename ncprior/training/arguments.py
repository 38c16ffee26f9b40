"""Validation of the arguments of `fit`, before anything is trained."""

from __future__ import annotations

from typing import Any, Literal

from ncprior.data.stream import first_batch, iter_is_self
from ncprior.diagnostics.walks import group_kinds
from ncprior.heads.product import fresh_head
from ncprior.prior import NCPrior
from ncprior.training.settings import FitSettings, TrainingTerms, require_positive
from ncprior.utils.distributed import gather


def validate_fit_arguments(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    terms: TrainingTerms[FitSettings],
    *,
    stages: int | Literal["auto"],
    patience: int | None,
    checkpoint_every: int,
) -> None:
    """Validates arguments of :func:`ncprior.fit`, each alone and together.

    Arguments:
        prior: The prior.
        data: The training data.
        terms: The terms of the training.
        stages: Heads per group, or ``"auto"``.
        patience: Evaluations without progress before training stops, or ``None``.
        checkpoint_every: Steps between checkpoints.

    Raises:
        ValueError: If a number is out of range, or ranks are given different terms.
        TypeError: If the data can be read only once, or heads or bases do not support stages.
    """
    require_positive({"checkpoint_every": checkpoint_every, "patience": patience})
    if terms.batch_size < terms.facts["ranks"]:
        raise ValueError(
            f"Every rank takes rows of every batch; got batches of {terms.batch_size} rows for "
            f"{terms.facts['ranks']} ranks. Pass a larger batch_size."
        )
    if (stages != 1 or terms.settings.caches) and iter_is_self(data):
        raise TypeError(
            f"Stages, a proposal cache and cache_epochs need data that can be read again from its "
            f"start; got a one-shot {type(data).__name__}. Pass a tensor, a dataset, a DataLoader "
            f"or a list."
        )
    _validate_stages(prior, stages)
    if stages != 1:
        _require_langevin(prior, first_batch(data, terms.batch_size))
    _require_agreement(terms)


def _require_agreement(terms: TrainingTerms[FitSettings]) -> None:
    """Validates that all ranks train on the same terms: otherwise they would wait or diverge."""
    for name, value in terms.stored().items():
        values = gather(value)
        if any(other != value for other in values):
            raise ValueError(
                f"All ranks must be given the same; got {name}={values}, by rank. Start every "
                f"process with the same arguments, data and VAE."
            )


def _validate_stages(prior: NCPrior, stages: int | Literal["auto"]) -> None:
    """Validates the number of stages, and that each head can have a successor."""
    if stages != "auto" and (not isinstance(stages, int) or stages < 1):
        raise ValueError(f"stages must be a number from 1 or 'auto'; got {stages!r}.")
    if stages == 1:
        return
    if prior.strength != 1:
        raise ValueError(
            f"A further stage learns the gap that the heads leave at strength 1; got "
            f"{prior.strength}. Set prior.strength = 1 for the training."
        )
    for head in prior.heads:
        fresh_head(head)


def _require_langevin(prior: NCPrior, x: Any) -> None:  # noqa: ANN401
    """Validates that tempered Monte Carlo can move in every group."""
    for k, kind in enumerate(group_kinds(prior, x)):
        if prior.is_on(k) and not kind.has_gradient:
            raise TypeError(
                f"Stages are multiplied where the prior so far can be sampled by tempered Monte "
                f"Carlo; the base of group {k} has no density, or discrete or bounded latents. "
                f"Nest stages instead: ncprior.training.nested."
            )
