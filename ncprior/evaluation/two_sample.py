r"""Classifier two-sample test: can a classifier tell drawn rows from real ones?

A classifier learns to tell two sets of rows apart on one part of them, and its scores are measured
on the rest. If both sets come from one distribution, its area under the ROC curve (AUC) is
:math:`\tfrac{1}{2}` on average, whatever it learnt. Its log-odds estimate a log-ratio, whose
held-out loss is a lower bound of the Jensen-Shannon divergence.

References:
    | Revisiting Classifier Two-Sample Tests (Lopez-Paz & Oquab, ICLR 2017)
    | Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves
    | (DeLong, DeLong & Clarke-Pearson, 1988)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ncprior.evaluation.auroc import AUROC, auroc
from ncprior.evaluation.tables import features_of
from ncprior.utils.gradients import gradients_enabled
from ncprior.utils.optimise import minimise, standardise
from ncprior.utils.random_state import seeded
from ncprior.utils.require import require_choice, require_counts, require_numbers

LogOdds: TypeAlias = Callable[[Tensor], Tensor]  # of a row being real, at even odds

_FEWEST_ROWS = 10  # of each kind in a fold

_BATCH_SIZE = 256  # rows of each kind

_STEPS = 500


class TwoSampleTest(NamedTuple):
    """Result of a classifier two-sample test.

    Attributes:
        auc: Probability that a real row gets a higher score than a drawn row: 0.5 if the
            classifier cannot tell them apart, 1 if it always can.
        low: Lower end of the confidence interval of the AUC.
        high: Upper end of the confidence interval.
        jsd: Lower bound of the Jensen-Shannon divergence, in nats: log 2 minus the classifier's
            mean loss. It is 0 or below if the classifier cannot tell the rows apart.
        jsd_error: Standard error of the bound.
    """

    auc: float
    low: float
    high: float
    jsd: float
    jsd_error: float

    @property
    def differs(self) -> bool:
        """Whether the classifier tells drawn rows from real ones, beyond the noise."""
        return self.low > 0.5

    def __str__(self) -> str:
        can = "can" if self.differs else "cannot"
        return (
            f"AUC {self.auc:.3f} ({self.low:.3f}–{self.high:.3f}): drawn rows {can} be told from "
            f"real ones"
        )


def two_sample_test(
    real: Any,  # noqa: ANN401
    drawn: Any,  # noqa: ANN401
    *,
    classifier: str = "network",
    folds: int = 5,
    level: float = 0.95,
    seed: int = 0,
) -> TwoSampleTest:
    """Classifier two-sample test between real and drawn rows.

    Both sets are split into folds. For each fold a classifier is fitted to the others, so that all
    rows are scored by a classifier that has not seen them. The AUC is the mean over the folds. Its
    variance is twice DeLong's, and that of the loss twice that of independent rows, as folds that
    teach and test one another are not independent. The interval is that of a normal distribution.
    The AUC is that of these classifiers: a better one, or one with more rows, may have a higher AUC.

    Arguments:
        real: Rows of held-out data, with shape ``(N, ...)``: latents, features of images, or a
            table, as a tensor, an array, a list or a DataFrame. Columns of texts are categories.
        drawn: Rows of samples, with shape ``(N', ...)``.
        classifier: ``"network"``, a linear model with a small network, which suits latents and
            features; or ``"trees"``, the histogram-based gradient boosting of scikit-learn (extra
            ``[trees]``), which suits tables.
        folds: Number of folds, 2 or more; the time is proportional to it.
        level: Coverage of the interval.
        seed: Seed of the folds and of the classifier; global generators stay as they are.

    Returns:
        The AUC with its interval, and a lower bound of the Jensen-Shannon divergence.

    Raises:
        ImportError: If ``classifier`` is ``"trees"`` and scikit-learn is not installed.
        TypeError: If rows are no numbers or categories.
        ValueError: If there are fewer than 10 rows of a kind per fold, columns differ, a value is
            missing or not finite, or an argument is out of range.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz & Oquab, ICLR 2017)

    Example:
        >>> real, drawn = torch.randn(2, 500, 4)
        >>> found = two_sample_test(real, drawn + 0.5, folds=2)
        >>> found.low < 0.76 < found.high  # the best is Φ(|d| / √2)
        True
    """
    require_choice("classifier", classifier, _FITS)
    require_counts("[2, inf)", folds=folds)
    require_numbers("(0, 1)", level=level)
    require_counts("[0, 1e18]", seed=seed)
    with gradients_enabled(), seeded(seed):
        real, drawn = (x.detach() for x in features_of(real=real, drawn=drawn))
        if min(len(real), len(drawn)) < _FEWEST_ROWS * folds:
            raise ValueError(
                f"A test with {folds} folds needs at least {_FEWEST_ROWS * folds} real rows and as "
                f"many drawn ones; got {len(real)} and {len(drawn)}. Draw more rows."
            )
        scores = list(_scores(real, drawn, _FITS[classifier], int(folds)))
    areas = [auroc(*pair) for pair in scores]
    of_real, of_drawn = map(torch.cat, zip(*scores, strict=True))
    return _result(areas, [softplus(-of_real), softplus(of_drawn)], level)


def _scores(
    real: Tensor, drawn: Tensor, fit: Callable[[Tensor, Tensor], LogOdds], folds: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-odds of the real and the drawn rows of every fold, from a fit to the other folds."""
    fold_of = [torch.randperm(len(x)).to(x.device) % folds for x in (real, drawn)]
    for fold in range(folds):
        log_odds = fit(*(x[of != fold] for x, of in zip((real, drawn), fold_of, strict=True)))
        inside, outside = (
            log_odds(x[of == fold]) for x, of in zip((real, drawn), fold_of, strict=True)
        )
        yield inside, outside


