"""Images and labels for robust evaluation, from what a user may have of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union

import torch
from mmengine.registry import DefaultScope
from mmpretrain.datasets import build_dataset
from mmpretrain.models import ClsDataPreprocessor
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from mmadvmoe.attacks import Victim
from mmadvmoe.datasets import ChunkSampler

from .robust_evaluation import unit_batch

Data = Union[Mapping, Dataset, tuple[Tensor, Tensor]]


def as_dataset(data: Data) -> Dataset:
    """Build the data set that robust evaluation goes through.

    Args:
        data: Config of a data set of MMPretrain; a data set whose samples are as MMPretrain packs them
            (``inputs``, ``data_samples``) or pairs of an image in [0, 1] and a label; or the tensors
            ``(images, labels)``, (B, C, H, W) in [0, 1] or uint8, and (B,) int64.

    Raises:
        TypeError: It is something else.
        ValueError: Images and labels do not belong together, or images are not in [0, 1].
    """
    if isinstance(data, Mapping):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            return build_dataset(dict(data))
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(each, Tensor) for each in data):
        images, labels = data
        if images.dim() != 4 or labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f'data must be images (B, C, H, W) and labels (B,) of class indices, got {tuple(images.shape)} and '
                f'{labels.dtype} {tuple(labels.shape)}'
            )
        return TensorDataset(images, labels.long())
    if not hasattr(data, '__getitem__') or not hasattr(data, '__len__') or isinstance(data, (str, tuple, list)):
        raise TypeError(
            'data must be the config of a data set, a data set, or the tensors (images, labels), got a '
            f'{type(data).__name__}'
        )
    return data


def unit_chunks(dataset: Dataset, sampler: ChunkSampler, victim: Victim) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Read a data set chunk by chunk.

    Args:
        dataset: From :func:`as_dataset`.
        sampler: Which chunks to read.
        victim: The model, on whose device the images go; packed samples go through its classifier's data preprocessor.

    Yields:
        Number of the chunk, images (B, C, H, W) in [0, 1], and labels (B,) int64.

    Raises:
        ValueError: Images have several sizes or are not in [0, 1], or an image has not exactly one label.
    """
    device = next(iter(victim.parameters()), torch.empty(0)).device
    preprocessor = getattr(victim.classifier, 'data_preprocessor', None) or ClsDataPreprocessor()
    for index in sampler.chunks():
        place = sampler.chunk(index)
        samples = [dataset[i] for i in place]
        if isinstance(samples[0], Mapping):
            batch = {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}
            images, labels = unit_batch(preprocessor, batch, place)
        else:
            images, labels = _pairs(samples, place)
        yield index, images.to(device), labels.to(device)


def _pairs(samples: Sequence[Any], place: Sequence[int]) -> tuple[Tensor, Tensor]:
    sizes = {tuple(image.shape) for image, _ in samples}
    if len(sizes) > 1:
        raise ValueError(f'images {place[0]} to {place[-1]} of the data have several sizes {sorted(sizes)}')
    images = torch.stack([image for image, _ in samples])
    if images.dtype == torch.uint8:
        images = images / 255
    low, high = images.amin().item(), images.amax().item()
    # Written so that NaN fails too.
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f'images {place[0]} to {place[-1]} of the data are not in [0, 1]: values from {low:.4g} to {high:.4g}. '
            'Normalisation belongs inside the model'
        )
    return images.float(), torch.as_tensor([int(label) for _, label in samples])
