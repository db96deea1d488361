"""Fashion-MNIST with images held out of the training set, and with a helpful error where it is missing."""

from __future__ import annotations

import os.path as osp

from mmpretrain.datasets import FashionMNIST
from mmpretrain.datasets.mnist import read_sn3_pascalvincent_tensor
from mmpretrain.datasets.utils import rm_suffix
from mmpretrain.registry import DATASETS

from mmadvmoe.utils import choose

from .splits import SPLITS, part_of


@DATASETS.register_module()
class FashionMNISTSplit(FashionMNIST):
    """MMPretrain's Fashion-MNIST with a fixed part of the training set held out for validation.

    Images are (28, 28) uint8; the split is stratified by class and the same for every run. The files may be packed
    (``.gz``) or not. Nothing is downloaded unless ``download=True`` is given.

    Args:
        data_root: The folder that holds the four files.
        split: ``'train'`` (55,000 images), ``'val'`` (5,000), ``'trainval'`` (all 60,000) or ``'test'`` (10,000).
        num_val: Images held out of the training set.
        **kwargs: Other arguments of :class:`mmpretrain.datasets.FashionMNIST`, such as ``pipeline``.

    Raises:
        ValueError: If the split is none of these, or ``num_val`` leaves a part empty.
        FileNotFoundError: If a file is missing; the message says what to download.
    """

    image_shape = (1, 28, 28)

    def __init__(self, data_root: str = '', split: str = 'train', num_val: int = 5000, **kwargs) -> None:
        self.part = choose(split, SPLITS, 'dataset.split')
        self.num_val = num_val
        kwargs.setdefault('download', False)
        test = split == 'test'
        super().__init__(data_root=data_root, split='test' if test else 'train', test_mode=test, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Load the official files and give the images of the split, in their order."""
        if self.download:
            return part_of(super().load_data_list(), self.part, self.num_val)
        names = self.test_list if self.part == 'test' else self.train_list
        images, labels = (read_sn3_pascalvincent_tensor(self._file(name)).numpy() for name, _ in names)
        infos = [{'img': image, 'gt_label': int(label)} for image, label in zip(images, labels, strict=True)]
        return part_of(infos, self.part, self.num_val)

    def _file(self, name: str) -> str:
        """The packed file (gzip checks it as it is read), or what was unpacked from it."""
        root = self.data_prefix['root']
        for path in (osp.join(root, name), osp.join(root, rm_suffix(name))):
            if osp.isfile(path):
                return path
        raise FileNotFoundError(
            f'{type(self).__name__} needs the official files in {osp.abspath(root)}, where {name} is missing. Download '
            f'{self.url_prefix}{name} there, or set download=True; on Debian and Ubuntu the package '
            'dataset-fashion-mnist has them. If the data set is elsewhere, set data_root.'
        )
