"""The data sets read files in the official format; these tests write small ones."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS

from mmadvmoe.datasets import CIFAR10Split, CIFAR100Split


def _write(folder: Path, name: str, content: dict) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    data = pickle.dumps(content)
    (folder / name).write_bytes(data)
    return [name, hashlib.md5(data).hexdigest()]


def _small(root: Path, base: type, label_key: str, names: dict) -> type:
    """Write a small data set and give ``base`` with the checksums of these files."""
    folder = root / base.base_folder
    rng = np.random.RandomState(0)

    def batch(name: str, size: int) -> list[str]:
        labels = [i % 10 for i in range(size)]
        data = rng.randint(0, 256, (size, 3072)).astype(np.uint8)
        return _write(folder, name, {'data': data, label_key: labels})

    return type(
        base.__name__,
        (base,),
        dict(
            train_list=[batch(name, 40) for name, _ in base.train_list],
            test_list=[batch(name, 20) for name, _ in base.test_list],
            meta=dict(base.meta, md5=_write(folder, base.meta['filename'], names)[1]),
        ),
    )


@pytest.fixture
def cifar10(tmp_path: Path) -> type:
    return _small(tmp_path, CIFAR10Split, 'labels', {'label_names': list('abcdefghij')})


def _images(dataset: CIFAR10Split) -> list[bytes]:
    return [dataset.get_data_info(i)['img'].tobytes() for i in range(len(dataset))]


def test_val_is_held_out_of_train_class_by_class(cifar10: type, tmp_path: Path) -> None:
    parts = {
        split: cifar10(data_root=str(tmp_path), split=split, num_val=50)
        for split in ('train', 'val', 'trainval', 'test')
    }
    assert {split: len(part) for split, part in parts.items()} == dict(train=150, val=50, trainval=200, test=20)
    train, val, trainval, test = (set(_images(part)) for part in parts.values())
    assert not train & val and train | val == trainval and not trainval & test
    assert np.bincount(parts['val'].get_gt_labels()).tolist() == [5] * 10
    again = cifar10(data_root=str(tmp_path), split='val', num_val=50)
    assert _images(again) == _images(parts['val'])


def test_cifar100_reads_fine_labels(tmp_path: Path) -> None:
    names = {'fine_label_names': [str(i) for i in range(100)]}
    dataset = _small(tmp_path, CIFAR100Split, 'fine_labels', names)(data_root=str(tmp_path), split='val', num_val=10)
    assert sorted(dataset.get_gt_labels()) == list(range(10))
    assert len(dataset.metainfo['classes']) == 100


def test_missing_data_set_says_what_to_download_and_where_to_put_it(tmp_path: Path) -> None:
    init_default_scope('mmpretrain')
    root = tmp_path / 'nothing'
    with pytest.raises(FileNotFoundError) as caught:
        DATASETS.build(dict(type='CIFAR10Split', data_root=str(root), split='train'))
    message = str(caught.value)
    assert 'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz' in message
    assert 'https://www.cs.toronto.edu/~kriz/cifar.html' in message
    assert str(root / 'cifar-10-batches-py') in message
    assert f'-C {root}' in message and 'none of its files' in message
    assert not root.exists()


def test_half_unpacked_and_damaged_files_are_named(cifar10: type, tmp_path: Path) -> None:
    folder = tmp_path / 'cifar-10-batches-py'
    (folder / 'data_batch_4').unlink()
    damaged = folder / 'data_batch_2'
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError) as caught:
        cifar10(data_root=str(tmp_path), split='train', num_val=50)
    assert 'missing: data_batch_4; damaged or incomplete: data_batch_2)' in str(caught.value)


class _Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_foreign_pickle_is_not_executed(cifar10: type, tmp_path: Path) -> None:
    trace = tmp_path / 'executed'
    (tmp_path / 'cifar-10-batches-py' / 'test_batch').write_bytes(pickle.dumps(_Planted(trace)))
    with pytest.raises(FileNotFoundError, match='damaged or incomplete: test_batch'):
        cifar10(data_root=str(tmp_path), split='test')
    assert not trace.exists()


def test_bad_split_and_num_val(cifar10: type, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split='validation' is unknown.*; allowed: train, val, trainval, test$"):
        cifar10(data_root=str(tmp_path), split='validation')
    with pytest.raises(ValueError, match='between 1 and 199 .* 200 images, but got 200'):
        cifar10(data_root=str(tmp_path), split='val', num_val=200)
