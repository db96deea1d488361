"""CIFAR with images held out of the training set, and with a helpful error where it is missing."""

from __future__ import annotations

import os.path as osp

from mmpretrain.datasets import CIFAR10, CIFAR100
from mmpretrain.datasets.utils import check_md5
from mmpretrain.registry import DATASETS

from mmadvmoe.utils import choose

from .splits import SPLITS, part_of


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
