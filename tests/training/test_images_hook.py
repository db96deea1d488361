"""A picture of adversarial images every few epochs, and training that does not notice."""

import random

import cv2
import numpy as np
import pytest
import torch
from mmpretrain.registry import DATASETS
from resume_runs import assert_same_run, train
from tiny_runs import RandomImages, build_runner, run_cfg

from mmadvmoe.runtime.seeding import get_rng_state

# Its random start makes the weights depend on every random number drawn before.
PGD = dict(type='PGD', eps=0.1, alpha=0.05, steps=2)


@DATASETS.register_module()
class DrawingImages(RandomImages):
    """Images whose pipeline draws from every random generator, as augmentations do."""

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(1)
        return super().__getitem__(index)


def hook(**overrides):
    return dict(type='AdversarialImagesHook', attack=PGD, interval=1, num_images=4) | overrides


def cfg_with(work_dir, *hooks, epochs=2, **overrides):
    loader = dict(dataset=dict(type='DrawingImages'), batch_size=16, num_workers=0)
    cfg = run_cfg(
        work_dir,
        hooks=hooks,
        epochs=epochs,
        val_dataloader=loader,
        val_cfg=dict(type='RobustValLoop', attacks=dict(pgd=PGD)),
        val_evaluator=dict(type='Accuracy'),
        **overrides,
    )
    cfg.model.data_preprocessor.attack = PGD
    return cfg


def test_training_is_the_same_bit_for_bit(tmp_path):
    ends = []
    for name, hooks in (('without', ()), ('with', (hook(),))):
        runner = build_runner(cfg_with(tmp_path / name, *hooks))
        runner.train()
        ends.append((runner.model.state_dict(), get_rng_state()))
    (plain, plain_rng), (watched, watched_rng) = ends
    assert list(plain) == list(watched)
    assert all(torch.equal(plain[key], watched[key]) for key in plain)
    assert torch.equal(plain_rng.pop('torch'), watched_rng.pop('torch'))
    assert plain_rng == watched_rng
    assert not (tmp_path / 'without' / 'adversarial_images').exists()


def test_killed_and_resumed_run_with_pictures_ends_like_one_without(tmp_path):
    checkpoint = dict(checkpoint=dict(type='SafeCheckpointHook', interval=1))
    runs = {}
    for name, hooks in (('plain', ()), ('watched', (hook(),))):
        cfg = cfg_with('unused', dict(type='ExactResumeHook'), *hooks, default_hooks=checkpoint).to_dict()
        del cfg['work_dir']
        runs[name] = dict(cfg, log_level='ERROR')
    train(runs['plain'], tmp_path / 'plain')
    train(runs['watched'], tmp_path / 'watched', ('iter', 6))
    train(runs['watched'], tmp_path / 'watched', resume=True)
    assert_same_run(tmp_path / 'plain', tmp_path / 'watched')


def test_pictures_come_when_due_and_go_to_the_backends(tmp_path):
    build_runner(cfg_with(tmp_path, hook(interval=2), epochs=5)).train()
    pictures = sorted((tmp_path / 'adversarial_images').glob('*'))
    assert [picture.name for picture in pictures] == ['epoch_2.png', 'epoch_4.png']
    (in_backend,) = tmp_path.glob('*/vis_data/vis_image/adversarial_images_4.png')
    saved, logged = cv2.imread(str(pictures[1])), cv2.imread(str(in_backend))
    assert saved.shape == logged.shape
    assert (saved == logged).all()
    assert (saved != 255).any()


def test_no_more_images_than_there_are(tmp_path):
    widths = []
    for count in (99, 1):
        build_runner(cfg_with(tmp_path / str(count), hook(num_images=count), epochs=1)).train()
        (picture,) = (tmp_path / str(count) / 'adversarial_images').iterdir()
        widths.append(cv2.imread(str(picture)).shape[1])
    # Sixteen images, in columns of equal width.
    assert 10 * widths[1] < widths[0] < 16 * widths[1]


@pytest.mark.parametrize('key, value', [('interval', 0), ('num_images', 0), ('num_images', 2.5)])
def test_arguments_out_of_range_are_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=f'{key}={value}; allowed'):
        build_runner(cfg_with(tmp_path, hook(**{key: value})))


def test_wrong_runs_are_refused_before_training(tmp_path):
    for overrides, message in [
        (dict(val_dataloader=None, val_cfg=None, val_evaluator=None), 'images of val_dataloader, and the config has'),
        (dict(train_cfg=dict(by_epoch=False, max_iters=2)), 'train_cfg.by_epoch=False'),
    ]:
        cfg = cfg_with(tmp_path, hook())
        for key, value in overrides.items():
            cfg[key] = value
        with pytest.raises(ValueError, match=message):
            build_runner(cfg).train()
    with pytest.raises(ValueError, match="argument='step' is unknown"):
        build_runner(cfg_with(tmp_path, hook(attack=dict(type='PGD', step=3)))).train()
