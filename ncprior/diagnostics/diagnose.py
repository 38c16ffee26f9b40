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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils._pytree import tree_map_only

from ncprior.bases.mixture import GaussianMixture
from ncprior.data.stream import first_batch, one_pass
from ncprior.diagnostics.calibration import Mean, pareto_k, recalibrate, reliability
from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.report import Report
from ncprior.heads.product import factors
from ncprior.prior import NCPrior
from ncprior.samplers.langevin import supports_langevin
from ncprior.samplers.sir import sir
from ncprior.source import Group, num_rows, posterior_of, require_eval, visit
from ncprior.utils.batches import to_device

# Pools of SIR: ESS and log Z vary little between pools, and pools cost most of the evaluations.
_NUM_POOLS = 64

# Standard errors: chance alone passes a threshold once in 700 times.
_MARGIN = 3.0

# Slopes: log r is exact up to a fifth, which is 1 nat of the 5 that 150 proposals correct.
_CALIBRATED = (0.8, 1.25)

# Nats: the JSD of a mean shifted by 0.2 standard deviations, shift²/8.
_NO_JSD = 0.005

# A quarter of the loss reduction on training data is missing on held-out data.
_MEMORISED = 0.25

# Evaluations of a head per sample; for a thousand samples these are 10⁸, minutes of a GPU.
_MOST_PROPOSALS = 100_000

# Larger numbers of proposals are reported as this one.
_COUNTABLE = 10**9

# Nats: log r varies by no more than float32's rounding.
_CONSTANT = 1e-6


