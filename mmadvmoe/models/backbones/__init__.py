"""Backbones that MMPretrain lacks."""

from .densenet import DenseNet_CIFAR
from .vgg import ScaledVGG
from .wide_resnet import WideResNet, WideResNet_CIFAR
from .widths import check_width, check_widths

__all__ = ['DenseNet_CIFAR', 'ScaledVGG', 'WideResNet', 'WideResNet_CIFAR', 'check_width', 'check_widths']
