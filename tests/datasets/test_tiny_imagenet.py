import shutil
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS

from mmadvmoe.datasets import TinyImageNet
from mmadvmoe.datasets.splits import SPLITS

# Packing the data list collects garbage, which takes seconds in a process that holds all of MMPretrain.
PLAIN = dict(serialize_data=False)


@pytest.fixture
def broken(small_data: Path, tmp_path: Path) -> Path:
    """A copy to break; gives the folder that the archive unpacks to."""
    shutil.copytree(small_data / 'tiny-imagenet', tmp_path / 'copy')
    return tmp_path / 'copy' / 'tiny-imagenet-200'


def test_parts_are_disjoint_and_labelled_by_wordnet_id(small_data: Path) -> None:
    root = str(small_data / 'tiny-imagenet')
    parts = {part: TinyImageNet(data_root=root, split=part, num_val=100, **PLAIN) for part in SPLITS}
    assert {part: len(data) for part, data in parts.items()} == dict(train=300, val=100, trainval=400, test=20)
    train, val, trainval, test = ({info['img_path'] for info in data} for data in parts.values())
    assert not train & val and train | val == trainval and not trainval & test
    assert np.bincount(parts['val'].get_gt_labels(), minlength=200).max() == 1
    classes = parts['train'].metainfo['classes']
    assert len(classes) == 200 and list(classes) == sorted(classes)
    for info in parts['train']:
        assert Path(info['img_path']).name.startswith(classes[info['gt_label']])
    # The first image of val_annotations.txt belongs to the class that comes last.
    assert [info['gt_label'] for info in parts['test']][:2] == [199, 198]


def test_images_are_read(small_data: Path) -> None:
    init_default_scope('mmpretrain')
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    data = DATASETS.build(
        dict(type='TinyImageNet', data_root=str(small_data / 'tiny-imagenet'), split='test', pipeline=pipeline)
    )
    assert data[0]['inputs'].shape == (3, 64, 64)


def _error(folder: Path) -> str:
    with pytest.raises(FileNotFoundError) as caught:
        TinyImageNet(data_root=str(folder.parent), split='test', **PLAIN)
    return str(caught.value)


def test_nothing_there_says_what_to_download_and_where_to_put_it(tmp_path: Path) -> None:
    message = _error(tmp_path / 'nothing' / 'tiny-imagenet-200')
    assert 'http://cs231n.stanford.edu/tiny-imagenet-200.zip' in message
    assert str(tmp_path / 'nothing' / 'tiny-imagenet-200') in message and 'there is no such folder' in message
    assert f'unzip -q {tmp_path}/nothing/tiny-imagenet-200.zip -d {tmp_path}/nothing' in message


def test_half_unpacked_folders_are_named(broken: Path) -> None:
    (broken / 'train' / 'n00000007' / 'images' / 'n00000007_1.JPEG').unlink()
    shutil.rmtree(broken / 'train' / 'n00000150' / 'images')
    (broken / 'val' / 'images' / 'val_3.JPEG').unlink()
    message = _error(broken)
    assert 'train/n00000007/images: 1 of 2 images missing' in message
    assert 'train/n00000150/images: 2 of 2 images missing' in message
    assert 'val/images: 1 of 20 images missing' in message


def test_a_class_without_a_folder_and_missing_lists_are_named(broken: Path) -> None:
    shutil.rmtree(broken / 'train' / 'n00000007')
    (broken / 'val' / 'val_annotations.txt').unlink()
    message = _error(broken)
    assert 'train/n00000007/n00000007_boxes.txt is missing' in message
    assert 'val/val_annotations.txt is missing' in message
    (broken / 'wnids.txt').unlink()
    assert 'wnids.txt is missing' in _error(broken)


def test_bad_split() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        TinyImageNet(data_root='x', split='validation')
