from .classifier import RobustClassifier, RoutingRecord
from .data_preprocessor import AdvDataPreprocessor
from .finite import NonFiniteError, check_finite
from .objectives import (
    AdversarialCrossEntropyLoss,
    Objective,
    Outputs,
    RobustBatch,
    RouterBalanceLoss,
    RouterKLLoss,
    RouterLabelLoss,
    TRADESLoss,
)

__all__ = [
    'AdvDataPreprocessor',
    'AdversarialCrossEntropyLoss',
    'NonFiniteError',
    'Objective',
    'Outputs',
    'RobustBatch',
    'RobustClassifier',
    'RouterBalanceLoss',
    'RouterKLLoss',
    'RouterLabelLoss',
    'RoutingRecord',
    'TRADESLoss',
    'check_finite',
]
