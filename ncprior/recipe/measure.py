"""Measurements of a prior on held-out data, for its report: remaining gap, diagnosis, draws."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ncprior._version import __version__
from ncprior.bases.joint import JointSource
from ncprior.data.batches import one_pass
from ncprior.data.generators import own_generators_restored
from ncprior.data.rows import column_names
from ncprior.diagnostics.diagnose import diagnose
from ncprior.diagnostics.report import Report
from ncprior.diagnostics.walks import evaluating
from ncprior.prior import NCPrior
from ncprior.recipe.choices import DATA, NEW, OLD, POSTERIOR
from ncprior.recipe.joint import WALKS
from ncprior.recipe.judge import Gap, measure_gaps, verdict
from ncprior.recipe.parts import FEWEST, Parts, parts_for_report
from ncprior.recipe.pictures import is_narrow
from ncprior.recipe.record import Record
from ncprior.recipe.report import Improvement
from ncprior.recipe.sources import bases_of, vae_of
from ncprior.samplers.base import Sampler
from ncprior.samplers.identity import describe
from ncprior.source import Group, LatentSource, device_of, num_rows, posterior_of, visit
from ncprior.utils.batches import take_rows, tensors_of
from ncprior.utils.random_state import seeded
from ncprior.utils.require import (
    require_counts,
    require_finite,
    require_instance,
)

_SHOWN = 64  # rows of x; of narrow tables all

_MOST_NUMBERS = 4096  # of the latents of a row that are kept; each group is thinned evenly

_BATCH = 256

SHOWN = 2000  # rows whose encodings are compared, and as many draws of each prior

FRESH = 200  # steps of the diagnosis's fresh heads

Arm = tuple[LatentSource[Any, Any], Callable[[int, Group], Tensor]]


@torch.no_grad()
def report_on(
    prior: NCPrior,
    held_out: Any,  # noqa: ANN401
    *,
    train: Any = None,  # noqa: ANN401
    sampler: Sampler | None = None,
    diagnosis: Report | None = None,
    budget: int = 500,
    num_rows: int = SHOWN,
    seed: int = 0,
) -> Improvement:
    """Report on a prior by measurements on held-out data, whichever way its heads were trained.

    New classifiers are trained to tell draws of the VAE's own prior, of a fitted base and of the new
    prior from encodings; they are measured on held-out data. For a VAE with a condition, all draws
    have the conditions of these data. Prior, VAE and random generators do not change.

    Arguments:
        prior: The prior.
        held_out: Data that no head was trained or stopped on: a tensor or map-style dataset of x,
            a ``DataLoader``, or a list of batches.
        train: Training data for the classifiers. By default, they are trained on half of the
            held-out data, and see less of the gap.
        sampler: The sampler; that of the prior by default.
        diagnosis: Report of :func:`ncprior.diagnostics.diagnose` on the prior; made here if
            ``None``, without training data.
        budget: Evaluations of each head per sample: the number of proposals in the diagnosis.
        num_rows: Most rows of held-out data whose encodings are compared, and as many draws of each
            prior.
        seed: Seed of all random numbers.

    Returns:
        The report, without choices and histories.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or there is no sampler. Pass one.
        FloatingPointError: If log r is not finite; the message names the group.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> sampler = partial(sir, num_proposals=50)
        >>> report = report_on(prior, held_out, sampler=sampler)  # doctest: +SKIP
        >>> report.save_html("report.html")  # doctest: +SKIP
    """
    started = time.monotonic()
    require_instance("prior", prior, NCPrior, "Pass a prior with trained heads.")
    require_counts("[2, inf)", budget=budget, num_rows=num_rows)
    require_counts("(-1e18, 1e18)", seed=seed)
    sampler = prior.chosen(sampler)
    if diagnosis is not None:
        require_instance("diagnosis", diagnosis, Report, "Pass the result of diagnose.")
    own = own_generators_restored(held_out), own_generators_restored(train)
    with seeded(seed), evaluating(prior), own[0], own[1]:
        parts = parts_for_report(train, held_out, seed)
        gaps = {} if parts is None else _gaps(prior, sampler, parts)
        report = evidence_of(
            prior,
            held_out,
            gaps,
            sampler=sampler,
            diagnosis=diagnosis,
            budget=budget,
            num_rows=num_rows,
        )
    columns = column_names(held_out)
    return report._replace(columns=columns, seed=int(seed), seconds=time.monotonic() - started)


def evidence_of(
    prior: NCPrior,
    held_out: Any,  # noqa: ANN401
    gaps: Mapping[str, Gap],
    *,
    sampler: Sampler,
    diagnosis: Report | None,
    budget: int,
    num_rows: int = SHOWN,
    fresh_steps: int = FRESH,
) -> Improvement:
    """Returns the report of :func:`report_on` on a prior whose gaps are known, or none of them.

    Without a diagnosis, one is made, with fresh heads of that many steps.
    """
    if diagnosis is None:
        diagnosis = _diagnosis(prior, held_out, budget, fresh_steps)
    arms = _arms(prior, sampler, held_out)
    latents, samples = _draw(prior.source, arms, held_out, num_rows)
    return Improvement(
        verdict=verdict(gaps) if gaps else _TOO_FEW,
        scores={
            arm: gap.judge.interval()
            for arm, gap in gaps.items()
            if arm in arms and gap.is_measured
        },
        diagnosis=diagnosis,
        sampler=_described(prior.source, sampler),
        budget=int(budget),
        details=_details(prior, diagnosis.num_rows, latents[POSTERIOR]),
        latents=latents,
        samples=samples,
    )


def _gaps(prior: NCPrior, sampler: Sampler, parts: Parts) -> dict[str, Gap]:
    """The gaps of the prior and of all that it must beat."""
    record = Record(progress=False, max_seconds=None)
    return measure_gaps(prior, sampler, bases_of(prior.source, parts.choose), parts, record)


def _described(source: LatentSource[Any, Any], sampler: Sampler) -> str:
    """The sampler, and below a joint head that of every walk."""
    below = source.prior.sampler if isinstance(source, JointSource) else None
    return describe(sampler) + ("" if below is None else f" of walks by {describe(below)}")


def _diagnosis(prior: NCPrior, held_out: Any, budget: int, fresh_steps: int) -> Report:  # noqa: ANN401
    """The diagnosis for a budget; of a joint head, whose every proposal is a walk, with few of them."""
    if isinstance(prior.source, JointSource):
        return diagnose(prior, held_out, num_proposals=(1, WALKS), fresh_steps=0)
    proposals = (max(1, budget // 10), budget)
    return diagnose(prior, held_out, num_proposals=proposals, fresh_steps=fresh_steps)


_TOO_FEW = (
    f"The held-out rows are too few for a verdict. Pass {4 * FEWEST} or more, or {2 * FEWEST} or more "
    f"and train=."
)


def _arms(prior: NCPrior, sampler: Sampler, held_out: Any) -> dict[str, Arm]:  # noqa: ANN401
    """The source and the choice of z_k of each arm; a fitted base alone is the new prior itself."""
    arms: dict[str, Arm] = {
        arm: (source, lambda k, group: group.prior.sample())
        for arm, source in bases_of(prior.source, held_out).items()
        if arm == OLD or any(prior.active)
    }
    arms[NEW] = (prior.source, lambda k, group: prior.draw(k, group, sampler).z)
    arms[POSTERIOR] = (prior.source, lambda k, group: posterior_of(group).sample())
    return arms


@torch.no_grad()
def _draw(
    source: LatentSource[Any, Any],
    arms: dict[str, Arm],
    data: Any,  # noqa: ANN401
    most: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Latents of every arm for random rows of data, and x of some of them, in random order.

    Every walk starts from an encoding, which holds the condition: the prior of a group depends on
    nothing else of it.
    """
    latents: dict[str, list[Tensor]] = {arm: [] for arm in arms}
    samples: dict[str, list[Tensor]] = {arm: [] for arm in (DATA, *arms)}
    chosen = _chosen(data, most)
    seen, shown = 0, 0
    for batch in _rows_of(data, chosen, device_of(source)):
        rows, x = num_rows(batch), _x_of(source, batch)
        limit = len(chosen) if is_narrow(x) else min(_SHOWN, len(chosen))
        seen += rows
        before, shown = shown, seen * limit // len(chosen)
        encoding, some = source.encode(batch), slice(shown - before)
        samples[DATA].append(x[some].cpu())
        for arm, (own, choose) in arms.items():
            drawn, state = visit(own, own.start(rows, encoding), choose)
            latents[arm].append(torch.cat([_thinned(z, len(drawn)) for z in drawn], 1).cpu())
            if shown > before:
                samples[arm].append(own.decode(take_rows(state, some)).cpu())
    order = torch.randperm(shown, device="cpu")
    clouds = {arm: torch.cat(parts) for arm, parts in latents.items()}
    require_finite("z drawn from q(z | x)", clouds[POSTERIOR])
    return (
        clouds,
        {arm: torch.cat(parts)[order] for arm, parts in samples.items()},
    )


