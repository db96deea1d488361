"""Images in [0, 1] and labels for robust evaluation, from what a user may have of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from mmengine.registry import DefaultScope
from mmpretrain.datasets import build_dataset
from mmpretrain.models import ClsDataPreprocessor
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from mmadvmoe.attacks import Victim
from mmadvmoe.attacks.model import as_unit, check_unit
from mmadvmoe.datasets import ChunkSampler
from mmadvmoe.models.data_preprocessor import as_pixels, check_images

Data = Mapping | Dataset | tuple[Tensor, Tensor]

# Images that `spread_images` brings to [0, 1] at a time.
_BATCH = 128


@dataclass(frozen=True, eq=False)
class Chunk:
    """B images of a data set that are attacked together.

    Attributes:
        number: Number of the chunk in the data set.
        indices: Index of each image in the data set.
        images: (B, C, H, W) in [0, 1].
        labels: True classes, (B,) int64.
    """

    number: int
    indices: Sequence[int]
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of labels and images, which tells the same chunk of other data apart."""
        digest = hashlib.sha256(self.labels.cpu().numpy().tobytes())
        digest.update(self.images.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def take(self, rows: Tensor) -> Chunk:
        """Pick images by their row, (b,) int64 on the CPU."""
        there = rows.to(self.images.device)
        return Chunk(self.number, [self.indices[row] for row in rows.tolist()], self.images[there], self.labels[there])


def as_dataset(data: Data) -> Dataset:
    """Build the data set that robust evaluation goes through.

    Args:
        data: Config of a data set of MMPretrain; a data set whose samples are as MMPretrain packs them (``inputs``,
            ``data_samples``) or pairs of an image in [0, 1] and a label; or the tensors ``(images, labels)``,
            (B, C, H, W) in [0, 1], uint8 or uint16, and (B,) int64.

    Raises:
        TypeError: It is something else.
        ValueError: Images and labels do not belong together.
    """
    if isinstance(data, Mapping):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            return build_dataset(dict(data))
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(each, Tensor) for each in data):
        images, labels = data
        if images.dim() != 4 or labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f'data must be images (B, C, H, W) and labels (B,) of class indices (of one-hot labels that is '
                f'labels.argmax(1)), got {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}'
            )
        return TensorDataset(images, labels.long())
    if not hasattr(data, '__getitem__') or not hasattr(data, '__len__') or isinstance(data, (str, tuple, list)):
        raise TypeError(
            'data must be the config of a data set, a data set (with __getitem__ and __len__), or the tensors (images, '
            f'labels), got a {type(data).__name__}; torch.stack and torch.from_numpy make tensors of samples and arrays'
        )
    return data


def class_names(dataset: Dataset, num_classes: int) -> list[str]:
    """Names of the classes; where the data set does not tell them, their numbers."""
    return [str(name) for name in getattr(dataset, 'metainfo', {}).get('classes') or range(num_classes)]


def read_chunks(dataset: Dataset, sampler: ChunkSampler, victim: Victim) -> Iterator[Chunk]:
    """Read a data set chunk by chunk, onto the device of the model.

    Packed samples go through the data preprocessor of the classifier.

    Raises:
        ValueError: Images have several sizes or are not in [0, 1], or an image has not exactly one label.
    """
    device = next(iter(victim.parameters()), torch.empty(0)).device
    preprocessor = getattr(victim.classifier, 'data_preprocessor', None)
    for number in sampler.chunks():
        indices = sampler.chunk(number)
        images, labels = _read(dataset, indices, preprocessor)
        yield Chunk(number, indices, images.to(device), labels.to(device))


