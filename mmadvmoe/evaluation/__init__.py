"""Outcomes of robust evaluation and the metrics made of them."""

from .folder import OutcomeFolder, SavedChunk, SavedEvaluation, read_evaluation
from .outcomes import (
    CLEAN,
    NORMS,
    WORST,
    Outcome,
    RobustOutcomes,
    as_data_samples,
    compute_metrics,
    gather_outcomes,
    route_metrics,
)

__all__ = [
    'CLEAN',
    'NORMS',
    'WORST',
    'Outcome',
    'OutcomeFolder',
    'RobustOutcomes',
    'SavedChunk',
    'SavedEvaluation',
    'as_data_samples',
    'compute_metrics',
    'gather_outcomes',
    'read_evaluation',
    'route_metrics',
]
