"""Tiny-ImageNet as its official archive unpacks."""

from __future__ import annotations

import os.path as osp

from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from .files import missing_files, summary
from .splits import check_split, part_of


@DATASETS.register_module()
class TinyImageNet(BaseDataset):
    """Tiny-ImageNet: 200 classes, 64×64 images, 500 a class to train on and 10,000 to test on.

    The layout is that of the official archive::

        data_root/tiny-imagenet-200/
        ├── wnids.txt
        ├── train/<wnid>/images/<wnid>_<number>.JPEG, train/<wnid>/<wnid>_boxes.txt
        └── val/images/val_<number>.JPEG, val/val_annotations.txt

    The official test set has no labels, so that results are reported on its validation set, as everywhere in the
    literature; images to select on are held out of the training set, the same number of each class. Classes are
    numbered in the order of their WordNet ids.

    Args:
        data_root: The folder that holds ``tiny-imagenet-200/``.
        split: ``'train'`` (95,000 images), ``'val'`` (5,000), ``'trainval'`` (all 100,000 official training images) or
            ``'test'`` (the 10,000 official validation images).
        num_val: Images held out of the training set.
        **kwargs: Other arguments of :class:`mmpretrain.datasets.BaseDataset`, such as ``pipeline``.

    Raises:
        ValueError: If the split is none of these, or ``num_val`` leaves a part empty.
        FileNotFoundError: If a file is missing; the message says what to download and where to put it.
    """

    SPLITS = ('train', 'val', 'trainval', 'test')
    base_folder = 'tiny-imagenet-200'
    url = 'http://cs231n.stanford.edu/tiny-imagenet-200.zip'

    def __init__(self, data_root: str = '', split: str = 'train', num_val: int = 5000, **kwargs) -> None:
        check_split(split, self.SPLITS)
        self.part = split
        self.num_val = num_val
        super().__init__(ann_file='', data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Check the files and give the images of the split, in the order of their classes and names."""
        folder = osp.join(self.data_root, self.base_folder)
        wnids = sorted(_lines(osp.join(folder, 'wnids.txt')))
        boxes = {wnid: _lines(osp.join(folder, 'train', wnid, f'{wnid}_boxes.txt')) for wnid in wnids}
        train = [
            (f'train/{wnid}/images/{line.split()[0]}', label)
            for label, wnid in enumerate(wnids)
            for line in boxes[wnid]
        ]
        annotations = [line.split()[:2] for line in _lines(osp.join(folder, 'val', 'val_annotations.txt'))]
        labels = {wnid: label for label, wnid in enumerate(wnids)}
        test = [(f'val/images/{name}', labels[wnid]) for name, wnid in annotations if wnid in labels]
        problems = [
            *([] if wnids else ['wnids.txt is missing or empty']),
            *(f'train/{wnid}/{wnid}_boxes.txt is missing or empty' for wnid in wnids if not boxes[wnid]),
            *([] if test else ['val/val_annotations.txt is missing or empty']),
            *missing_files(folder, [name for name, _ in train + test]),
        ]
        if problems:
            raise FileNotFoundError(self._advice(folder, problems))
        self._metainfo['classes'] = tuple(wnids)
        data_list = [
            dict(img_path=osp.join(folder, name), gt_label=label)
            for name, label in (test if self.part == 'test' else train)
        ]
        return part_of(data_list, self.part, self.num_val)

    def _advice(self, folder: str, problems: list[str]) -> str:
        found = summary(problems) if osp.isdir(folder) else 'there is no such folder'
        archive = osp.join(self.data_root, osp.basename(self.url))
        return (
            f'{type(self).__name__} needs the official files in {osp.abspath(folder)} ({found}). Download {self.url}, '
            f'save it as {archive} and unpack it there, whole: unzip -q {archive} -d {self.data_root}. If the data set '
            f'is elsewhere, set data_root to the folder that holds {self.base_folder}/.'
        )

    def extra_repr(self) -> list[str]:
        """Name the split when the data set is printed."""
        return [f'Split: \t{self.part}']


def _lines(path: str) -> list[str]:
    """The lines of a file that are not empty; none if there is no such file."""
    if not osp.isfile(path):
        return []
    with open(path, encoding='utf-8') as file:
        return [line.strip() for line in file if line.strip()]
