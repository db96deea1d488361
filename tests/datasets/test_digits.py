import hashlib

import numpy as np
import pytest
import torch
from mmcv.transforms import RandomGrayscale
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS
from sklearn.datasets import load_digits

from mmadvmoe.cost import input_shape_of
from mmadvmoe.datasets import Digits, stratified_split


def _pixels(split: str) -> set[bytes]:
    dataset = Digits(split=split)
    return {dataset.get_data_info(i)['img'].tobytes() for i in range(len(dataset))}


def test_parts_are_disjoint_and_complete() -> None:
    train, val, test = _pixels('train'), _pixels('val'), _pixels('test')
    assert (len(train), len(val), len(test)) == (1257, 180, 360)
    assert not train & val and not train & test and not val & test
    assert train | val == _pixels('trainval')


def test_split_is_pinned() -> None:
    """Results of two releases are comparable only if both select and test on the same images."""
    trainval, test = stratified_split(load_digits().target, 360)
    digest = hashlib.sha256(test.astype('<i8').tobytes()).hexdigest()
    assert digest.startswith('d040d215f6d53853')
    np.random.seed(123)
    again, _ = stratified_split(load_digits().target, 360)
    np.testing.assert_array_equal(trainval, again)


def test_images_are_the_scans_of_scikit_learn() -> None:
    dataset = Digits(split='test')
    _, test = stratified_split(load_digits().target, 360)
    scans = load_digits().images[test]
    for i in (0, 100, 359):
        info = dataset.get_data_info(i)
        assert info['img'].dtype == np.uint8 and info['img'].shape == (8, 8, 3)
        assert info['sample_idx'] == i
        np.testing.assert_allclose(info['img'][..., 1] / 255, scans[i] / 16, atol=0.5 / 255)
        assert info['gt_label'] == load_digits().target[test[i]]


def test_every_class_keeps_its_share() -> None:
    for split, size in (('train', 1257), ('val', 180), ('test', 360)):
        counts = np.bincount(Digits(split=split).get_gt_labels(), minlength=10)
        expected = np.bincount(load_digits().target) * size / 1797
        assert np.abs(counts - expected).max() < 1.5


def test_runs_through_the_pipelines_of_mmpretrain() -> None:
    init_default_scope('mmpretrain')
    pipeline = [
        dict(type='Resize', scale=16),
        dict(type='RandomCrop', crop_size=16, padding=2),
        dict(type='RandomFlip', prob=0.5, direction='horizontal'),
        dict(type='PackInputs'),
    ]
    item = DATASETS.build(dict(type='Digits', split='val', pipeline=pipeline))[7]
    assert item['inputs'].shape == (3, 16, 16) and item['inputs'].dtype == torch.uint8
    assert item['data_samples'].sample_idx == 7


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"split='valid' is unknown.*; allowed: train, val, trainval, test$"):
        Digits(split='valid')


@pytest.mark.parametrize('num_held_out', [0, 6, -1])
def test_a_split_leaves_no_part_empty(num_held_out: int) -> None:
    with pytest.raises(ValueError, match=rf'between 1 and 5 .* got {num_held_out}'):
        stratified_split([0, 0, 0, 1, 1, 1], num_held_out)


def test_held_out_counts_follow_the_largest_remainder() -> None:
    labels = [0] * 5 + [1] * 3 + [2] * 2
    rest, held_out = stratified_split(labels, 4)
    assert np.bincount(np.array(labels)[held_out]).tolist() == [2, 1, 1]
    assert sorted([*rest, *held_out]) == list(range(10))
    assert not np.array_equal(held_out, stratified_split(labels, 4, seed=1)[1])


@pytest.mark.parametrize(
    'pipeline, channels',
    [
        ([], 3),
        ([dict(type='RandomGrayscale', prob=1.0)], 1),
        ([dict(type='mmpretrain.RandomGrayscale', prob=1.0)], 1),
        ([dict(type=RandomGrayscale, prob=1.0)], 1),
    ],
)
def test_the_shape_of_its_images_is_known_without_a_crop(pipeline: list, channels: int) -> None:
    dataset = dict(type='Digits', split='test', pipeline=[*pipeline, dict(type='PackInputs')])
    assert input_shape_of(dict(test_dataloader=dict(dataset=dataset))) == (channels, 8, 8)
    init_default_scope('mmpretrain')
    assert DATASETS.build(dataset)[0]['inputs'].shape == (channels, 8, 8)
