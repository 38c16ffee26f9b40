"""Plateau of held-out losses: the steps since a group has improved by more than the noise."""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

from ncprior.training.held_out import mean_and_error

_DOUBT = 0.02  # probability that noise passes for an improvement, of all groups together

_WORTH = 1e-3  # nats, which an error of log r of about 0.1 costs: the least improvement

_PART = 0.01  # of what has been gained so far: the least improvement of a wide gap

_WAIT = 3  # a plateau is a third of the steps, or more

_RECENT = 10  # the losses still fall if they fell in the last tenth of the steps


class Plateau:
    """The last step at which the held-out loss of each group was lower by more than its noise.

    Losses are compared row by row, on the same draws, with those of the last such step. The
    standard error of the difference is far smaller than that of a loss, and slow progress adds up
    until it is more than noise, and worth the steps: a hundredth of a head's gain over 2 log 2
    nats, the loss without a head.

    Arguments:
        losses: The losses before the first step, with shape ``(K, N)``.

    Attributes:
        reference: Losses at the last improvement, in float32, ``(K, N)``.
        since: Step of the last improvement, per group.
        worse: Whether the losses of all groups are now above the reference by more than the noise.

    Example:
        >>> plateau = Plateau(torch.ones(1, 50))
        >>> plateau.update(torch.rand(1, 50), step=100)
        >>> plateau.since, plateau.lasts(step=150, least=40)
        ([100], True)
    """

    def __init__(self, losses: Tensor) -> None:
        self.reference, self.since = losses.float(), [0] * len(losses)
        self.worse = False

    def update(self, losses: Tensor, step: int) -> None:
        """Compares the losses after a step with the reference."""
        sure = NormalDist().inv_cdf(1 - _DOUBT / len(losses))  # standard errors
        means, errors = mean_and_error((losses.float() - self.reference).cpu().double())
        gains = 2 * math.log(2) - self.reference.mean(1).cpu().double()
        worth = [max(_WORTH, _PART * gain) for gain in gains.tolist()]
        noise = [max(sure * error, least) for error, least in zip(errors, worth, strict=True)]
        self.worse = all(mean > least for mean, least in zip(means, noise, strict=True))
        for k, mean in enumerate(means):
            if mean < -noise[k]:
                self.reference[k], self.since[k] = losses[k].float(), step

    def lasts(self, step: int, least: int) -> bool:
        """Returns whether no group has improved for so many steps and a third of all steps."""
        return step - max(self.since) >= max(least, step / _WAIT)

    def still_falls(self, step: int) -> bool:
        """Returns whether a group has improved in the last tenth of the steps."""
        return max(self.since) > step - step / _RECENT
