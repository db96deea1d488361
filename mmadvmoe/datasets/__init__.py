"""Data sets that MMPretrain lacks, and the samplers of robust evaluation."""

from .cifar import CIFAR10Split, CIFAR100Split
from .digits import Digits
from .extra import ExtraImages
from .fashion_mnist import FashionMNISTSplit
from .folders import ImageFolders
from .imagenet import ImageNetSplit, TinyImageNet
from .memory import BatchedCropFlip, InMemory, keep_batch
from .samplers import ChunkSampler
from .splits import stratified_split

__all__ = [
    'BatchedCropFlip',
    'CIFAR10Split',
    'CIFAR100Split',
    'ChunkSampler',
    'Digits',
    'ExtraImages',
    'FashionMNISTSplit',
    'ImageFolders',
    'ImageNetSplit',
    'InMemory',
    'TinyImageNet',
    'keep_batch',
    'stratified_split',
]
