"""Outcomes of robust evaluation and the metrics made of them."""

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
    'Outcome',
    'RobustOutcomes',
    'as_data_samples',
    'compute_metrics',
    'gather_outcomes',
    'route_metrics',
]