def _chosen(data: Any, count: int) -> Tensor:  # noqa: ANN401
    """Ascending numbers of random rows of data."""
    total = sum(num_rows(batch) for batch in one_pass(data, _BATCH))
    require_counts("[2, inf)", **{"the number of rows of held_out": total})
    return torch.randperm(total)[:count].sort().values


def _rows_of(data: Any, chosen: Tensor, device: torch.device) -> Iterator[Any]:  # noqa: ANN401
    """Batches with the chosen rows of data."""
    first = 0
    for batch in one_pass(data, _BATCH, device):
        last = first + num_rows(batch)
        rows = chosen[(chosen >= first) & (chosen < last)] - first
        first = last
        if len(rows):
            yield take_rows(batch, rows)


def _x_of(source: LatentSource[Any, Any], batch: Any) -> Tensor:  # noqa: ANN401
    """x as the decoder returns it; of a batch that a source does not look into, the first tensor."""
    try:
        return source.observed(batch)
    except TypeError:
        return tensors_of(batch)[0]


def _thinned(z: Tensor, num_groups: int) -> Tensor:
    """Latents of one group as rows of numbers; of many, evenly spaced ones."""
    flat = z.reshape(len(z), -1).float()
    most = max(1, _MOST_NUMBERS // num_groups)
    return flat[:, :: -(-flat.shape[1] // most)]


def _details(prior: NCPrior, rows: int, encodings: Tensor) -> dict[str, str]:
    source = vae_of(prior.source)
    return {
        "VAE": type(source).__name__,
        "Groups": str(source.num_groups),
        "Latents compared": f"{encodings.shape[1]:,}",
        "Draws compared": f"{len(encodings):,}",
        "Held-out rows": f"{rows:,}",
        "Strength": f"{prior.strength:.3g}",
        "Versions": f"ncprior {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