@torch.no_grad()
def diagnose(
    prior: NCPrior,
    held_out: Any,  # noqa: ANN401
    *,
    train: Any = None,  # noqa: ANN401
    num_proposals: tuple[int, int] = (50, 500),
    num_draws: int = 8192,
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
    low, high = num_proposals
    if not 1 <= low < high or num_draws < 1 or batch_size < 1:
        raise ValueError(
            f"num_proposals must be two ascending numbers, num_draws and batch_size positive; "
            f"got {num_proposals}, {num_draws} and {batch_size}."
        )
    require_eval(prior.source, prior.source.module)
    with evaluating(prior):
        log_r, pools = _measure(prior, held_out, num_draws, batch_size, (low, high))
        trained = None
        if train is not None:
            trained, _ = _measure(prior, train, num_draws, batch_size)
        on = [prior.is_on(k) for k in range(prior.source.num_groups)]
        kinds = group_kinds(prior, first_batch(held_out, batch_size))
    groups = []
    for k, is_on in enumerate(on):
        report = GroupReport(
            k, Verdict.OFF, ess={low: math.nan, high: math.nan}, **kinds[k]._asdict()
        )
        if is_on:
            report = _with_loss(report, log_r[:, k], None if trained is None else trained[:, k])
            report = _with_pools(report, pools[k])
            report = _with_verdict(report, log_r[:, k])
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
        α log r at z ~ q and z ~ p, with shape (walks, K, 2, rows), and ESS and log-mean-weight of
        pools for each M, (K, M, 2, pools); in float64, NaN if a head is off.
    """
    total = sum(num_rows(batch) for batch in one_pass(data, batch_size))
    if total < 2:
        raise ValueError(f"A standard error needs at least 2 rows of data; got {total}.")
    walks = -(-num_draws // total)
    log_r, pools, seen = [], [], 0
    device = next((p.device for p in prior.parameters()), None)
    for batch in one_pass(data, batch_size, device):
        encoding = prior.source.encode(batch)
        walked = [walk_posterior(prior, encoding, _contrast, (2,)) for _ in range(walks)]
        log_r.append(torch.stack(walked))
        # Pools from every batch: data may be ordered.
        before, seen = seen, seen + num_rows(encoding)
        rows = _pools_of(seen, total) - _pools_of(before, total)
        if num_proposals and rows:
            weigh, shape = partial(_weigh, num_proposals), (len(num_proposals), 2)
            pools.append(walk_posterior(prior, _first(rows, encoding), weigh, shape))
    return torch.cat(log_r, -1), torch.cat(pools, -1) if pools else torch.empty(0)


class GroupKind(NamedTuple):
    """Properties of a group that decide its samplers, as in :class:`GroupReport`."""

    has_context: bool
    has_gradient: bool
    num_components: int
    num_factors: int

    @classmethod
    def of(cls, group: Group, head: nn.Module) -> GroupKind:
        """Returns the properties of a group and its head."""
        prior = group.prior
        components = len(prior.logits) if isinstance(prior, GaussianMixture) else 1
        return cls(
            group.context is not None, supports_langevin(prior), components, len(factors(head))
        )


@torch.no_grad()
def group_kinds(prior: NCPrior, x: Any) -> list[GroupKind]:  # noqa: ANN401
    """Properties of all groups of a prior that decide their samplers.

    Arguments:
        prior: The prior.
        x: A batch of data, as the loader yields it.
    """
    device = next((p.device for p in prior.parameters()), None)
    if device is not None:
        x = to_device(x, device)
    encoding, kinds = prior.source.encode(x), []

    def look(k: int, group: Group) -> Tensor:
        kinds.append(GroupKind.of(group, prior.heads[k]))
        return posterior_of(group).sample()

    visit(prior.source, prior.source.start(num_rows(encoding), encoding), look)
    return kinds


@contextmanager
def evaluating(prior: NCPrior) -> Iterator[None]:
    """Context with the heads in evaluation mode; their own modes are restored at the end."""
    modes = [(module, module.training) for module in prior.modules()]
    prior.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def walk_posterior(
    prior: NCPrior,
    encoding: Any,  # noqa: ANN401
    measure: Callable[[NCPrior, int, Group, Tensor], Tensor],
    shape: tuple[int, ...] = (),
) -> Tensor:
    """Values measured in every group whose head is in use, at z_k ~ q under z_<k ~ q.

    Arguments:
        prior: The prior.
        encoding: A batch of data, encoded by the source.
        measure: Maps the prior, k, the group and z_k ~ q to values of shape ``(*shape, B)``.
        shape: The leading shape of the values.

    Returns:
        The values in float64 on the CPU, with shape ``(K, *shape, B)``; NaN if a head is off.
    """
    num_groups, batch_size = prior.source.num_groups, num_rows(encoding)
    measured = torch.full((num_groups, *shape, batch_size), math.nan, dtype=torch.float64)

    def choose(k: int, group: Group) -> Tensor:
        z = posterior_of(group).sample()
        if prior.is_on(k):
            measured[k] = measure(prior, k, group, z)
        return z

    visit(prior.source, prior.source.start(batch_size, encoding), choose)
    return measured


def scaled_log_r(prior: NCPrior, k: int, z: Tensor, group: Group) -> Tensor:
    """Returns α log r_k(z) in nats, with shape ``(*, B)``, after a check that it is finite.

    Raises:
        FloatingPointError: If log r is not finite; the message names the group.
    """
    log_r = prior.strength * prior.log_r(k, z, group.context)
    if not torch.isfinite(log_r).all():
        raise FloatingPointError(
            f"Group {k}: log r is not finite. Look for NaN or infinity in the head's weights, the "
            f"data, the prior or the context."
        )
    return log_r


def _contrast(prior: NCPrior, k: int, group: Group, z: Tensor) -> Tensor:
    """α log r at z ~ q and at z ~ p, with shape (2, B)."""
    return scaled_log_r(prior, k, torch.stack([z, group.prior.sample().to(z.dtype)]), group)


def _weigh(ms: tuple[int, ...], prior: NCPrior, k: int, group: Group, z: Tensor) -> Tensor:
    """ESS and log-mean-weight of one pool per row for each M, with shape (M, 2, B)."""
    log_ratio = partial(scaled_log_r, prior, k, group=group)
    draws = [sir(group.prior, log_ratio, num_proposals=m) for m in ms]
    return torch.stack([torch.stack(draw[1:3]) for draw in draws])  # type: ignore[arg-type]


def _with_loss(report: GroupReport, log_r: Tensor, trained: Tensor | None) -> GroupReport:
    """Adds the statistics of log r on held-out and training data, (walks, 2, rows) each."""
    q, p = log_r.unbind(1)
    loss = Mean.of(_loss(q, p))
    kl, identity, fit = Mean.of(q), Mean.of(q.sigmoid() + p.sigmoid()), recalibrate(q, p)
    train = Mean(math.nan, math.nan) if trained is None else Mean.of(_loss(*trained.unbind(1)))
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
    """Adds the statistics of pools of SIR, (M, 2, pools)."""
    ess, log_mean_weight = pools.unbind(1)
    log_z = Mean.of(log_mean_weight[-1:])
    return report._replace(
        ess=dict(zip(report.ess, ess.mean(-1).tolist(), strict=True)),
        log_z=log_z.value,
        log_z_error=log_z.error,
    )


def _with_verdict(report: GroupReport, log_r: Tensor) -> GroupReport:
    """Adds the number of proposals needed, and the verdict."""
    q, p = log_r.unbind(1)
    if not math.isnan(report.slope):
        q, p = report.slope * q + report.offset, report.slope * p + report.offset
    kl = Mean.of(q)
    report = report._replace(proposals_needed=_needed(kl.value, q.std().item()))
    if log_r.std() < _CONSTANT:
        return report._replace(verdict=Verdict.CONSTANT)
    surely_needed = _needed(kl.value - _MARGIN * kl.error, q.std().item())
    recalibrated_jsd = math.log(2) - Mean.of(_loss(q, p)).value / 2
    return report._replace(verdict=_verdict(report, recalibrated_jsd, surely_needed))


def _verdict(report: GroupReport, recalibrated_jsd: float, surely_needed: int) -> Verdict:
    # An unmeasured slope or training loss is NaN, which passes no threshold.
    slope_low = report.slope - _MARGIN * report.slope_error
    slope_high = report.slope + _MARGIN * report.slope_error
    harm = -_NO_JSD - report.jsd  # above 0, the base alone is better
    learnt = 2 * math.log(2) - report.train_loss
    memorised = report.train_gap - _MARGIN * report.train_gap_error
    sharp = slope_high < _CALIBRATED[0] or harm > _MARGIN * report.jsd_error
    if memorised > _MEMORISED * learnt > 0:
        return Verdict.MEMORISES
    if (slope_low <= 0 or recalibrated_jsd < _NO_JSD) and not (sharp and harm > 0):
        return Verdict.MATCHES
    if surely_needed > _MOST_PROPOSALS:
        return Verdict.TOO_WIDE
    if sharp:
        return Verdict.OVER_CONFIDENT
    if slope_low > _CALIBRATED[1]:
        return Verdict.TOO_FLAT
    return Verdict.TOO_FEW if surely_needed > max(report.ess) else Verdict.GOOD


def _loss(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Plain NCE loss of every draw."""
    return softplus(-log_q) + softplus(log_p)


def _needed(kl: float, sd: float) -> int:
    """Proposals needed: exp(KL + t), Chatterjee & Diaconis (2018), with t = sd_q[log r]."""
    return math.ceil(math.exp(min(max(kl + sd, 0.0), math.log(_COUNTABLE))))


def _mean_exp(values: Tensor) -> float:
    flat = values.flatten()
    return (flat.logsumexp(0) - math.log(len(flat))).exp().item()


def _pools_of(rows: int, total: int) -> int:
    """Number of pools that belong to the first rows of the data."""
    return rows * min(_NUM_POOLS, total) // total


def _first(rows: int, encoding: Any) -> Any:  # noqa: ANN401
    return tree_map_only(Tensor, lambda t: t[:rows] if t.ndim else t, encoding)
