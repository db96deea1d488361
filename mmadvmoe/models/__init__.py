"""The classifier that learns from adversarial images, its data preprocessor, its losses, and backbones."""

from .backbones import AdaptiveAveragePooling, DenseNet_CIFAR, ScaledVGG, WideResNet, WideResNet_CIFAR
from .classifier import FreeClassifier, RobustClassifier, RoutingRecord
from .data_preprocessor import AdvDataPreprocessor
from .losses import (
    AdversarialCrossEntropyLoss,
    MARTLoss,
    NonFiniteError,
    Objective,
    Outputs,
    RobustBatch,
    TRADESLoss,
    check_finite,
)
from .router_losses import (
    ClassGroupLoss,
    RouterBalanceLoss,
    RouterGlobalEntropyLoss,
    RouterImportanceLoss,
    RouterKLLoss,
    RouterLabelLoss,
    RouterLoadLoss,
    RouterLocalEntropyLoss,
    RouterZLoss,
)

__all__ = [
    'AdaptiveAveragePooling',
    'AdvDataPreprocessor',
    'AdversarialCrossEntropyLoss',
    'ClassGroupLoss',
    'DenseNet_CIFAR',
    'FreeClassifier',
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
