"""Data sets that MMPretrain lacks, and the samplers of robust evaluation."""

from .folders import ImageFolders
from .imagenet import ImageNetSplit, TinyImageNet
from .memory import BatchedCropFlip, ExtraImages, InMemory, keep_batch
from .small_images import CIFAR10Split, CIFAR100Split, Digits, FashionMNISTSplit
from .splits import ChunkSampler, stratified_split

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
