"""Backbones that MMPretrain lacks."""

from .densenet import DenseNet_CIFAR
from .sizes import check_width, check_widths
from .vgg import AdaptiveAveragePooling, ScaledVGG
from .wide_resnet import WideResNet, WideResNet_CIFAR

__all__ = [
    'AdaptiveAveragePooling',
    'DenseNet_CIFAR',
    'ScaledVGG',
    'WideResNet',
    'WideResNet_CIFAR',
    'check_width',
    'check_widths',
]
