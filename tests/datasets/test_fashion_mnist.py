from pathlib import Path

import numpy as np
import pytest

from mmadvmoe.cost import input_shape_of
from mmadvmoe.datasets import FashionMNISTSplit


@pytest.fixture
def files(small_data: Path) -> str:
    return str(small_data / 'fashion-mnist')


def test_parts_are_disjoint_stratified_and_complete(files):
    parts = {split: FashionMNISTSplit(files, split, num_val=20) for split in ('train', 'val', 'trainval', 'test')}
    assert {split: len(part) for split, part in parts.items()} == dict(train=80, val=20, trainval=100, test=100)
    pixels = {split: {part[i]['img'].tobytes() for i in range(len(part))} for split, part in parts.items()}
    assert not pixels['train'] & pixels['val'] and pixels['train'] | pixels['val'] == pixels['trainval']
    assert not pixels['test'] & pixels['trainval']
    assert np.bincount(parts['val'].get_gt_labels()).tolist() == [2] * 10
    assert parts['val'].metainfo['classes'][7] == 'Sneaker'


def test_a_missing_file_is_named_with_the_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match='train-images-idx3-ubyte.gz is missing. Download http'):
        FashionMNISTSplit(str(tmp_path))


def test_the_shape_of_its_images_is_known_without_a_transform():
    dataset = dict(type='FashionMNISTSplit', pipeline=[dict(type='PackInputs')])
    assert input_shape_of(dict(train_dataloader=dict(dataset=dataset))) == (1, 28, 28)
    dataset['pipeline'].insert(0, dict(type='RandomCrop', crop_size=24))
    assert input_shape_of(dict(train_dataloader=dict(dataset=dataset))) == (1, 24, 24)
