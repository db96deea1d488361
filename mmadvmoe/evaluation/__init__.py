"""Outcomes of robust evaluation and the metrics made of them."""

from .examples import Examples, attack_examples
from .outcomes import (
    CLEAN,
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
    'WORST',
    'Examples',
    'Outcome',
    'RobustOutcomes',
    'as_data_samples',
    'attack_examples',
    'compute_metrics',
    'gather_outcomes',
    'route_metrics',
]
