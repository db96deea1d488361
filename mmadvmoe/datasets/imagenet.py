"""ImageNet-1k and Tiny-ImageNet, with images held out for validation and a helpful error where files are missing."""

from __future__ import annotations

import os
import os.path as osp
from collections import defaultdict
from collections.abc import Iterable

from mmpretrain.datasets import BaseDataset, ImageNet
from mmpretrain.registry import DATASETS

from mmadvmoe.utils import choose, some

from .splits import SPLITS, part_of


@DATASETS.register_module()
class ImageNetSplit(ImageNet):
    """MMPretrain's ImageNet-1k with a fixed part of the training set held out for validation.

    ``data_root`` holds ``train/`` and ``val/``, in one of the two layouts of :class:`mmpretrain.datasets.ImageNet`: one
    folder per class, or listed in ``meta/train.txt`` and ``meta/val.txt``, which
    ``tools/dataset_converters/imagenet_annotations.py`` writes for the archives as they unpack.

    Args:
        data_root: The folder that holds ``train/``, ``val/`` and perhaps ``meta/``.
        split: ``'train'`` (1,271,167 images), ``'val'`` (10,000), ``'trainval'`` (all 1,281,167 official training
            images) or ``'test'`` (the 50,000 official validation images, as everywhere in the literature).
        num_val: Images held out of the training set, by class.
        **kwargs: Other arguments of :class:`mmpretrain.datasets.ImageNet`, such as ``pipeline``.

    Raises:
        ValueError, FileNotFoundError: As :class:`CIFAR10Split`.
    """

    page = 'https://image-net.org/challenges/LSVRC/2012/2012-downloads.php'
    #: Images of the official sets.
    official_sizes = dict(train=1281167, val=50000)

    def __init__(self, data_root: str = '', split: str = 'train', num_val: int = 10000, **kwargs) -> None:
        self.part = choose(split, SPLITS, 'dataset.split')
        self.num_val = num_val
        self.official = 'val' if split == 'test' else 'train'
        super().__init__(data_root=data_root, split=self.official, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Check the files and give the images of the split, in their order."""
        problems = self._listed_problems() if self.ann_file else self._folder_problems()
        if problems:
            raise FileNotFoundError(self._advice(problems))
        return part_of(super().load_data_list(), self.part, self.num_val)

    def _listed_problems(self) -> list[str]:
        with open(self.ann_file, encoding='utf-8') as file:
            names = [line.rsplit(' ', 1)[0] for line in file if line.strip()]
        return _missing_files(self.img_prefix, names) if names else [f'{self.ann_file} is empty']

    def _folder_problems(self) -> list[str]:
        classes = folders_in(self.img_prefix)
        if not classes and files_in(self.img_prefix):
            return [
                f'{self.official}/ has no folder per class, and there is no meta/{self.official}.txt: '
                'tools/dataset_converters/imagenet_annotations.py writes it'
            ]
        sizes = [len(files_in(osp.join(self.img_prefix, name))) for name in classes]
        expected = self.official_sizes[self.official]
        problems = [f'{name}: no image' for name, size in zip(classes, sizes) if not size]
        if len(classes) != len(self.CLASSES):
            problems.insert(0, f'{len(classes)} of {len(self.CLASSES)} class folders')
        if sum(sizes) != expected:
            problems.insert(0, f'{sum(sizes):,} of {expected:,} images')
        return problems

    def _advice(self, problems: list[str]) -> str:
        found = some(problems, 3, '; ') if osp.isdir(self.img_prefix) else 'there is no such folder'
        archive = f'ILSVRC2012_img_{self.official}.tar'
        return (
            f'{type(self).__name__} needs the official images in {osp.abspath(self.img_prefix)} ({found}). Download '
            f'{archive} from {self.page} (an account is needed) and unpack it there, whole, with the archives inside '
            'it, each into a folder of its name. If the data set is elsewhere, set data_root to the folder that holds '
            'train/ and val/.'
        )


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
        num_val: Images held out of the training set; errors are those of :class:`ImageNetSplit`.
        **kwargs: Other arguments of :class:`mmpretrain.datasets.BaseDataset`, such as ``pipeline``.
    """

    base_folder = 'tiny-imagenet-200'
    url = 'http://cs231n.stanford.edu/tiny-imagenet-200.zip'

    def __init__(self, data_root: str = '', split: str = 'train', num_val: int = 5000, **kwargs) -> None:
        self.part = choose(split, SPLITS, 'dataset.split')
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
            *_missing_files(folder, [name for name, _ in train + test]),
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
        found = some(problems, 3, '; ') if osp.isdir(folder) else 'there is no such folder'
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


def files_in(folder: str) -> set[str]:
    """Names of the files in a folder; none if there is no such folder."""
    if not osp.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.is_dir()}


def folders_in(folder: str) -> list[str]:
    """Names of the folders in a folder, sorted; none if there is no such folder."""
    if not osp.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _missing_files(root: str, names: Iterable[str]) -> list[str]:
    """Say of each folder below ``root`` how many of the listed files are missing, as in 'train/n01440764: 12 of 1300'.

    Folders are listed once instead of asking for each of a million files.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition('/')
        by_folder[folder].append(file)
    problems = []
    for folder, files in by_folder.items():
        missing = len(set(files) - files_in(osp.join(root, folder)))
        if missing:
            problems.append(f'{folder or "."}: {missing} of {len(files)} images missing')
    return problems
