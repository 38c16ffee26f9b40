r"""Diagnosis of a trained prior, group by group, with a verdict and advice.

All statistics are of held-out data x, at z ~ q and z ~ p under the same z_<k ~ q. A statistic
leads to a verdict if it passes a threshold by three standard errors.

References:
    | A Contrastive Learning Approach for Training Variational Autoencoder Priors
    | (Aneja et al., NeurIPS 2021)
    | The sample size required in importance sampling (Chatterjee & Diaconis, 2018)
    | https://doi.org/10.1214/17-AAP1326
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ncprior.bases.active import measure_kl
from ncprior.data.batches import first_batch, one_pass
from ncprior.data.generators import own_generators_restored
from ncprior.data.tiled import TiledEncodings
from ncprior.diagnostics.calibration import Mean, losses, pareto_k, recalibrate, reliability
from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.missing import missing_jsd
from ncprior.diagnostics.report import Report
from ncprior.diagnostics.verdict import with_verdict
from ncprior.diagnostics.walks import evaluating, group_kinds, scaled_log_r, walk_posterior
from ncprior.prior import NCPrior
from ncprior.samplers.sir import sir
from ncprior.source import Group, device_of, num_rows
from ncprior.utils.batches import take_rows
from ncprior.utils.draws import drawn
from ncprior.utils.errors import naming_group
from ncprior.utils.require import require_counts, require_instance
from ncprior.utils.visible import require_eval

# Pools of SIR: ESS and log Z vary little between pools, and pools cost most of the evaluations.
_NUM_POOLS = 64


@torch.no_grad()
def diagnose(
    prior: NCPrior,
    held_out: Any,  # noqa: ANN401
    *,
    train: Any = None,  # noqa: ANN401
    num_proposals: tuple[int, int] = (50, 500),
    num_draws: int = 8192,
    fresh_steps: int = 200,
    batch_size: int = 256,
) -> Report:
    """Diagnostic report on every group of a trained prior.

    The statistics are of α log r, which the sampler uses: with a ``strength`` α other than 1 an
    exact head appears as miscalibrated. Groups whose head is off are reported as off, without
    statistics. The heads are set to evaluation mode during the diagnosis; prior and VAE do not
    change.

    Arguments:
        prior: The prior.
        held_out: Data that no head was trained or stopped on: a tensor or map-style dataset of x,
            a ``DataLoader``, or a list of batches. All of it is used.
        train: Training data of the heads, of the same kind, to detect memorisation; a subset is
            enough.
        num_proposals: Two numbers M of proposals, ascending, for the effective sample size. The
            verdict assumes the larger one.
        num_draws: Least number of draws of z per group, from the posterior and from the prior
            each; each row is used several times if there are fewer rows. 8,192 draws give a
            standard error of the JSD of about 0.005 nats.
        fresh_steps: Optimizer steps of a fresh head per group, trained on one half of the held-out
            data to find the part that log r misses. A quarter chooses its best step, and a quarter
            measures it. 0 leaves this out.
        batch_size: Rows per batch, where batches are made here.

    Returns:
        The report, with ``groups``, ``to_json()`` and ``plot()``; ``print`` shows it as a table.

    Raises:
        ValueError: If there are fewer than 2 rows of data, or an argument is out of range.
        TypeError: If the data can be read only once.
        FloatingPointError: If log r is not finite; the message names the group.

    Example:
        >>> report = diagnose(prior, torch.randn(100, 3))
        >>> report.groups[0].nce_loss == 2 * math.log(2)  # the head has learnt nothing yet
        True
        >>> print(report.groups[0].verdict)
        base already matches, or the head is untrained
    """
    require_instance("prior", prior, NCPrior, "Pass a prior with trained heads.")
    if not isinstance(num_proposals, tuple | list) or len(num_proposals) != 2:
        raise TypeError(f"num_proposals must be two ascending numbers; got {num_proposals!r}.")
    low, high = num_proposals
    require_counts(**{"num_proposals[0]": low, "num_proposals[1]": high})
    require_counts(num_draws=num_draws, batch_size=batch_size)
    require_counts("[0, inf)", fresh_steps=fresh_steps)
    if low >= high:
        raise ValueError(f"num_proposals must be two ascending numbers; got {num_proposals}.")
    require_eval(prior.source, prior.source.module)
    of_loaders = own_generators_restored(held_out), own_generators_restored(train)
    with evaluating(prior), of_loaders[0], of_loaders[1]:
        log_r, pools = _measure(prior, held_out, num_draws, batch_size, (low, high))
        trained = None
        if train is not None:
            trained = _measure(prior, train, num_draws, batch_size)[0]
        missing = missing_jsd(
            prior, held_out, steps=fresh_steps, num_draws=-(-num_draws // 2), batch_size=batch_size
        )
        on = [prior.is_on(k) for k in range(prior.source.num_groups)]
        kinds = group_kinds(prior, first_batch(held_out, batch_size))
        active = [kl.active() for kl in measure_kl(prior.source, held_out, batch_size)]
    groups = []
    for k, is_on in enumerate(on):
        report = GroupReport(
            k,
            Verdict.OFF,
            ess={low: math.nan, high: math.nan},
            num_latents=active[k].numel(),
            num_active=int(active[k].sum()),
            **kinds[k]._asdict(),
        )
        if is_on:
            report = _with_loss(report, log_r[:, k], None if trained is None else trained[:, k])
            report = _with_pools(report, pools[k, :4])
            report = report._replace(missing=missing[k].value, missing_error=missing[k].error)
            report = with_verdict(report, log_r[:, k], pools[k, 4:])
        groups.append(report)
    return Report(tuple(groups), log_r.shape[-1], log_r[:, 0, 0].numel(), (low, high))


def _measure(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    num_draws: int,
    batch_size: int,
    num_proposals: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Measures log r and pools of proposals in one pass over the data.

    Returns:
        α log r at z ~ q and z ~ p, with shape (walks, K, 2, rows), and of every pool ESS and
        log-mean-weight for both M and α log r of its proposals, with shape
        (K, 4 + sum(num_proposals), pools); in float64, NaN if a head is off.
    """
    total = sum(num_rows(batch) for batch in one_pass(data, batch_size))
    if total < 2:
        raise ValueError(f"A standard error needs at least 2 rows of data; got {total}.")
    walks = -(-num_draws // total)
    log_r, pools, seen = [], [], 0
    for batch in one_pass(data, batch_size, device_of(prior.source)):
        encodings = TiledEncodings(prior.source, batch)
        log_r.append(_log_r(prior, encodings, walks, batch_size))
        # Pools from every batch: data may be ordered.
        before, seen = seen, seen + encodings.rows
        rows = _pools_of(seen, total) - _pools_of(before, total)
        if num_proposals and rows:
            weigh, size = partial(_weigh, num_proposals), 4 + sum(num_proposals)
            some = take_rows(encodings.first, slice(rows))
            pools.append(walk_posterior(prior, some, weigh, (size,)))
    return torch.cat(log_r, -1), torch.cat(pools, -1) if pools else torch.empty(0)


def _log_r(prior: NCPrior, encodings: TiledEncodings, walks: int, batch_size: int) -> Tensor:
    """α log r of several walks for each row, (walks, K, 2, rows); of few rows, many walks at once."""
    copies = max(1, min(walks, batch_size // encodings.rows))
    times = range(-(-walks // copies))
    walked = [walk_posterior(prior, encodings.tiled(copies), _contrast, (2,)) for _ in times]
    return rearrange(torch.stack(walked), "w k s (c n) -> (w c) k s n", c=copies)[:walks]


def _contrast(prior: NCPrior, k: int, group: Group, z: Tensor) -> Tensor:
    """α log r at z ~ q and at z ~ p, with shape (2, B)."""
    return scaled_log_r(prior, k, torch.stack([z, drawn(group.prior).to(z.dtype)]), group)


def _weigh(ms: tuple[int, ...], prior: NCPrior, k: int, group: Group, z: Tensor) -> Tensor:
    """ESS, log-mean-weight and α log r of the proposals of one pool per row, for each M."""
    proposed = []

    def log_ratio(z: Tensor) -> Tensor:
        proposed.append(scaled_log_r(prior, k, z, group))
        return proposed[-1]

    with naming_group(k):
        draws = [sir(group.prior, log_ratio, num_proposals=m) for m in ms]
    return torch.cat([*(value[None] for draw in draws for value in draw[1:3]), *proposed])  # type: ignore[index]


def _with_loss(report: GroupReport, log_r: Tensor, trained: Tensor | None) -> GroupReport:
    """Adds the statistics of log r on held-out and training data, (walks, 2, rows) each."""
    q, p = log_r.unbind(1)
    loss = Mean.of(losses(q, p))
    kl, identity, fit = Mean.of(q), Mean.of(q.sigmoid() + p.sigmoid()), recalibrate(q, p)
    train = Mean(math.nan, math.nan) if trained is None else Mean.of(losses(*trained.unbind(1)))
    return report._replace(
        nce_loss=loss.value,
        nce_loss_error=loss.error,
        jsd=math.log(2) - loss.value / 2,
        jsd_error=loss.error / 2,
        kl=kl.value,
        kl_error=kl.error,
        identity=identity.value,
        identity_error=identity.error,
        **fit._asdict(),
        mean_r=_mean_exp(p),
        mean_r_k=pareto_k(p),
        mean_inverse_r=_mean_exp(-q),
        mean_inverse_r_k=pareto_k(-q),
        train_loss=train.value,
        train_gap=loss.value - train.value,
        train_gap_error=math.hypot(loss.error, train.error),
        reliability=reliability(q, p),
    )


def _with_pools(report: GroupReport, pools: Tensor) -> GroupReport:
    """Adds the statistics of pools of SIR: ESS and log-mean-weight for both M, (4, pools)."""
    log_z = Mean.of(pools[3:4])
    return report._replace(
        ess=dict(zip(report.ess, pools[::2].mean(-1).tolist(), strict=True)),
        log_z=log_z.value,
        log_z_error=log_z.error,
    )


def _mean_exp(values: Tensor) -> float:
    flat = values.flatten()
    return (flat.logsumexp(0) - math.log(len(flat))).exp().item()


def _pools_of(rows: int, total: int) -> int:
    """Number of pools that belong to the first rows of the data."""
    return rows * min(_NUM_POOLS, total) // total
