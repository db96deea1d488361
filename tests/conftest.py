"""The same random numbers for each test, and small data sets in the formats in which the official ones come.

PyTorch and this package are imported inside of functions: the process that deals out the tests collects none and needs
neither, and all others wait for it.
"""

from __future__ import annotations

import gc
import gzip
import hashlib
import pickle
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

if TYPE_CHECKING:
    import torch

_RNG = np.random.RandomState(0)


def pytest_collectstart() -> None:
    import quick_runner  # noqa: F401  (for every Runner of the tests)
    import torch

    import mmadvmoe  # noqa: F401

    # Autograd asks once which devices there are, and PyTorch's fake tensors pretend a GPU. If it asked after them, it
    # would start a thread for that, and then work in no fork.
    torch.ones(1, requires_grad=True).backward()


def pytest_collection_finish() -> None:
    # What is imported by now stays: the garbage collector need not look at these objects again and again.
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--device', default='cuda', help='device of the tests marked gpu; without it they are skipped')


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test marked ``gpu``, which is skipped where there is none."""
    import torch

    device = torch.device(request.config.getoption('--device'))
    if device.type == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU')
    return device


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def no_drawing_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that build networks of full size to count something: most of that time would go into random numbers."""
    import torch

    for draw in ('kaiming_uniform_', 'kaiming_normal_', 'uniform_', 'normal_', 'trunc_normal_'):
        # Zeros, as memory that is left as it is may hold numbers that are none.
        monkeypatch.setattr(torch.nn.init, draw, lambda weight, *_, **__: weight.detach().zero_())


def _pickle(path: Path, content: dict) -> list:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pickle.dumps(content)
    path.write_bytes(data)
    return [path.name, hashlib.md5(data).hexdigest()]


def _image(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), _RNG.randint(0, 256, (size, size, 3)).astype(np.uint8))


def write_cifar(root: Path, base: type, images: int) -> dict:
    """Write pickled batches; give the lists of files with their checksums, as class attributes of the data set."""
    folder = root / base.base_folder
    classes = len(base.METAINFO['classes'])
    label_key, names_key = ('labels', 'label_names') if classes == 10 else ('fine_labels', 'fine_label_names')

    def batch(name: str, size: int) -> list:
        data = _RNG.randint(0, 256, (size, 3072)).astype(np.uint8)
        return _pickle(folder / name, {'data': data, label_key: [i % classes for i in range(size)]})

    return dict(
        train_list=[batch(name, images // len(base.train_list)) for name, _ in base.train_list],
        test_list=[batch(name, images // 2) for name, _ in base.test_list],
        meta=dict(
            base.meta, md5=_pickle(folder / base.meta['filename'], {names_key: list(base.METAINFO['classes'])})[1]
        ),
    )


def write_tiny_imagenet(root: Path, classes: int = 200, images: int = 2) -> Path:
    """Write the tree that the official archive unpacks to."""
    from mmadvmoe.datasets import TinyImageNet

    folder = root / TinyImageNet.base_folder
    # Not in order, as in the official file.
    wnids = [f'n{number:08d}' for number in range(classes)][::-1]
    annotations = []
    for number, wnid in enumerate(wnids):
        names = [f'{wnid}_{i}.JPEG' for i in range(images)]
        for name in names:
            _image(folder / 'train' / wnid / 'images' / name, 64)
        (folder / 'train' / wnid / f'{wnid}_boxes.txt').write_text(''.join(f'{name}\t0\t0\t62\t62\n' for name in names))
        if number < 20:
            _image(folder / 'val' / 'images' / f'val_{number}.JPEG', 64)
            annotations.append(f'val_{number}.JPEG\t{wnid}\t0\t0\t62\t62\n')
    (folder / 'val' / 'val_annotations.txt').write_text(''.join(annotations))
    (folder / 'wnids.txt').write_text('\n'.join(wnids) + '\n')
    return folder


def write_imagenet(root: Path, images: int = 40) -> Path:
    """Write training images in class folders, validation images side by side, and the list of both."""
    lines = dict(train=[], val=[])
    for number in range(images):
        name = f'n{number % 10:08d}/n{number % 10:08d}_{number}.JPEG'
        _image(root / 'train' / name, 40)
        lines['train'].append(f'{name} {number % 10 * 100}\n')
    for number in range(1, 11):
        name = f'ILSVRC2012_val_{number:08d}.JPEG'
        _image(root / 'val' / name, 40)
        lines['val'].append(f'{name} {number % 10 * 100}\n')
    (root / 'meta').mkdir()
    for part, content in lines.items():
        (root / 'meta' / f'{part}.txt').write_text(''.join(content))
    return root


def write_fashion_mnist(root: Path, images: int = 100) -> None:
    """The four files, packed but for the training images; every class has the same number of images."""
    root.mkdir(exist_ok=True)
    for name in ('train', 't10k'):
        pixels = _RNG.randint(0, 256, (images, 28, 28)).astype(np.uint8)
        labels = (np.arange(images) % 10).astype(np.uint8)
        for kind, values in (('images-idx3', pixels), ('labels-idx1', labels)):
            content = bytes([0, 0, 8, values.ndim]) + struct.pack(f'>{values.ndim}i', *values.shape) + values.tobytes()
            file = root / f'{name}-{kind}-ubyte'
            if (name, kind) == ('train', 'images-idx3'):
                file.write_bytes(content)
            else:
                file.with_name(f'{file.name}.gz').write_bytes(gzip.compress(content))


@pytest.fixture(scope='session')
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small versions of all data sets, under the names that the configs use."""
    from mmadvmoe.datasets import CIFAR10Split, CIFAR100Split

    root = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        for name, base in (('cifar10', CIFAR10Split), ('cifar100', CIFAR100Split)):
            for key, value in write_cifar(root / name, base, 200).items():
                patch.setattr(base, key, value)
        write_tiny_imagenet(root / 'tiny-imagenet')
        write_imagenet(root / 'imagenet')
        write_fashion_mnist(root / 'fashion-mnist')
        for number in range(80):
            name = f'{CIFAR10Split.METAINFO["classes"][number % 10]}/{number}.png'
            _image(root / 'cifar10_images' / ('train' if number < 60 else 'test') / name, 32)
        yield root
