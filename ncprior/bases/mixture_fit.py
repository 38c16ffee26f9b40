"""Fit of a Gaussian mixture that is held to held-out rows: starts, shrinkage, number of EM steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ncprior.bases.em import Components, Rows, kmeans

# Rows that a shared covariance counts for, per latent: the first of all starts, then less or more.
_PRIOR_ROWS, _LESS, _MORE = 3.0, (1.0, 0.3, 0.0), (10.0, 30.0, 100.0)

_FIRST_ROWS, _FIRST_STEPS = 50, 10  # rows per component and steps of every start

_SOME_ROWS, _FEWEST_ROWS = 200, 10_000  # rows per component, and in all, that choose the shrinkage

_LAST_STEPS = 2  # on all rows

_PATIENCE = 5  # steps


class Fit(NamedTuple):
    """A fitted mixture.

    Attributes:
        mixture: Its parameters.
        held_out: Indices of the rows that were held out.
        log_p: log p(z) of the held-out rows in nats, before any step on them.
        gaussian_log_p: The same for a single Gaussian.
    """

    mixture: Components
    held_out: Tensor
    log_p: Tensor
    gaussian_log_p: Tensor


class _Best(NamedTuple):
    mixture: Components
    score: float  # mean log p(z) of held-out rows, in nats


class MixtureFit:
    """Fits mixtures to some of the rows, and holds them to the others.

    Arguments:
        z: Flat latents of mean 0 and standard deviation 1, with shape ``(N, D)``.
        is_full: Whether covariances are full.
        max_steps: Largest number of EM steps on all training rows.
        tolerance: Gain in mean log p(z), in nats per step, below which EM stops.
        regularisation: Added to the variances.
    """

    def __init__(
        self, z: Tensor, *, is_full: bool, max_steps: int, tolerance: float, regularisation: float
    ) -> None:
        self.z, self.is_full = z, is_full
        self.max_steps, self.tolerance = max_steps, tolerance
        self.regularisation = regularisation

    def fit(self, num_components: int, starts: int, order: Tensor, num_held_out: int) -> Fit:
        """Returns a mixture of some components, the best of some starts.

        Arguments:
            num_components: K.
            starts: Number of starts.
            order: A permutation of the rows; the first ones are held out.
            num_held_out: Number of rows that are held out for good; with 0, some are until the
                last steps, which are on all rows.
        """
        k, n = num_components, len(self.z)
        count = num_held_out or min(_num_held_out(n), n - k - 1)
        train, held_out = self.z[order[count:]], order[:count]
        self.held_out = self._rows(self.z[held_out] if count else train)
        first = train[: max(_FEWEST_ROWS, _FIRST_ROWS * k)]
        best = max((self._start(first, k) for _ in range(starts)), key=lambda run: run.score)
        some = self._rows(train[: max(_FEWEST_ROWS, _SOME_ROWS * k)])
        best, prior_rows = self._shrink(some, best.mixture)
        gaussian = self._gaussian(some, prior_rows)
        if len(train) > len(some):
            best = self._run(self._rows(train), best.mixture, prior_rows, self.max_steps)
        log_p, mixture = self.held_out.log_prob(best.mixture), best.mixture
        if not num_held_out:
            rows = self._rows(self.z)
            for _ in range(_LAST_STEPS):
                mixture = rows.maximise(rows.sums(mixture)[0], prior_rows, self.regularisation)
        return Fit(mixture, held_out, log_p, self.held_out.log_prob(gaussian))

    def _rows(self, z: Tensor) -> Rows:
        return Rows(z, is_full=self.is_full)

    def _gaussian(self, rows: Rows, prior_rows: float) -> Components:
        labels = self.z.new_zeros(len(rows), dtype=torch.long)
        return rows.maximise(rows.hard_sums(labels, 1), prior_rows, self.regularisation)

    def _start(self, z: Tensor, k: int) -> _Best:
        """A mixture from the clusters of k-means, after a few steps."""
        rows, prior_rows = self._rows(z), _PRIOR_ROWS * z.shape[1]
        sums = rows.hard_sums(kmeans(z, k), k)
        first = rows.maximise(sums, prior_rows, self.regularisation)
        return self._run(rows, first, prior_rows, _FIRST_STEPS)

    def _shrink(self, rows: Rows, mixture: Components) -> tuple[_Best, float]:
        """Weakens or strengthens the shrinkage while held-out rows become more likely."""
        first = _PRIOR_ROWS * rows.num_latents
        best, chosen = self._run(rows, mixture, first, self.max_steps), first
        for ratios in (_LESS, _MORE):
            for prior_rows in (ratio * rows.num_latents for ratio in ratios):
                run = self._run(rows, best.mixture, prior_rows, self.max_steps)
                if run.score <= best.score:
                    break
                best, chosen = run, prior_rows
            if chosen < first:
                break
        return best, chosen

    def _run(self, rows: Rows, mixture: Components, prior_rows: float, steps: int) -> _Best:
        """EM until neither training nor held-out rows gain; returns the best on held-out rows."""
        best, scores, means = _Best(mixture, -math.inf), [], []
        for _ in range(steps):
            sums, mean = rows.sums(mixture)
            mixture = rows.maximise(sums, prior_rows, self.regularisation)
            means.append(mean)
            scores.append(self.held_out.log_prob(mixture).mean().item())
            if scores[-1] > best.score:
                best = _Best(mixture, scores[-1])
            if self._has_converged(means, 1) or self._has_converged(scores, _PATIENCE):
                break
        return best

    def _has_converged(self, values: list[float], steps: int) -> bool:
        return len(values) > steps and values[-1] - values[-1 - steps] < steps * self.tolerance


def _num_held_out(rows: int) -> int:
    """A tenth of the rows; of few rows more, up to a fifth."""
    return max(rows // 10, min(200, rows // 5))
