"""What fit refuses before it trains anything."""

from __future__ import annotations

from typing import Any, Literal

from ncprior.data.stream import first_batch, iter_is_self
from ncprior.diagnostics.diagnose import group_kinds
from ncprior.heads.product import fresh_head, rescale_head
from ncprior.prior import NCPrior
from ncprior.utils.distributed import gather


def validate_fit_arguments(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    settings: dict[str, Any],
    *,
    stages: int | Literal["auto"],
    calibrate: bool,
    patience: int | None,
    checkpoint_every: int,
) -> None:
    """Refuses arguments of :func:`ncprior.fit` that make no sense, or not together.

    Arguments:
        prior: The prior.
        data: The data.
        settings: What training depends on, by the names of fit's arguments.
        stages: Of fit, as the following.
        calibrate: Whether heads are rescaled.
        patience: Evaluations without progress.
        checkpoint_every: Steps between checkpoints.

    Raises:
        ValueError: If a number is out of range, or ranks are not given the same.
        TypeError: If the data can be read only once, or heads or bases cannot be staged.
    """
    _check_counts(settings, checkpoint_every, patience)
    given = settings["num_cached_proposals"] is not None or settings["cache_epochs"] not in (
        "auto",
        None,
    )
    if (stages != 1 or given) and iter_is_self(data):
        raise TypeError(
            f"Stages, a proposal cache and cache_epochs need data that can be read again from its "
            f"start; got a one-shot {type(data).__name__}. Pass a tensor, a dataset, a DataLoader "
            f"or a list."
        )
    _check_stages(prior, stages, calibrate)
    if stages != 1:
        _check_walkable(prior, first_batch(data, settings["batch_size"]))
    _check_agreement(settings)


def _check_counts(settings: dict[str, Any], checkpoint_every: int, patience: int | None) -> None:
    counts = {name: settings[name] for name in ("steps", "batch_size", "eval_every")}
    counts |= {
        "checkpoint_every": checkpoint_every,
        "patience": 1 if patience is None else patience,
        "num_cached_proposals": 1
        if settings["num_cached_proposals"] is None
        else settings["num_cached_proposals"],
    }
    epochs = settings["cache_epochs"]
    if epochs not in ("auto", None):
        counts["cache_epochs"] = epochs
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}.")
    if not 0 <= settings["ema_decay"] <= 1:
        raise ValueError(f"ema_decay must be from 0 to 1; got {settings['ema_decay']}.")
    if settings["batch_size"] < settings["ranks"]:
        raise ValueError(
            f"Every rank takes rows of every batch; got batches of {settings['batch_size']} rows "
            f"for {settings['ranks']} ranks. Pass a larger batch_size."
        )


def _check_agreement(settings: dict[str, Any]) -> None:
    """Refuses ranks that train on different terms: they would wait for each other, or diverge."""
    for name, value in settings.items():
        values = gather(value)
        if any(other != value for other in values):
            raise ValueError(
                f"All ranks must be given the same; by rank, {name} is {values}. Start every "
                f"process with the same arguments, data and VAE."
            )


def _check_stages(prior: NCPrior, stages: int | Literal["auto"], calibrate: bool) -> None:
    """Refuses before training what cannot be done after it."""
    if stages != "auto" and (not isinstance(stages, int) or stages < 1):
        raise ValueError(f"stages must be a number from 1 or 'auto'; got {stages!r}.")
    if stages != 1 and prior.strength != 1:
        raise ValueError(
            f"A further stage learns what the heads leave at strength 1; got {prior.strength}. "
            f"Set prior.strength = 1 for the training."
        )
    for head in prior.heads:
        if stages != 1:
            fresh_head(head)
        if calibrate:
            rescale_head(head, 1.0, 0.0)


def _check_walkable(prior: NCPrior, x: Any) -> None:  # noqa: ANN401
    """Refuses stages of groups that tempered Monte Carlo cannot walk in."""
    for k, kind in enumerate(group_kinds(prior, x)):
        if prior.is_on(k) and not kind.has_gradient:
            raise TypeError(
                f"Stages are multiplied where draws of the prior so far can be made by walking in "
                f"it; the base of group {k} has no density, or discrete or bounded latents. Nest "
                f"stages instead: ncprior.training.nested."
            )
