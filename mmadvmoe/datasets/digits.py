"""Real handwritten digits that need no download."""

from __future__ import annotations

from functools import cache

import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from mmadvmoe.utils import choose

from .splits import SPLITS, stratified_split

_NUM_TEST = 360
_NUM_VAL = 180


@DATASETS.register_module()
class Digits(BaseDataset):
    """The 1,797 handwritten digits of scikit-learn, as small RGB images.

    8×8 scans with 17 grey levels, of the UCI data set `Optical Recognition of Handwritten Digits
    <https://archive.ics.uci.edu/dataset/80>`_. The grey levels 0..16 are spread over 0..255 and copied to three equal
    channels (H, W, 3) uint8. To enlarge the images, put ``dict(type='Resize', scale=32)`` first in the pipeline.

    The split is stratified by class and fixed: 1,257 images to train on, 180 to validate on, 360 to test on.

    Args:
        split: ``'train'``, ``'val'``, ``'trainval'`` (all but the test images) or ``'test'``.
        **kwargs: Other arguments of :class:`mmpretrain.datasets.BaseDataset`, such as ``pipeline``.

    Raises:
        ValueError: If the split is none of these.
    """

    METAINFO = {'classes': tuple('0123456789')}
    image_shape = (3, 8, 8)

    def __init__(self, split: str = 'train', **kwargs) -> None:
        self.split = choose(split, SPLITS, 'dataset.split')
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> list[dict]:
        """Give the images of the split in the order of scikit-learn, each with its label."""
        images, labels = _scans()
        trainval, test = stratified_split(labels, _NUM_TEST)
        train, val = (trainval[part] for part in stratified_split(labels[trainval], _NUM_VAL))
        chosen = {'train': train, 'val': val, 'trainval': trainval, 'test': test}[self.split]
        images = np.repeat(images[chosen, ..., None], 3, axis=-1)
        return [{'img': image, 'gt_label': int(label)} for image, label in zip(images, labels[chosen])]

    def extra_repr(self) -> list[str]:
        """Name the split when the data set is printed."""
        return [f'Split: \t{self.split}']


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) uint8 and their labels, which scikit-learn would parse out of text for each split anew."""
    # A slow import, and a package that nothing else here needs.
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target
