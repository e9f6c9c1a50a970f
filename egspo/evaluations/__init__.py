"""Evaluation of trained models on tasks at several lengths: ``egspo eval``.

plan -> samples (decoded, scored, on disk one by one) -> summary with intervals
"""

from egspo.evaluations.checkpoints import best_checkpoint
from egspo.evaluations.intervals import Interval, bootstrap, wilson
from egspo.evaluations.plan import EvaluationPlan
from egspo.evaluations.run import run_evaluation
from egspo.evaluations.summary import SummaryRow, to_markdown

__all__ = [
    "EvaluationPlan",
    "Interval",
    "SummaryRow",
    "best_checkpoint",
    "bootstrap",
    "run_evaluation",
    "to_markdown",
    "wilson",
]
