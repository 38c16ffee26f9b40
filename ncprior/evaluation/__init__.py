"""Evaluation of samples, likelihoods and out-of-distribution detection."""

from ncprior.evaluation.auroc import AUROC, auroc, auroc_gain
from ncprior.evaluation.bounds import Bounds, bounds
from ncprior.evaluation.copies import NearCopies, near_copies
from ncprior.evaluation.estimates import Gain, Likelihood
from ncprior.evaluation.gap import GapClosed, GapDifference, gap_closed, gap_difference
from ncprior.evaluation.likelihood import log_likelihood
from ncprior.evaluation.metrics import (
    Features,
    PrecisionRecall,
    frechet_distance,
    inception_features,
    mmd,
    precision_recall,
)
from ncprior.evaluation.normaliser import LogZ, log_normaliser
from ncprior.evaluation.ood import OODScore, ood_score
from ncprior.evaluation.two_sample import TwoSampleTest, two_sample_test

__all__ = [
    "AUROC",
    "Bounds",
    "Features",
    "Gain",
    "GapClosed",
    "GapDifference",
    "Likelihood",
    "LogZ",
    "NearCopies",
    "OODScore",
    "PrecisionRecall",
    "TwoSampleTest",
    "auroc",
    "auroc_gain",
    "bounds",
    "frechet_distance",
    "gap_closed",
    "gap_difference",
    "inception_features",
    "log_likelihood",
    "log_normaliser",
    "mmd",
    "near_copies",
    "ood_score",
    "precision_recall",
    "two_sample_test",
]
