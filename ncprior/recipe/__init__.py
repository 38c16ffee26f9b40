"""Recipe for a better prior, and the report on it."""

from ncprior.recipe.choices import Candidate, Choice, Score
from ncprior.recipe.improve import improve
from ncprior.recipe.measure import report_on
from ncprior.recipe.report import Improvement

__all__ = ["Candidate", "Choice", "Improvement", "Score", "improve", "report_on"]
