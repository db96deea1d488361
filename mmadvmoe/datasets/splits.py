"""Fixed splits of a data set, independent of the seed of training, and the order in which it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized

import numpy as np
from mmengine.dist import get_dist_info
from mmpretrain.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

#: Two parts of the training set, all of it, and the test set.
SPLITS = ('train', 'val', 'trainval', 'test')


def stratified_split(
    labels: Sequence[int] | np.ndarray, num_held_out: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out images so that every class keeps its share in both parts.

    Class c of n_c images gives n_c · num_held_out / n of them, rounded so that the counts add up to ``num_held_out``
    (largest remainder; the lower class first on ties).

    Args:
        labels: Class of each image, length n.
        num_held_out: How many images to hold out, 1 to n - 1.
        seed: Picks one of the possible splits. It belongs to the data set, not to a training run: a model must never
            meet an image in training on which another run selects.

    Returns:
        Ascending indices of the images that remain, and of those held out.

    Raises:
        ValueError: If ``num_held_out`` leaves either part empty.
    """
    labels = np.asarray(labels)
    if not 0 < num_held_out < len(labels):
        raise ValueError(
            f'num_held_out must lie between 1 and {len(labels) - 1} for a data set of {len(labels)} images, but got '
            f'{num_held_out}.'
        )
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * num_held_out / len(labels)
    counts = np.floor(exact).astype(int)
    by_remainder = np.argsort(counts - exact, kind='stable')
    counts[by_remainder[: num_held_out - counts.sum()]] += 1

    # RandomState and not default_rng: numpy promises that its stream never changes, so that the split is the same for
    # every version.
    generator = np.random.RandomState(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for name, count in zip(classes, counts):
        members = np.flatnonzero(labels == name)
        held_out[generator.permutation(members)[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def part_of(data_list: list[dict], split: str, num_val: int) -> list[dict]:
    """Images of ``'train'`` or ``'val'``, which divide the official training set; any other split is its whole set."""
    if split not in ('train', 'val'):
        return data_list
    train, val = stratified_split([info['gt_label'] for info in data_list], num_val)
    return [data_list[i] for i in (train if split == 'train' else val)]


@DATA_SAMPLERS.register_module()
class ChunkSampler(Sampler):
    """Deal whole chunks of consecutive images out to the processes, in data set order.

    Chunk c holds images [c·S, (c+1)·S); process r of W takes chunks r, r + W, r + 2W, ... Every image is visited
    exactly once and none is repeated to even out the processes, so the processes may do different numbers of batches.

    Args:
        dataset: The data set.
        chunk_size: S, images in a chunk; the last chunk may hold fewer.
        seed: Taken because the Runner gives one to every sampler; nothing here is random.

    Raises:
        ValueError: If ``chunk_size`` is below 1.
    """

    def __init__(self, dataset: Sized, chunk_size: int, seed: int | None = None) -> None:
        if chunk_size < 1:
            raise ValueError(f'chunk_size must be at least 1, but got {chunk_size}.')
        self.dataset = dataset
        self.chunk_size = chunk_size
        self.rank, self.world_size = get_dist_info()

    def chunks(self) -> range:
        """Number the chunks of this process, in the order in which their images come."""
        num_chunks = -(-len(self.dataset) // self.chunk_size)
        return range(self.rank, num_chunks, self.world_size)

    def chunk(self, index: int) -> range:
        """Give the indices of the images of one chunk."""
        start = index * self.chunk_size
        return range(start, min(start + self.chunk_size, len(self.dataset)))

    def __iter__(self) -> Iterator[int]:
        for index in self.chunks():
            yield from self.chunk(index)

    def __len__(self) -> int:
        return sum(len(self.chunk(index)) for index in self.chunks())