def _result(areas: list[AUROC], losses: list[Tensor], level: float) -> TwoSampleTest:
    auc = sum(area.value for area in areas) / len(areas)
    # Two folds test what the other taught, so that their AUCs go together. If both sets are alike
    # and the rule is linear, this doubles the variance of the mean, whatever the number of folds.
    # That of the mean loss is about twice as large, too, in simulations of this network.
    error = math.sqrt(2 * sum(area.error**2 for area in areas)) / len(areas)
    margin = NormalDist().inv_cdf(0.5 + 0.5 * level) * error
    loss = sum(loss.mean().item() for loss in losses) / 2
    variance = sum(loss.var().item() / len(loss) for loss in losses) / 4
    return TwoSampleTest(
        auc,
        max(0.0, auc - margin),
        min(1.0, auc + margin),
        math.log(2) - loss,
        math.sqrt(2 * variance),
    )


def _fit_network(real: Tensor, drawn: Tensor) -> LogOdds:
    """Log-odds of a linear model plus a network, which starts as the rule of the nearest mean."""
    z, centre, spread = standardise(torch.cat((real, drawn)), torch.float64)
    z = z.float()  # only now: the mean may be much larger than the spread
    network = _Classifier(z[: len(real)], z[len(real) :])
    parts = [
        (x[1::5], torch.cat([x[k::5] for k in (0, 2, 3, 4)]))
        for x in (z[: len(real)], z[len(real) :])
    ]
    held_out, train = zip(*parts, strict=True)

    def loss() -> Tensor:
        rows = (torch.randint(len(x), (_BATCH_SIZE,), device=x.device) for x in train)
        return network.train().loss(*(x[index] for x, index in zip(train, rows, strict=True)))

    minimise(
        loss,
        lambda: network.eval().loss(*held_out),
        list(network.parameters()),
        steps=_STEPS,
        learning_rate=2e-3,
        weight_decay=0.1,
        patience=2,
        name="classifier",
    )

    @torch.no_grad()
    def log_odds(x: Tensor) -> Tensor:
        scores: Tensor = network.eval()(((x.to(centre) - centre) / spread).float())
        return scores.cpu().double()

    return log_odds


class _Classifier(nn.Module):
    """Linear model plus a network with two hidden layers, on standardised rows."""

    def __init__(self, real: Tensor, drawn: Tensor, width: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        centre, direction = (real.mean(0) + drawn.mean(0)) / 2, real.mean(0) - drawn.mean(0)
        noise = real.shape[1] * (
            1 / len(real) + 1 / len(drawn)
        )  # of |direction|² if all are alike
        direction = direction * (1 - noise / direction.square().sum()).nan_to_num().clamp(min=0.05)
        self.linear = nn.Linear(real.shape[1], 1)
        hidden = [nn.Linear(real.shape[1], width), nn.Linear(width, width)]
        self.network = nn.Sequential(
            *(layer for linear in hidden for layer in (linear, nn.SiLU(), nn.Dropout(dropout)))
        )
        self.out = nn.Linear(width, 1)
        self.to(real)
        with torch.no_grad():
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
            self.linear.weight[0] = direction
            self.linear.bias.copy_(-direction @ centre)

    def forward(self, z: Tensor) -> Tensor:
        log_odds: Tensor = (self.linear(z) + self.out(self.network(z))).squeeze(1)
        return log_odds

    def loss(self, real: Tensor, drawn: Tensor) -> Tensor:
        """Mean cross-entropy of equally many real and drawn rows, in nats."""
        return (softplus(-self(real)).mean() + softplus(self(drawn)).mean()) / 2


def _fit_trees(real: Tensor, drawn: Tensor) -> LogOdds:
    """Log-odds of gradient boosting that stops early, on rows of both kinds with equal weight."""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError as error:
        raise ImportError(
            f"A test with trees needs scikit-learn ({error}): install ncprior's extra 'trees' "
            f"(pip install '.[trees]' in the clone), or pass classifier='network'."
        ) from error
    labels = np.repeat([1, 0], [len(real), len(drawn)])
    trees = HistGradientBoostingClassifier(
        learning_rate=0.05,
        max_leaf_nodes=15,
        max_iter=500,
        early_stopping=True,
        validation_fraction=0.2,
        class_weight="balanced",
        random_state=int(torch.randint(2**31, ())),
    ).fit(torch.cat((real, drawn)).cpu().numpy(), labels)
    return lambda x: torch.from_numpy(trees.decision_function(x.cpu().numpy()))


_FITS = {"network": _fit_network, "trees": _fit_trees}
