"""Data sets that MMPretrain lacks, and the samplers of robust evaluation."""

from .cifar import CIFAR10Split, CIFAR100Split
from .digits import Digits
from .extra import ExtraImages
from .fashion_mnist import FashionMNISTSplit
from .imagenet import ImageNetSplit, TinyImageNet
from .samplers import ChunkSampler
from .splits import stratified_split

__all__ = [
    'CIFAR10Split',
    'CIFAR100Split',
    'ChunkSampler',
    'Digits',
    'ExtraImages',
    'FashionMNISTSplit',
    'ImageNetSplit',
    'TinyImageNet',
    'stratified_split',
]