def spread_images(dataset: Dataset, data_preprocessor: ClsDataPreprocessor | None, count: int) -> tuple[Tensor, Tensor]:
    """Read images (B, 3, H, W) in [0, 1] and labels (B,), evenly spread over a data set, which may be sorted by class.

    ``count`` of them, or all if there are fewer; packed samples go through the preprocessor of the classifier.
    """
    count = min(count, len(dataset))
    indices = [number * len(dataset) // count for number in range(count)]
    parts = [_read(dataset, indices[i : i + _BATCH], data_preprocessor) for i in range(0, count, _BATCH)]
    images, labels = zip(*parts)
    return torch.cat(images), torch.cat(labels)


def unit_batch(
    data_preprocessor: ClsDataPreprocessor, batch: Mapping, indices: Sequence[int], loader: str = 'data'
) -> tuple[Tensor, Tensor]:
    """Turn a batch (``inputs``, ``data_samples``) into images in [0, 1] and labels, on the model's device.

    Errors name the ``loader`` and the ``indices`` of the images in its data set.

    Returns:
        Images (B, 3, H, W) in [0, 1], exactly on the grid of 1/255 where they came as uint8, and labels (B,) int64.

    Raises:
        ValueError: The images have several sizes or are not in 0..255, or an image has not exactly one label.
    """
    check_images(batch['inputs'], loader)
    for index, sample in zip(indices, batch['data_samples']):
        if 'gt_label' not in sample or sample.gt_label.numel() != 1:
            found = sample.gt_label.tolist() if 'gt_label' in sample else 'none'
            raise ValueError(
                f'robust evaluation needs exactly one label for each image, but image {index} of the data set has '
                f'{found}.'
            )
    exact = all(image.dtype == torch.uint8 for image in batch['inputs'])
    data = data_preprocessor(dict(batch, inputs=as_pixels(batch['inputs'])), False)
    images = data['inputs']
    if hasattr(data_preprocessor, 'to_unit'):
        images = data_preprocessor.to_unit(images)
    else:
        if data_preprocessor._enable_normalize:
            images = images * data_preprocessor.std + data_preprocessor.mean
        images = images / 255
    if exact and images.shape[1:] == batch['inputs'][0].shape:
        # Undo the rounding of the way through normalisation and back.
        images = (images * 255).round() / 255
    labels = torch.cat([sample.gt_label for sample in data['data_samples']])
    return images.clamp(0, 1), labels.to(images.device)


def span(indices: Sequence[int]) -> str:
    """The first and the last of some images, for errors."""
    return f'{indices[0]} to {indices[-1]}'


def _read(
    dataset: Dataset, indices: Sequence[int], data_preprocessor: ClsDataPreprocessor | None
) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) in [0, 1] and labels (B,)."""
    samples: list[Any] = [dataset[index] for index in indices]
    if isinstance(samples[0], Mapping) and {'inputs', 'data_samples'} <= set(samples[0]):
        batch = {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}
        return unit_batch(data_preprocessor or ClsDataPreprocessor(), batch, indices)
    for index, sample in zip(indices, samples):
        _check_pair(sample, index)
    sizes = {tuple(image.shape) for image, _ in samples}
    if len(sizes) > 1:
        raise ValueError(f'images {span(indices)} of the data have several sizes {sorted(sizes)}')
    images = as_unit(torch.stack([image for image, _ in samples]))
    check_unit(images, f'images {span(indices)} of the data', slack=0.0)
    return images.float(), torch.as_tensor([int(label) for _, label in samples])


def _check_pair(sample: Any, index: int) -> None:
    """Raise TypeError unless a sample is an image and its class index."""
    pair = sample if isinstance(sample, (tuple, list)) and len(sample) == 2 else None
    if pair and isinstance(pair[0], Tensor) and pair[0].dim() == 3:
        label = torch.as_tensor(pair[1]) if isinstance(pair[1], (int, Tensor, np.ndarray, np.generic)) else None
        if label is not None and label.numel() == 1 and not label.is_floating_point():
            return
        cure = 'the label must be a class index; of one-hot labels that is label.argmax()'
    elif isinstance(sample, Mapping):
        cure = (
            f'a dict must have inputs and data_samples, as PackInputs makes them, and this one has {list(sample)}; '
            'wrap the data set in one that gives (image, label)'
        )
    else:
        cure = (
            'the image must be a tensor (C, H, W); of PIL images and arrays (H, W, C) '
            'torchvision.transforms.functional.to_tensor makes one, as transform of the data set'
        )
    found = ', '.join(map(_kind, pair)) if pair else _kind(sample)
    raise TypeError(f'sample {index} of the data ({found}) is no pair of an image and a label: {cure}')


def _kind(value: Any) -> str:
    shape = getattr(value, 'shape', None)
    return type(value).__name__ + ('' if shape is None else f' of shape {tuple(shape)}')
