"""Backbones that MMPretrain lacks."""

from .densenet import DenseNet_CIFAR
from .plain_convnet import PlainConvNet, SideBranch
from .sizes import check_width, check_widths
from .vgg import AdaptiveAveragePooling, ScaledVGG
from .wide_resnet import WideResNet, WideResNet_CIFAR

__all__ = [
    'AdaptiveAveragePooling',
    'DenseNet_CIFAR',
    'PlainConvNet',
    'ScaledVGG',
    'SideBranch',
    'WideResNet',
    'WideResNet_CIFAR',
    'check_width',
    'check_widths',
]
