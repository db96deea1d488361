"""Robust evaluation: named attacks on every image of a data set, and the metrics made of the outcomes."""

from .examples import Examples, attack_examples
from .folder import OutcomeFolder, SavedChunk, SavedEvaluation, read_evaluation
from .loops import RobustTestLoop, RobustValLoop
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
    'Examples',
    'Outcome',
    'OutcomeFolder',
    'RobustOutcomes',
    'RobustTestLoop',
    'RobustValLoop',
    'SavedChunk',
    'SavedEvaluation',
    'as_data_samples',
    'attack_examples',
    'compute_metrics',
    'gather_outcomes',
    'read_evaluation',
    'route_metrics',
]
