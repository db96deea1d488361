"""ImageNet-1k with images held out of the training set, and with a helpful error where files are missing."""

from __future__ import annotations

import os.path as osp

from mmpretrain.datasets import ImageNet
from mmpretrain.registry import DATASETS

from .files import files_in, folders_in, missing_files, summary
from .splits import check_split, part_of


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
        ValueError: If the split is none of these, or ``num_val`` leaves a part empty.
        FileNotFoundError: If images are missing; the message says what to download and where to put it.
    """

    SPLITS = ('train', 'val', 'trainval', 'test')
    page = 'https://image-net.org/challenges/LSVRC/2012/2012-downloads.php'
    #: Images of the official sets.
    official_sizes = dict(train=1281167, val=50000)

    def __init__(self, data_root: str = '', split: str = 'train', num_val: int = 10000, **kwargs) -> None:
        check_split(split, self.SPLITS)
        self.part = split
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
        return missing_files(self.img_prefix, names) if names else [f'{self.ann_file} is empty']

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
        found = summary(problems) if osp.isdir(self.img_prefix) else 'there is no such folder'
        archive = f'ILSVRC2012_img_{self.official}.tar'
        return (
            f'{type(self).__name__} needs the official images in {osp.abspath(self.img_prefix)} ({found}). Download '
            f'{archive} from {self.page} (an account is needed) and unpack it there, whole, with the archives inside '
            'it, each into a folder of its name. If the data set is elsewhere, set data_root to the folder that holds '
            'train/ and val/.'
        )
