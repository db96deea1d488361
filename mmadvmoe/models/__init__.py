from .backbones import DenseNet_CIFAR, ScaledVGG, WideResNet, WideResNet_CIFAR
from .balance_objectives import (
    RouterBalanceLoss,
    RouterGlobalEntropyLoss,
    RouterImportanceLoss,
    RouterLoadLoss,
    RouterLocalEntropyLoss,
    RouterZLoss,
)
from .classifier import RobustClassifier, RoutingRecord
from .data_preprocessor import AdvDataPreprocessor
from .finite import NonFiniteError, check_finite
from .more_objectives import MARTLoss
from .necks import AdaptiveAveragePooling
from .objectives import (
    AdversarialCrossEntropyLoss,
    Objective,
    Outputs,
    RobustBatch,
    RouterKLLoss,
    RouterLabelLoss,
    TRADESLoss,
)

__all__ = [
    'AdaptiveAveragePooling',
    'AdvDataPreprocessor',
    'AdversarialCrossEntropyLoss',
    'DenseNet_CIFAR',
    'MARTLoss',
    'NonFiniteError',
    'Objective',
    'Outputs',
    'RobustBatch',
    'RobustClassifier',
    'RouterBalanceLoss',
    'RouterGlobalEntropyLoss',
    'RouterImportanceLoss',
    'RouterKLLoss',
    'RouterLabelLoss',
    'RouterLoadLoss',
    'RouterLocalEntropyLoss',
    'RouterZLoss',
    'RoutingRecord',
    'ScaledVGG',
    'TRADESLoss',
    'WideResNet',
    'WideResNet_CIFAR',
    'check_finite',
]
