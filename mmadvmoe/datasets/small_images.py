"""CIFAR, Fashion-MNIST and handwritten digits, with images held out of the training set.

Where one is missing, the error says what to download; the digits need no download.
"""

from __future__ import annotations

import os.path as osp
from functools import cache

import numpy as np
from mmpretrain.datasets import CIFAR10, CIFAR100, BaseDataset, FashionMNIST
from mmpretrain.datasets.mnist import read_sn3_pascalvincent_tensor
from mmpretrain.datasets.utils import check_md5, rm_suffix
from mmpretrain.registry import DATASETS

from mmadvmoe.utils import choose

from .splits import SPLITS, part_of, stratified_split


class _HeldOutCIFAR:
    """The part of :class:`CIFAR10Split` and :class:`CIFAR100Split` that MMPretrain's data sets do not have."""

    page = 'https://www.cs.toronto.edu/~kriz/cifar.html'

    def __init__(self, data_root: str = '', split: str = 'train', num_val: int = 5000, **kwargs) -> None:
        self.part = choose(split, SPLITS, 'dataset.split')
        self.num_val = num_val
        kwargs.setdefault('download', False)
        official = 'test' if split == 'test' else 'train'
        super().__init__(data_root=data_root, split=official, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Load the official files and give the images of the split, in their order."""
        if not self.download:
            self._require_files()
        return part_of(super().load_data_list(), self.part, self.num_val)

    def _require_files(self) -> None:
        """Check every official file, on every process, before any process waits for another."""
        root = self.data_prefix['root']
        folder = osp.join(root, self.base_folder)
        files = [*self.train_list, *self.test_list, (self.meta['filename'], self.meta['md5'])]
        missing = [name for name, _ in files if not osp.isfile(osp.join(folder, name))]
        # Never unpickled when altered: the files are pickles, and a pickle can run code.
        damaged = [name for name, md5 in files if name not in missing and not check_md5(osp.join(folder, name), md5)]
        if not missing and not damaged:
            return
        if len(missing) == len(files):
            found = 'none of its files is there'
        else:
            states = (('missing', missing), ('damaged or incomplete', damaged))
            found = '; '.join(f'{state}: {", ".join(names)}' for state, names in states if names)
        archive = osp.join(root, self.filename)
        raise FileNotFoundError(
            f'{type(self).__name__} needs the official files in {osp.abspath(folder)} ({found}). Download {self.url} '
            f'(the "python version" on {self.page}), save it as {archive} and unpack it there: tar -xzf {archive} -C '
            f'{root}. If the data set is elsewhere, set data_root to the folder that holds {self.base_folder}/.'
        )


@DATASETS.register_module()
class CIFAR10Split(_HeldOutCIFAR, CIFAR10):
    """MMPretrain's CIFAR-10 with a fixed part of the training set held out for validation.

    Robust accuracy needs a validation set of its own: the best checkpoint must not be chosen on the images that the
    result is reported on. The split is stratified by class and the same for every run.

    Nothing is downloaded unless ``download=True`` is given.

    Args:
        data_root: The folder that holds ``cifar-10-batches-py/``.
        split: ``'train'`` (45,000 images), ``'val'`` (5,000), ``'trainval'`` (all 50,000 official training images) or
            ``'test'`` (the 10,000 official test images).
        num_val: Images held out of the training set.
        **kwargs: Other arguments of :class:`mmpretrain.datasets.CIFAR10`, such as ``pipeline``.

    Raises:
        ValueError: If the split is none of these, or ``num_val`` leaves a part empty.
        FileNotFoundError: If a file of the data set is missing or is not the official one; the message says what to
            download and where to put it.
    """


@DATASETS.register_module()
class CIFAR100Split(_HeldOutCIFAR, CIFAR100):
    """MMPretrain's CIFAR-100 with a fixed part of the training set held out for validation.

    Arguments and errors as :class:`CIFAR10Split`; ``data_root`` holds ``cifar-100-python/``.
    """


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
        ValueError, FileNotFoundError: As :class:`CIFAR10Split`.
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
