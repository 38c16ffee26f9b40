"""Cross-validation of bases: few held-out rows cannot tell them apart, and all training rows can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FOLDS = 5


def cross_validated(fit: Callable[[Tensor], Any], z: Tensor, compared: Tensor) -> Tensor:
    """Returns log p of every row in nats, ``(N,)``, under a base that was fitted to the rows of other folds.

    Arguments:
        fit: Fits a base to latents.
        z: Latents with shape ``(num_draws * N, *event)``, one draw of all rows after the other.
        compared: One draw of every row, ``(N, *event)``.
    """
    rows = z.unflatten(0, (-1, len(compared)))
    fold = torch.arange(len(compared), device=z.device) % FOLDS
    log_p = torch.empty(len(compared), device=z.device)
    for k in range(FOLDS):
        base = fit(rows[:, fold != k].flatten(0, 1))
        log_p[fold == k] = base.log_prob(compared[fold == k]).to(log_p)
    return log_p
