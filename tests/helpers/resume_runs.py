"""The smallest runs in which every random generator has a say, and ways to kill and compare them."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  once here, not in every forked run
import matplotlib.figure  # noqa: F401
import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, HOOKS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset

import mmadvmoe  # noqa: F401
from mmadvmoe.runtime.safe_load import load_from_local

EPOCHS, BATCHES = 3, 4
# What tells two equal runs apart: the clock, and where and from which commit they are saved.
CLOCK = ('train/time', 'train/data_time', 'val/time', 'val/data_time', 'time', 'eta')
# MMEngine sets these when a run starts, to where the resumed one starts.
START = ('runtime_info/epoch', 'runtime_info/iter')
PLACE = ('mmengine_version', 'cfg', 'experiment_name', 'last_ckpt', 'best_ckpt')


@DATASETS.register_module()
class NoisyPoints(Dataset):
    """Points to which every generator that augmentations use adds its noise."""

    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        return dict(inputs=index / 6 + noise, labels=index % 2)


@MODELS.register_module()
class DropoutNet(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))

    def forward(self, inputs, labels, mode='tensor'):
        logits = self.net(torch.stack(inputs))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return logits


@METRICS.register_module()
class WeightMetric(BaseMetric):
    """A score that moves with the weights, best at an epoch in the middle."""

    def process(self, data_batch, data_samples):
        self.results.append(data_samples[0].sum().item())

    def compute_metrics(self, results):
        return {'worst/accuracy/top1': float(np.mean(results))}


@HOOKS.register_module()
class KillHook(Hook):
    """Send a signal to the process at a place of a run."""

    priority = 'LOWEST'

    def __init__(self, place, count, number=signal.SIGKILL):
        self.place, self.count, self.number = place, count, number

    def _reached(self, place, count):
        if (place, count) == (self.place, self.count):
            os.kill(os.getpid(), self.number)

    def after_train_iter(self, runner, **kwargs):
        self._reached('iter', runner.iter)

    def after_train_epoch(self, runner):
        self._reached('epoch', runner.epoch + 1)

    def after_val_iter(self, runner, **kwargs):
        self._reached('val', runner.epoch)


def loader(workers=0, sampler='DefaultSampler', **overrides):
    return (
        dict(
            dataset=dict(type='NoisyPoints'),
            batch_size=3,
            num_workers=workers,
            collate_fn=dict(type='default_collate_keeping_lists'),
            sampler=dict(type=sampler, shuffle=True),
            worker_init_fn=dict(type='seed_worker'),
        )
        | overrides
    )


def default_collate_keeping_lists(samples):
    return dict(inputs=[s['inputs'] for s in samples], labels=torch.tensor([s['labels'] for s in samples]))


mmadvmoe.runtime.seeding.FUNCTIONS.register_module(module=default_collate_keeping_lists)


def small_cfg(**overrides):
    return (
        dict(
            default_scope='mmpretrain',
            model=dict(type='DropoutNet'),
            train_dataloader=loader(),
            train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
            val_dataloader=loader() | dict(batch_size=12, sampler=dict(type='DefaultSampler', shuffle=False)),
            val_cfg=dict(),
            val_evaluator=dict(type='WeightMetric'),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
            param_scheduler=dict(type='CosineAnnealingLR', T_max=9, by_epoch=False),
            default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook', save_best='worst/accuracy/top1', interval=1)),
            custom_hooks=[dict(type='ExactResumeHook')],
            randomness=dict(seed=3),
            log_level='ERROR',
        )
        | overrides
    )


def train(cfg, work_dir, kill=None, **overrides):
    """Train in a process of its own, from the start or from where it was killed."""
    process = multiprocessing.get_context('fork').Process(target=train_here, args=(cfg, str(work_dir), kill, overrides))
    process.start()
    process.join(600)
    assert process.exitcode == (-signal.SIGKILL if kill else 0)


def train_here(cfg, work_dir, kill, overrides):
    torch.set_num_threads(1)  # other threads did not come along through the fork
    np.random.seed()  # MMEngine draws seeds from it, and a fork would draw its sibling's
    cfg = Config(dict(cfg, work_dir=work_dir, **overrides))
    if kill:
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='KillHook', place=kill[0], count=kill[1])]
    cfg.experiment_name = Path(work_dir).name + os.urandom(4).hex()
    Runner.from_cfg(cfg).train()


def kill_at_file_step(number):
    """Be killed at the n-th of the steps that writing and deleting files consist of; to be called in a fork."""
    steps = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == number:
                if function is os.fsync:  # half of the file is on disk
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ('fsync', 'replace', 'remove', 'rename'):
        setattr(os, name, counted(getattr(os, name)))


def assert_same(left, right, path=''):
    """Equality of two checkpoints in every bit, but for wall-clock times and file names."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            if key not in CLOCK + PLACE and not f'{path}/{key}'.endswith(START):
                assert_same(left[key], right[key], f'{path}/{key}')
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right)):
            assert_same(a, b, f'{path}/{index}')
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, HistoryBuffer):
        for a, b in zip(left.data, right.data):
            np.testing.assert_array_equal(a, b, path)
    else:
        assert left == right, path


def assert_same_run(left, right):
    files = sorted(path.name for path in Path(left).glob('*.pth'))
    assert files == sorted(path.name for path in Path(right).glob('*.pth'))
    for name in files:
        assert_same(load_from_local(Path(left, name)), load_from_local(Path(right, name)), name)
