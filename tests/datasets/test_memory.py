"""Batches out of memory, and their augmentation: equal in distribution to MMPretrain's pipeline."""

from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import TRANSFORMS
from tiny_models import make_classifier, make_data
from tiny_runs import build_runner, model_cfg, run_cfg

from mmadvmoe.datasets import BatchedCropFlip, Digits, InMemory, keep_batch

init_default_scope('mmpretrain')
PACK = [dict(type='PackInputs')]


def test_the_images_and_labels_are_those_of_the_data_set():
    source = Digits(split='val', pipeline=PACK)
    dataset = InMemory(dict(type='Digits', split='val', pipeline=PACK))
    assert len(dataset) == len(source) == 180 and dataset.metainfo == source.metainfo
    batch = dataset.__getitems__([5, 0, 7])
    for row, index in enumerate((5, 0, 7)):
        assert torch.equal(batch['inputs'][row], source[index]['inputs'])
        assert batch['data_samples'][row].gt_label.equal(source[index]['data_samples'].gt_label)
        assert torch.equal(dataset[index]['inputs'], source[index]['inputs'])
        assert dataset.get_cat_ids(index) == source.get_cat_ids(index)
    # What an augmentation writes into a sample stays in its batch.
    batch['data_samples'][0].gt_label.fill_(99)
    assert dataset[5]['data_samples'].gt_label != 99


def test_a_loader_gives_whole_batches():
    cfg = dict(
        batch_size=64,
        num_workers=0,
        drop_last=True,
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='keep_batch'),
        dataset=dict(type='InMemory', dataset=dict(type='Digits', split='val', pipeline=PACK)),
    )
    plain = dict(cfg, dataset=cfg['dataset']['dataset'], collate_fn=dict(type='pseudo_collate'))
    batches, expected = (list(Runner.build_dataloader(each, seed=0)) for each in (cfg, plain))
    assert len(batches) == 2 and batches[0]['inputs'].dtype == torch.uint8
    for batch, other in zip(batches, expected):
        assert torch.equal(batch['inputs'], torch.stack(other['inputs']))
    assert keep_batch(batches[0]) is batches[0]
    with pytest.raises(TypeError, match='is for a data set of type InMemory, which this is not: remove it'):
        keep_batch([batches[0]])


def test_images_that_do_not_fit_are_named():
    resized = [dict(type='RandomResize', scale=(9, 9), ratio_range=(0.5, 3.0)), *PACK]
    with pytest.raises(ValueError, match='image 1 of Digits is .*uint8 of shape .*add a Resize'):
        InMemory(Digits(split='val', pipeline=resized))


def outcomes_of_pipeline(image, count):
    """Images out of MMPretrain's transforms, by how often they came up."""
    crop = TRANSFORMS.build(dict(type='RandomCrop', crop_size=image.shape[1:], padding=1))
    flip = TRANSFORMS.build(dict(type='RandomFlip', prob=0.5, direction='horizontal'))
    found = Counter()
    for _ in range(count):
        result = flip(crop(dict(img=image.permute(1, 2, 0).numpy().copy())))['img']
        found[np.ascontiguousarray(result.transpose(2, 0, 1)).tobytes()] += 1
    return found


def test_crops_and_mirror_images_are_distributed_as_those_of_mmpretrain():
    """3 x 3 positions and two directions: the same 18 images, each about as often."""
    image = torch.arange(1, 2 * 3 * 4 + 1, dtype=torch.uint8).view(2, 3, 4)
    count = 3600
    batch = BatchedCropFlip(padding=1)(image.expand(count, -1, -1, -1))
    assert batch.dtype == torch.uint8 and batch.is_contiguous()
    ours = Counter(each.numpy().tobytes() for each in batch)
    theirs = outcomes_of_pipeline(image, count)
    assert set(ours) == set(theirs) and len(ours) == 18
    for found in (ours, theirs):
        expected = count / 18
        assert sum((each - expected) ** 2 / expected for each in found.values()) < 45, 'chi-squared, 17 degrees'
    # One image's draws say nothing of another's.
    assert len({tuple(each) for each in batch.view(2, -1).tolist()}) == 2


def test_no_margin_and_no_mirror_image_change_nothing():
    images = torch.rand(4, 3, 5, 7)
    assert torch.equal(BatchedCropFlip(padding=0, flip=0.0)(images), images)
    assert torch.equal(BatchedCropFlip(padding=0, flip=1.0)(images), images.flip(3))
    rows = BatchedCropFlip(padding=(0, 2), flip=0.0)(images.expand(4, 3, 5, 7))
    assert rows.shape == images.shape


@pytest.mark.parametrize(
    ('settings', 'message'),
    [(dict(padding=-1), 'padding=-1'), (dict(padding=(1, 2, 3)), r'padding=\(1, 2, 3\)'), (dict(flip=2), 'flip=2')],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        BatchedCropFlip(**settings)


def test_processes_augment_as_one(monkeypatch):
    images = torch.rand(8, 3, 4, 4)
    torch.manual_seed(3)
    whole = BatchedCropFlip(2)(images)
    for rank in (0, 1):
        monkeypatch.setattr('mmadvmoe.datasets.memory.get_world_size', lambda: 2)
        monkeypatch.setattr('mmadvmoe.datasets.memory.get_rank', lambda rank=rank: rank)
        torch.manual_seed(3)
        assert torch.equal(BatchedCropFlip(2)(images[rank::2]), whole[rank::2])


@pytest.mark.parametrize('listed', [False, True])
def test_the_preprocessor_augments_in_training_alone(listed):
    mirror = dict(type='BatchedCropFlip', padding=0, flip=1.0)
    model = make_classifier(augment=mirror, attack=dict(type='FGSM', eps=0.0))
    data = make_data()
    images = torch.stack(data['inputs'])
    data['inputs'] = list(images) if listed else images
    for training, expected in ((False, images), (True, images.flip(3))):
        batch = model.data_preprocessor(dict(data), training=training)
        torch.testing.assert_close(batch['inputs'], expected / 255)


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(tmp_path):
    preprocessor = dict(attack=dict(type='FGSM', eps=8 / 255), augment=dict(type='BatchedCropFlip', padding=2))

    def run(folder, epochs, **overrides):
        cfg = run_cfg(
            tmp_path / folder,
            hooks=[dict(type='ExactResumeHook')],
            epochs=epochs,
            model=model_cfg(data_preprocessor=preprocessor),
            default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook', interval=1, save_best=None)),
            **overrides,
        )
        cfg.train_dataloader.update(
            dataset=dict(type='InMemory', dataset=dict(type='RandomImages')), collate_fn=dict(type='keep_batch')
        )
        runner = build_runner(cfg)
        runner.train()
        return runner.model.state_dict()

    whole = run('whole', 2)
    run('half', 1)
    resumed = run('half', 2, resume=True)
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
