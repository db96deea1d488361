"""More images than the training set has, mixed into the batches at a ratio."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmpretrain.datasets import build_dataset
from mmpretrain.registry import DATASETS
from torch.utils.data import Dataset


@DATASETS.register_module()
class ExtraImages(Dataset):
    """A training set whose samples are, at a ratio, taken from another set: unlabelled images with labels that a model
    gave them, or generated ones.

    An epoch is as long as that of the training set; each sample is, at probability ``ratio``, a random extra one
    in its place. Carmon et al., arXiv:1905.13736, for unlabelled images; Gowal et al., arXiv:2110.09468, for
    generated ones.

    Args:
        dataset (dict): Config of the training set.
        extra (dict): Config of the extra images, with the same classes; a ``CustomDataset`` of MMPretrain, for example.
        ratio (float): Share of the extra images, in [0, 1). Defaults to 0.5.

    Examples:
        >>> train_dataloader = dict(dataset=dict(_delete_=True, type='ExtraImages', ratio=0.7,
        ...     dataset=dict(type='CIFAR10Split', split='train', ...), extra=dict(type='CustomDataset', ...)))

    Raises:
        ValueError: ``ratio`` is out of range, there is no extra image, or the two have other classes.
    """

    def __init__(self, dataset: dict, extra: dict, ratio: float = 0.5) -> None:
        # Written so that NaN fails too.
        if not 0 <= ratio < 1:
            raise ValueError(f'dataset.ratio={ratio} must lie in [0, 1)')
        self.dataset, self.extra, self.ratio = build_dataset(dataset), build_dataset(extra), ratio
        if not len(self.extra):
            raise ValueError(f'dataset.extra={dict(extra)} holds no image')
        classes = [each.metainfo.get('classes') for each in (self.dataset, self.extra)]
        if classes[1] is not None and tuple(classes[0] or ()) != tuple(classes[1]):
            raise ValueError(f'dataset.extra has the classes {classes[1]}, but dataset.dataset has {classes[0]}')

    @property
    def metainfo(self) -> dict:
        """What the training set tells of itself."""
        return self.dataset.metainfo

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if np.random.rand() < self.ratio:
            return self.extra[np.random.randint(len(self.extra))]
        return self.dataset[index]
