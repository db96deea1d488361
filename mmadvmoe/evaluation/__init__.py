"""Robust evaluation: named attacks on every image of a data set, and the metrics made of the outcomes."""

from .chunks import Examples, attack_examples
from .data import Chunk, as_dataset, spread_images
from .folder import OutcomeFolder, SavedEvaluation, read_evaluation
from .loops import RobustTestLoop, RobustValLoop
from .outcomes import CLEAN, WORST, Outcome, RobustOutcomes, compute_metrics, gather_outcomes, route_metrics

__all__ = [
    'CLEAN',
    'WORST',
    'Chunk',
    'Examples',
    'Outcome',
    'OutcomeFolder',
    'RobustOutcomes',
    'RobustTestLoop',
    'RobustValLoop',
    'SavedEvaluation',
    'as_dataset',
    'attack_examples',
    'compute_metrics',
    'gather_outcomes',
    'read_evaluation',
    'route_metrics',
    'spread_images',
]
