import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS
from torch.utils.data import DataLoader

import mmadvmoe.datasets  # noqa: F401

TRAIN = dict(type='Digits', split='train', pipeline=[dict(type='PackInputs')])
EXTRA = dict(type='Digits', split='val', pipeline=[dict(type='PackInputs')])


def build(**settings):
    init_default_scope('mmpretrain')
    return DATASETS.build({**dict(type='ExtraImages', dataset=TRAIN, extra=EXTRA), **settings})


def key(sample):
    return sample['inputs'].numpy().tobytes(), int(sample['data_samples'].gt_label)


@pytest.mark.parametrize('ratio', [0.0, 0.3, 0.8])
def test_so_many_samples_are_extra_ones_with_their_own_labels(ratio):
    mixed = build(ratio=ratio)
    extra = {key(mixed.extra[i]) for i in range(len(mixed.extra))}
    train = [key(mixed.dataset[i]) for i in range(len(mixed.dataset))]
    assert len(mixed) == len(train) and mixed.metainfo['classes'] == tuple('0123456789')
    np.random.seed(0)
    taken = [key(mixed[i]) for i in range(len(mixed))]
    replaced = [now for now, before in zip(taken, train) if now != before]
    assert set(replaced) <= extra
    assert len(replaced) / len(train) == pytest.approx(ratio, abs=0.05)
    # All of them have their turn.
    assert len(set(replaced)) >= 0.75 * len(extra) * bool(ratio)
    batch = next(iter(DataLoader(mixed, batch_size=8, collate_fn=list)))
    assert torch.stack([sample['inputs'] for sample in batch]).shape == (8, 3, 8, 8)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r'dataset.ratio=1.0 must lie in \[0, 1\)'):
        build(ratio=1.0)
    with pytest.raises(ValueError, match='dataset.extra has the classes'):
        build(extra=dict(EXTRA, metainfo=dict(classes=list('ab'))))


def test_processes_draw_extra_images_of_their_own(monkeypatch):
    mixed = build(ratio=0.9)
    drawn = []
    for rank in range(2):
        monkeypatch.setattr('mmadvmoe.datasets.memory.get_rank', lambda rank=rank: rank)
        np.random.seed(0)  # as MMEngine seeds all of them
        drawn.append([key(mixed[i]) for i in range(64)])
    assert sum(one == other for one, other in zip(*drawn)) < 8
