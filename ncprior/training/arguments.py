"""Validation of the arguments of `fit`, before anything is trained."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DistributedSampler

from ncprior.data.batches import first_batch, iter_is_self
from ncprior.data.digest import data_digest
from ncprior.data.generators import samplers_of
from ncprior.data.stream import require_restartable
from ncprior.diagnostics.walks import group_kinds
from ncprior.heads.product import fresh_head
from ncprior.prior import NCPrior
from ncprior.saving.identity import SIGMA, heads_on, source_facts
from ncprior.training.resumable import length_of
from ncprior.training.settings import FitSettings, TrainingTerms
from ncprior.utils.distributed import gather, num_ranks, on_rank_zero
from ncprior.utils.require import (
    require_callable,
    require_choice,
    require_counts,
    require_flags,
    require_instance,
)


def training_facts(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    held_out: Any,  # noqa: ANN401
    *,
    batch_size: int,
    patience: int | None,
    max_seconds: float | None,
    resumable: bool,
    weighs: bool,
) -> dict[str, Any]:
    """Returns properties that a checkpoint compares: VAE, base, data, ranks, patience and time.

    Digests of data are read only for a checkpoint, or to compare ranks. If importance samples are
    weighted, it compares which heads are on, and their strength; their weights are in the checkpoint
    itself.
    """
    of_source = source_facts(prior.source)
    if not weighs:
        of_source["facts"].pop(SIGMA, None)  # it weighs importance samples alone
    facts: dict[str, Any] = {
        "VAE": of_source.pop("vae"),
        "base": of_source.pop("base"),
        "source": of_source["facts"],
        "rows": length_of(data),
        "ranks": num_ranks(),
        "patience": patience,
        "max_seconds": max_seconds,
    }
    if weighs:
        facts |= {"strength": float(prior.strength), "active": heads_on(prior)}
    for name, given in (("data", data), ("held_out", held_out)):
        if num_ranks() > 1:
            require_undivided(name, given)
        if resumable:
            require_restartable(given)
        if resumable or (num_ranks() > 1 and not iter_is_self(given)):
            facts[name] = None if given is None else data_digest(given, batch_size)
        if resumable and given is not None and facts[name] is None:
            warnings.warn(
                f"Rows of {name} differ when they are read twice under one seed, as those of a dataset "
                f"with a random generator of its own: a resumed training is not exactly an "
                f"uninterrupted one, and other data are not noticed. Draw from torch's or NumPy's "
                f"global generator.",
                stacklevel=3,
            )
    return facts


def require_undivided(name: str, data: Any) -> None:  # noqa: ANN401
    """Validates that a loader does not divide its rows among the ranks, as `fit` does that.

    Raises:
        ValueError: If it has a ``DistributedSampler``.
    """
    found = [it for it in samplers_of(data) if isinstance(it, DistributedSampler)]
    if any(it.num_replicas > 1 for it in found):
        raise ValueError(
            f"fit divides the rows of every batch among the ranks; got a DistributedSampler in {name}, "
            f"which has divided them before: most rows would never be seen. Pass the same loader on "
            f"every rank, DataLoader(dataset, batch_size, shuffle=True)."
        )


def validate_loop_arguments(
    *,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int,
    callback: Any,  # noqa: ANN401
    progress: bool,
) -> None:
    """Validates the arguments of a training loop that do not change its result.

    Raises:
        TypeError: If an argument is of the wrong type. The message names the remedy.
        ValueError: If a number is out of range, or the checkpoint is a directory.
        OSError: If the checkpoint cannot be written.
    """
    require_counts(checkpoint_every=checkpoint_every)
    require_flags(progress=progress)
    if callback is not None:
        require_callable("callback", callback, "Pass a function of one row, or None.")
    if checkpoint is not None:
        remedy = "Pass the path of a file, or None."
        require_instance("checkpoint", checkpoint, (str, os.PathLike), remedy)
        on_rank_zero(lambda: require_writable("checkpoint", Path(checkpoint)))


def require_writable(name: str, path: Path) -> None:
    """Validates that a file can be written beside a path; the test file has no name.

    Arguments:
        name: The argument that is the path.
        path: The path; its folder is made.

    Raises:
        ValueError: If the path has null characters or is a directory.
        OSError: If no file can be written there.
    """
    if "\0" in str(path):
        raise ValueError(f"{name} must be a path without null characters; got {str(path)!r}.")
    if path.is_dir():
        raise ValueError(
            f"{name} must be a file; got the directory {path}. Pass a path such as {path / name}."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(
            f"{name} must be a file that can be written; got {path}: {error}. Pass a path in a "
            f"folder that you may write to."
        ) from error


def require_no_later_stages(checkpoint: str | os.PathLike[str]) -> None:
    """Validates that no later stage has a checkpoint where the first stage has none.

    Raises:
        ValueError: If there is one; the message names the file.
    """
    path = Path(checkpoint)
    second = path.with_name(f"{path.name}.stage2")
    if second.exists():
        raise ValueError(
            f"{second} is the checkpoint of a later stage, and that of the first stage, {path}, is "
            f"missing. Delete it, or pass another checkpoint."
        )


def validate_fit_arguments(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    terms: TrainingTerms[FitSettings],
    *,
    stages: int | Literal["auto"],
) -> None:
    """Validates arguments of :func:`ncprior.fit` together.

    Arguments:
        prior: The prior.
        data: The training data.
        terms: The terms of the training.
        stages: Heads per group, or ``"auto"``.

    Raises:
        ValueError: If a number is out of range, or ranks are given different terms.
        TypeError: If the data can be read only once, or heads or bases do not support stages.
    """
    if isinstance(stages, str):
        require_choice("stages", stages, ["auto"])
    else:
        require_counts(stages=stages)
    if terms.batch_size < terms.facts["ranks"]:
        raise ValueError(
            f"Every rank takes rows of every batch; got batches of {terms.batch_size} rows for "
            f"{terms.facts['ranks']} ranks. Pass a larger batch_size."
        )
    if (stages != 1 or terms.settings.needs_restartable_data) and iter_is_self(data):
        raise TypeError(
            f"Stages, importance samples, a proposal cache and cache_epochs need data that can be "
            f"read again from its start; got a one-shot {type(data).__name__}. Pass a tensor, a dataset, a DataLoader "
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
