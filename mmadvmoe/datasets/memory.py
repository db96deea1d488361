"""Data sets around others: as one tensor, augmented batch by batch on whichever device; and with more images.

Dimension letters: B images, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import get_rank, get_world_size
from mmengine.registry import FUNCTIONS
from mmpretrain.datasets import build_dataset
from mmpretrain.registry import DATASETS, TRANSFORMS
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.utils.data import Dataset


@DATASETS.register_module()
class InMemory(Dataset):
    """A data set whose pipeline is run once, image by image, at the start; afterwards batches are cut from a tensor.

    For images of one size whose augmentation happens later, in the data preprocessor (:class:`BatchedCropFlip`). Takes
    C·H·W bytes for each image. The loader needs ``collate_fn=dict(type='keep_batch')``.

    Args:
        dataset (dict or Dataset): An MMPretrain data set; nothing in its pipeline may be random.

    Raises:
        ValueError: Images differ in size, or are not 8-bit.

    Examples:
        >>> train_dataloader = dict(
        ...     collate_fn=dict(type='keep_batch'),
        ...     dataset=dict(type='InMemory', dataset=dict(
        ...         type='CIFAR10Split', data_root='data/cifar10', pipeline=[dict(type='PackInputs')])))
    """

    def __init__(self, dataset: Mapping | Dataset) -> None:
        source = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
        samples = (source[index] for index in range(len(source)))
        first = next(samples)
        images = first['inputs'].new_empty(len(source), *first['inputs'].shape)
        labels = torch.empty(len(source), dtype=torch.int64)
        for index, sample in enumerate((first, *samples)):
            image = sample['inputs']
            if image.dtype != torch.uint8 or image.shape != images.shape[1:]:
                raise ValueError(
                    f'InMemory needs 8-bit images of one size, and image {index} of {type(source).__name__} is '
                    f'{image.dtype} of shape {tuple(image.shape)} where the first is {tuple(images.shape[1:])}; add a '
                    'Resize to dataset.pipeline, and leave out what makes numbers of another type'
                )
            images[index], labels[index] = image, sample['data_samples'].gt_label
        self.images, self.labels = images, labels
        self.metainfo = getattr(source, 'metainfo', {})

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(inputs=self.images[index], data_samples=DataSample(gt_label=self.labels[index : index + 1]))

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch, as PyTorch's loaders ask for it: (B, C, H, W) uint8, and B samples."""
        rows = torch.as_tensor(indices)
        labels = self.labels[rows].unsqueeze(1)
        return dict(inputs=self.images[rows], data_samples=[DataSample(gt_label=label) for label in labels])

    def get_cat_ids(self, index: int) -> list[int]:
        """The class of an image, as MMPretrain's data sets tell it."""
        return [int(self.labels[index])]


@FUNCTIONS.register_module()
def keep_batch(batch: dict) -> dict:
    """Collate nothing: :class:`InMemory` gives whole batches. Raise TypeError for samples of another data set."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            "collate_fn=dict(type='keep_batch') is for a data set of type InMemory, which this is not: remove it from "
            'train_dataloader, or wrap the data set'
        )
    return batch


@TRANSFORMS.register_module()
class BatchedCropFlip:
    """Crop images out of a zero margin and mirror them, as MMPretrain's ``RandomCrop`` and ``RandomFlip`` do.

    Each image gets its own position, all equally likely. Numbers are drawn from the random state of the images' device.
    In distributed training they are drawn for the batch of all processes, of which each takes those of its own images
    (MMEngine's ``DefaultSampler`` gives rank r the samples r, r + W, ...), so W processes augment as one with W times
    the batch does.

    Args:
        padding (int or tuple): Margin in pixels, on each side; or that above and below, and that left and right.
            Defaults to 4.
        flip (float): Probability of a horizontal mirror image, in [0, 1]. Defaults to 0.5.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, padding: int | tuple[int, int] = 4, flip: float = 0.5) -> None:
        self.padding = (padding, padding) if isinstance(padding, int) else tuple(padding)
        if len(self.padding) != 2 or not all(isinstance(each, int) and each >= 0 for each in self.padding):
            raise ValueError(f'BatchedCropFlip.padding={padding!r} must be one or two whole numbers of at least 0')
        if not 0 <= flip <= 1:
            raise ValueError(f'BatchedCropFlip.flip={flip!r} must be in [0, 1]')
        self.flip = flip

    def __call__(self, images: Tensor) -> Tensor:
        """Augment (B, C, H, W), of any type; the result is new."""
        batch, _, height, width = images.shape
        above, left = self.padding
        everywhere, own = (batch * get_world_size(), 1), slice(get_rank(), None, get_world_size())

        def draw(count: int) -> Tensor:
            """(B, 1) whole numbers from 0 to ``count`` - 1."""
            return torch.randint(count, everywhere, device=images.device)[own]

        rows = draw(2 * above + 1) + torch.arange(height, device=images.device)
        columns = draw(2 * left + 1) + torch.arange(width, device=images.device)
        if self.flip:
            mirrored = torch.rand(everywhere, device=images.device)[own] < self.flip
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (left, left, above, above)).permute(0, 2, 3, 1)
        index = torch.arange(batch, device=images.device)[:, None, None]
        return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

    def __repr__(self) -> str:
        return f'{type(self).__name__}(padding={self.padding}, flip={self.flip})'


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
        # Without workers, all processes of a distributed training draw the same numbers from NumPy's state.
        rng = np.random.default_rng([np.random.randint(2**31), get_rank()])
        return self.extra[rng.integers(len(self.extra))] if rng.random() < self.ratio else self.dataset[index]
