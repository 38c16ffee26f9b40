"""Diagnosis of a trained prior: calibration, verdicts, and the choice of sampler and strength."""

from ncprior.diagnostics.calibration import (
    Recalibration,
    Reliability,
    pareto_k,
    recalibrate,
    reliability,
)
from ncprior.diagnostics.diagnose import diagnose
from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.recommend import Recommendation, recommend_sampler
from ncprior.diagnostics.report import Report
from ncprior.diagnostics.strength import match_strength

__all__ = [
    "GroupReport",
    "Recalibration",
    "Recommendation",
    "Reliability",
    "Report",
    "Verdict",
    "diagnose",
    "match_strength",
    "pareto_k",
    "recalibrate",
    "recommend_sampler",
    "reliability",
]
