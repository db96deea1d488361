"""Fixed splits of a data set, independent of the seed of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
