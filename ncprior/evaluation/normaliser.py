r"""Log partition function log Z of NCP: a lower and an upper estimate, in nats.

.. math::
    Z = E_p\Big[ \prod_k r_k(z_k | z_{<k})^\alpha \Big],
    \qquad p_{NCP}(z) = \frac{1}{Z} \prod_k r_k(z_k | z_{<k})^\alpha \, p(z_k | z_{<k}).

N particles visit the groups in order. In each group they are drawn from p(z_k | z_<k), annealed to
r_k p_k over T inverse temperatures β, weighted, and resampled. The product over groups of the mean
weights is an unbiased estimate of Z. Therefore

* *forward*, log Ẑ ≤ log Z on average;
* *in reverse*, one of the particles is a draw z ~ p_NCP whose annealing runs backwards: 1/Ẑ is an
  unbiased estimate of 1/Z, so that log Ẑ ≥ log Z on average.

With one group, T = 1 is plain importance sampling, and T > 1 is annealed importance sampling
(AIS).

References:
    | Annealed Importance Sampling (Neal, 2001)
    | Particle Markov chain Monte Carlo methods (Andrieu, Doucet & Holenstein, 2010)
    | Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse et al., 2015)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from ncprior.distributions import Sampleable
from ncprior.heads.checks import naming_parts
from ncprior.prior import NCPrior
from ncprior.samplers.base import LogRatio, finite
from ncprior.samplers.langevin import hmc_step
from ncprior.samplers.target import Target
from ncprior.source import device_of, num_rows
from ncprior.utils.batches import map_tensors, to_device
from ncprior.utils.draws import drawn
from ncprior.utils.require import (
    described,
    require_counts,
    require_finite,
    require_flags,
    require_instance,
    require_numbers,
)
from ncprior.utils.visible import require_eval


class LogZ(NamedTuple):
    """Estimates of the log partition function of NCP, with one global Z for all groups.

    Attributes:
        forward: Replicates of the forward estimate, too small on average, in nats, ``(R,)``.
        reverse: Replicates of the reverse estimate, in nats, ``(R,)``; too large on average if it
            starts from exact draws of NCP.
        exact: Whether the reverse estimates start from exact draws. Otherwise they start from
            forward particles, and the upper end is not a bound.
        num_particles: N, the particles of one estimate.
        num_temperatures: T, the inverse temperatures between p and r·p.
        acceptance: Acceptance rate of the moves between temperatures; NaN without moves.

    Example:
        >>> z = LogZ(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.6]), True, 100, 1, math.nan)
        >>> print(z)
        log Z between 0.200 and 0.400 nats (standard errors 0.100 and 0.200, of 2 replicates)
    """

    forward: Tensor
    reverse: Tensor
    exact: bool
    num_particles: int
    num_temperatures: int
    acceptance: float

    @property
    def lower(self) -> float:
        """Mean of the forward estimates, in nats; at most log Z on average."""
        return self.forward.mean().item()

    @property
    def upper(self) -> float:
        """Mean of the reverse estimates, in nats; at least log Z on average, if exact."""
        return self.reverse.mean().item()

    @property
    def upper_error(self) -> float:
        """Standard error of ``upper``, in nats."""
        return (self.reverse.std() / math.sqrt(len(self.reverse))).item()

    @property
    def std(self) -> float:
        """Standard deviation of one forward estimate, in nats; at most 0.23 in the paper."""
        return self.forward.std().item()

    def __str__(self) -> str:
        """Shows the range of log Z in one line."""
        error = self.std / math.sqrt(len(self.forward))
        return (
            f"log Z between {self.lower:.3f} and {self.upper:.3f} nats (standard errors "
            f"{error:.3f} and {self.upper_error:.3f}, of {len(self.forward)} replicates)"
        )


@torch.no_grad()
def log_normaliser(
    prior: NCPrior,
    *,
    num_particles: int = 10_000,
    num_temperatures: int = 1,
    step_size: float = 0.2,
    replicates: int = 5,
    exact: Sequence[Tensor] | None = None,
    condition: Any = None,  # noqa: ANN401
    progress: bool = False,
) -> LogZ:
    r"""Two-sided estimate of the log partition function log Z of NCP.

    Arguments:
        prior: The prior.
        num_particles: N, the particles of one estimate.
        num_temperatures: T. With T = 1, draws of p are weighted by r. With T > 1, particles are
            annealed from p to r·p by steps of MALA, for heads that are far from flat.
        step_size: λ of the MALA steps, see :func:`ncprior.langevin`.
        replicates: R, the number of independent estimates of either kind; at least 2.
        exact: Exact draws of NCP, if available: one z_k per group, each with shape
            ``(R, *event)``. By default forward particles are taken.
        condition: Condition of the source, one row, or ``None``; Z depends on it.
        progress: Whether to show a progress bar.

    Returns:
        The estimates.

    Raises:
        ValueError: If a number is out of range, ``exact`` has the wrong shape or NaN, the condition
            has not one row, or the VAE is in training mode.
        TypeError: If T > 1 and a prior is discrete or has no density, or an argument has the wrong
            type.
        FloatingPointError: If log r is not finite.

    Example:
        >>> z = log_normaliser(prior, num_particles=100)  # a new head: r = 1
        >>> z.lower, z.upper
        (0.0, 0.0)
    """
    require_instance("prior", prior, NCPrior, "Pass an NCPrior, as NCPrior.for_source(source, x).")
    require_counts("[2, inf)", num_particles=num_particles, replicates=replicates)
    require_counts(num_temperatures=num_temperatures)
    require_numbers("(0, inf)", step_size=step_size)
    require_flags(progress=progress)
    num_particles, num_temperatures = int(num_particles), int(num_temperatures)
    require_eval(prior.source, prior.source.module)
    device = device_of(prior.source)
    if exact is not None:
        exact = _checked_exact(exact, prior.source.num_groups, replicates, device)
    condition = _checked_condition(condition, device)
    smc = _Particles(prior, num_particles, num_temperatures, step_size, condition)
    forward, reverse = [], []
    with naming_parts(prior.source, prior.heads):
        for i in tqdm(range(replicates), desc="log Z", disable=not progress):
            estimate, draw = smc.run(None)
            forward.append(estimate)
            reverse.append(smc.run(draw if exact is None else [z[i : i + 1] for z in exact])[0])
    acceptance = smc.accepted / smc.moves if smc.moves else math.nan
    return LogZ(
        torch.stack(forward),
        torch.stack(reverse),
        exact is not None,
        num_particles,
        num_temperatures,
        acceptance,
    )


def _checked_exact(exact: Any, groups: int, rows: int, device: torch.device) -> list[Tensor]:  # noqa: ANN401
    if not isinstance(exact, tuple | list) or not all(isinstance(z, Tensor) for z in exact):
        raise TypeError(
            f"exact must be a list of one tensor z per group; got {described(exact)}. Pass the "
            f"latents of exact draws."
        )
    shapes = [tuple(z.shape) for z in exact]
    if len(exact) != groups or any(shape[:1] != (rows,) for shape in shapes):
        raise ValueError(
            f"exact must hold one z per group, of {rows} rows each, one per replicate; got shapes "
            f"{shapes} for {groups} groups."
        )
    for k, z in enumerate(exact):
        require_finite(f"exact[{k}]", z)
    return [z.to(device) for z in exact]


def _checked_condition(condition: Any, device: torch.device) -> Any:  # noqa: ANN401
    if condition is None:
        return None
    if num_rows(condition) != 1:
        raise ValueError(
            f"log Z is that of one condition, one row; got {num_rows(condition)} rows. Call "
            f"log_normaliser for each row."
        )
    return to_device(condition, device)


class Annealed(NamedTuple):
    """Result of annealed importance sampling: points with log-weights.

    Attributes:
        z: End points of the chains, with shape ``(B, *event)``.
        log_w: Log-weights of the chains in nats, with shape ``(B,)``.
        acceptance: Acceptance rates of the moves, with shape ``(B,)``; 0 without moves.
    """

    z: Tensor
    log_w: Tensor
    acceptance: Tensor


def anneal(
    prior: Sampleable,
    log_ratio: LogRatio,
    *,
    num_temperatures: int,
    step_size: float = 0.2,
    backwards_from: Tensor | None = None,
) -> Annealed:
    r"""Annealed importance sampling over r^β·p, β = 1/T, 2/T, …, 1, with one chain per row.

    .. math::
        \log w = \frac{1}{T} \sum_{t=1}^{T} \log r(z_{t-1}), \qquad z_0 \sim p,

    where z_t is one step of MALA on r^{t/T}·p from z_{t-1}. E w = Z = E_p r, and (z_{T-1}, w) is a
    weighted draw of r·p. Backwards, z_{T-1} is given and the steps are taken in the opposite
    order; if z_{T-1} is a draw of r·p/Z, E 1/w = 1/Z.

    Arguments:
        prior: p(z), of batch shape ``(B,)``.
        log_ratio: Maps z, with shape ``(B, *event)``, to log r(z) in nats, ``(B,)``.
        num_temperatures: T; 1 makes no moves.
        step_size: λ of the MALA steps.
        backwards_from: Draws of r·p/Z, with shape ``(B, *event)``, or ``None``.

    Returns:
        The end points and log-weights of the chains.

    Raises:
        TypeError: If T > 1 and the prior is discrete or has no density.
        FloatingPointError: If log r is not finite.

    References:
        | Annealed Importance Sampling (Neal, 2001)
    """
    z = drawn(prior) if backwards_from is None else backwards_from
    if num_temperatures == 1:
        return Annealed(z, finite(log_ratio(z)), torch.zeros(len(z), device=z.device))
    target = Target(prior, log_ratio)
    at = target(z)
    log_w, accepted = at.log_r / num_temperatures, torch.zeros_like(at.log_r)
    between = range(1, num_temperatures)
    for t in between if backwards_from is None else reversed(between):
        at, acceptance = hmc_step(target, at, step_size, t / num_temperatures)
        log_w, accepted = log_w + at.log_r / num_temperatures, accepted + acceptance
    target.raise_if_bad(int(target.first_bad_step(at.z)))
    return Annealed(at.z, finite(log_w), accepted / len(between))


class _Particles:
    """Sequential Monte Carlo over the groups of a prior, with or without a retained draw."""

    def __init__(
        self,
        prior: NCPrior,
        num_particles: int,
        num_temperatures: int,
        step_size: float,
        condition: Any,  # noqa: ANN401
    ) -> None:
        self.prior, self.source, self.num_particles = prior, prior.source, num_particles
        self.anneal = partial(anneal, num_temperatures=num_temperatures, step_size=step_size)
        self.condition = condition
        self.moved = num_temperatures > 1
        self.accepted, self.moves = 0.0, 0

    def run(self, retained: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Returns log Ẑ and, without a retained draw, one particle: a z_k per group."""
        count = self.num_particles - (retained is not None)
        state, kept = self._start(count), None if retained is None else self._start(1)
        log_z, latents = torch.zeros((), dtype=torch.float64), list[Tensor]()
        for k in range(self.source.num_groups):
            step = self._step(k, state, None)
            log_w, ahead = step.log_w, self.source.advance(state, step.z)
            if retained is not None:
                log_w = torch.cat([log_w, self._step(k, kept, retained[k]).log_w])
                kept = self.source.advance(kept, retained[k])
                ahead = _cat(ahead, kept)
            log_w = log_w.cpu().double()
            log_z = log_z + log_w.logsumexp(0) - math.log(self.num_particles)
            # Parents of the next group's particles; the retained draw is its own.
            rows = torch.multinomial(log_w.softmax(0), count, replacement=True).to(step.z.device)
            state = _take(ahead, rows)
            if retained is None:
                latents = [z[rows] for z in (*latents, step.z)]
        return log_z, [z[:1] for z in latents]

    def _start(self, rows: int) -> Any:  # noqa: ANN401
        condition = map_tensors(
            lambda t: t.expand(rows, *t.shape[1:]) if t.ndim else t, self.condition
        )
        return self.source.start(rows, condition=condition)

    def _step(self, k: int, state: Any, z: Tensor | None) -> Annealed:  # noqa: ANN401
        """Draws or takes z_k, with its log-weight; the weight is 1 if the head is off."""
        group = self.source.group(state)
        event = getattr(group.prior, "event_shape", None)
        if z is not None and event is not None and z.shape[1:] != event:
            raise ValueError(
                f"exact[{k}] must have shape (R, *event) with the event {tuple(event)} of group {k}; "
                f"got the event {tuple(z.shape[1:])}."
            )
        if not self.prior.is_on(k):
            z = drawn(group.prior) if z is None else z
            return Annealed(z, *torch.zeros(2, len(z), device=z.device))

        def log_ratio(z: Tensor) -> Tensor:
            return self.prior.strength * self.prior.log_r(k, z, group.context)

        step = self.anneal(group.prior, log_ratio, backwards_from=z)
        if self.moved:
            self.accepted += step.acceptance.sum().item()
            self.moves += len(step.z)
        return step


def _cat(*trees: Any) -> Any:  # noqa: ANN401
    def join(*leaves: Any) -> Any:  # noqa: ANN401
        is_batch = isinstance(leaves[0], Tensor) and leaves[0].ndim > 0
        return torch.cat(leaves) if is_batch else leaves[0]

    return tree_map(join, *trees)


def _take(tree: Any, rows: Tensor) -> Any:  # noqa: ANN401
    return tree_map_only(Tensor, lambda t: t[rows.to(t.device)] if t.ndim else t, tree)
