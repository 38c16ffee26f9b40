"""`improve`: a better prior for a VAE in one call, every choice made by held-out evidence."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ncprior.bases.joint import JointSource
from ncprior.data.batches import first_batch
from ncprior.data.rows import column_names
from ncprior.heads.probe import probe_source
from ncprior.prior import NCPrior
from ncprior.recipe.base_file import saved_base
from ncprior.recipe.caches import rows_in_time
from ncprior.recipe.choices import OWN
from ncprior.recipe.files import arguments_file
from ncprior.recipe.heads import train_heads
from ncprior.recipe.joint import join_groups, joint_source
from ncprior.recipe.measure import FRESH, SHOWN, evidence_of
from ncprior.recipe.parts import first_not_finite, parts_for_last_fit, parts_of
from ncprior.recipe.record import Record
from ncprior.recipe.refit import refit
from ncprior.recipe.sampler import choose_sampler, keep_what_helps
from ncprior.saving.tensors import write_atomically
from ncprior.source import LatentSource, require_source
from ncprior.utils.distributed import num_ranks
from ncprior.utils.random_state import seeded
from ncprior.utils.require import require_counts, require_flags, require_instance, require_numbers
from ncprior.utils.visible import require_eval

_PROBED = 64  # rows

_FEWEST_SHOWN = 64  # draws in the report

_SHARE = 0.4  # of the time that is left, for the draws of the report, and for its fresh heads

_LONGEST = 60  # characters of a message


def improve(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    *,
    held_out: Any = None,  # noqa: ANN401
    budget: int = 50,
    max_seconds: float | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> NCPrior:
    """Better prior for a VAE: base, heads, sampler and strength, chosen on held-out data.

    The choices, each printed in one line with its numbers:

    * The base: the VAE's own prior, a Gaussian or a mixture of Gaussians, by the held-out likelihood
      of encodings, cross-validated with fewer than 6,000 rows; with little data also an average of
      mixtures. For a grid of codes, the frequencies of the codes or a network over them. A VAE with several groups, or with other
      latents that do not fill R^n, keeps its own.
    * The heads, trained by :func:`ncprior.fit` until held-out losses stop improving; with fewer than
      20,000 rows, the best of three sizes. Groups whose heads have learnt nothing keep the base.
    * The sampler for the budget, by :func:`ncprior.diagnostics.recommend_sampler`, and its strength,
      by :func:`ncprior.diagnostics.match_strength`.
    * Heads are kept unless they bring draws surely further from held-out encodings, by two standard
      errors; then the base alone is used. Without time for this comparison they are kept.
    * With fewer than 7,000 rows and one group, base and heads are fitted once more with these choices,
      to all rows but a tenth. The report is of the prior before. Rows in ``held_out`` are never used.
    * With several groups, where a new classifier tells draws of their heads from encodings, one more
      head for all of them, see :class:`ncprior.bases.JointSource`, which chooses among four draws
      with a quarter of the budget each. It is kept if that brings draws closer to held-out encodings
      than the whole budget without it.

    Each of these functions can be called on its own instead. With several groups, and neither a
    condition nor codes, the joint head and the last choice compare means of the decoder. All other
    choices compare latents.

    Arguments:
        source: The VAE.
        data: Training data of the VAE, of any kind that :func:`ncprior.fit` takes.
        held_out: Data that the VAE was not trained on, for the choices and the report. By default
            a part of ``data`` is held out at random.
        budget: Evaluations of each head per sample, 2 or more; more evaluations give better
            samples.
        max_seconds: Time for all of it, in seconds, which is kept approximately; ``None`` trains
            until nothing improves.
        seed: Seed of all random numbers; ``None`` takes them from torch's generator.
        checkpoint: A folder in which the base and the training of heads are saved, and from which it
            goes on when ``improve`` is called again with the same arguments; needs ``seed``.
        progress: Whether to print the choices and to show progress bars, on standard error.

    Returns:
        The prior, with ``prior.sampler`` for ``prior.sample(64)``, and ``prior.report``.

    Raises:
        TypeError: If an argument has the wrong type. The message names the remedy.
        ValueError: If an argument is out of range, the checkpoint is of other arguments, there is a
            process group, or nothing can be held out. Pass ``held_out``.
        FloatingPointError: If a loss is not finite; the message names group and step.

    Example:
        >>> from ncprior import SingleGroup
        >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> identity = SingleGroup(base, lambda x: Independent(Normal(x, 0.1), 1), lambda z: z)
        >>> better = improve(identity, 0.5 * torch.randn(200, 2), max_seconds=1, progress=False)
        >>> better.sample(64).x.shape
        torch.Size([64, 2])
    """
    require_source(source)
    require_counts("[2, inf)", budget=budget)
    require_counts("(-1e18, 1e18) or None", seed=seed)
    budget, seed = int(budget), None if seed is None else int(seed)
    require_numbers("(0, inf) or None", max_seconds=max_seconds)
    require_flags(progress=progress)
    require_instance("checkpoint", checkpoint, (str, os.PathLike, type(None)), "Pass a folder.")
    if checkpoint is not None and seed is None:
        raise ValueError("A checkpoint needs a seed; got seed=None. Pass one, such as seed=0.")
    folder = None if checkpoint is None else Path(checkpoint)
    require_eval(source, source.module)
    if num_ranks() > 1:
        raise ValueError(
            f"improve makes its choices in one process; got a process group of {num_ranks()} ranks. "
            f"Call it in one process, or train heads on all ranks by fit."
        )
    file = None if folder is None else arguments_file(folder)
    arguments = (
        f"{seed}" if max_seconds is None else f"{seed}, max_seconds={float(max_seconds):.15g}"
    )
    if file is not None:
        _require_arguments(file, arguments)
    record = Record(progress=progress, max_seconds=max_seconds)
    with nullcontext() if seed is None else seeded(seed):
        split_seed = int(torch.randint(2**31, ()))
        parts = parts_of(data, held_out, split_seed)
        # An error of posterior or decoder comes now, not in minutes.
        probe_source(source, first_batch(parts.train, _PROBED))
        for part in (parts.choose, parts.judge):
            if (batch := first_not_finite(part)) is not None:
                probe_source(source, batch, stacklevel=None)
        if file is not None and not file.exists():
            with write_atomically(file) as temporary:
                temporary.write_text(arguments, encoding="utf-8")
        with seeded(split_seed):  # a base from the checkpoint changes nothing of what follows
            based = saved_base(folder, source, parts, record)
        prior = train_heads(based, parts, record, folder)
        choose_sampler(prior, parts, budget, record)
        if (alone := joint_source(prior, parts)) is None:
            gaps = keep_what_helps(prior, parts, record)
        else:
            prior, gaps = join_groups(alone, prior, parts, budget, record, folder)
        sampler = prior.chosen(None)
        limits = (_FEWEST_SHOWN, SHOWN)
        report = evidence_of(
            prior,
            parts.judge,
            gaps,
            sampler=sampler,
            diagnosis=None,
            budget=budget,
            num_rows=rows_in_time(prior, parts.judge, limits, record.left(_SHARE)),
            fresh_steps=FRESH if record.has_time_for(FRESH, _SHARE) else 0,
        )
        verdict = f"{report.verdict} {_summary(prior, record)}"
        last = parts_for_last_fit(data, parts, split_seed + 1) if held_out is None else None
        if last is not None and source.num_groups == 1:
            measured, prior = prior, refit(prior, source, last, record, folder)
            if prior is not measured:
                verdict += f" It was then fitted once more, to {last.num_train} rows; the numbers are of the one before."
    prior.report = report._replace(
        verdict=verdict,
        choices=tuple(record.choices),
        histories=tuple(record.histories),
        columns=column_names(data),
        budget=budget,
        seed=seed,
        seconds=record.seconds(),
    )
    return prior


def _require_arguments(file: Path, arguments: str) -> None:
    """Validates that a checkpoint, if there is one, is of the same seed and limit of time."""
    saved = file.read_text("utf-8", "replace") if file.is_file() else arguments
    if saved != arguments:
        raise ValueError(
            f"The checkpoint in {file.parent} is of seed {saved[:_LONGEST]}; got seed={arguments}. "
            f"Pass the same arguments, or another folder."
        )


def _summary(prior: NCPrior, record: Record) -> str:
    """The new prior in a sentence."""
    base = next(choice.chosen for choice in record.choices if choice.part == "base")
    kept = [choice.chosen for choice in record.choices if choice.part == "keep"]
    if kept == [OWN] and base != OWN:
        return f"The new prior: {OWN}, as all that was tried is further from the encodings."
    if isinstance(prior.source, JointSource):
        heads = (
            "ratio heads on it, and one" if any(prior.source.prior.active) else "and a ratio head"
        )
        return f"The new prior: {base}, {heads} for all groups together."
    if any(prior.active):
        return f"The new prior: {base}, and ratio heads on it."
    limited = "" if record.left() is None else " in the time that they had"
    return f"The new prior: {base} alone; ratio heads found nothing more that is sure{limited}."
