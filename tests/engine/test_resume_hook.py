"""A run that was killed and resumed ends with the very bits of one that was not."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  once here, not in every forked run
import matplotlib.figure  # noqa: F401
import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, HOOKS, METRICS, MODELS
from tiny_runs import run_cfg as alternating_cfg
from torch import nn
from torch.utils.data import Dataset

import mmadvmoe  # noqa: F401
from mmadvmoe.engine.safe_load import load_from_local
from mmadvmoe.engine.seeding import get_rng_state, preserve_rng_state, set_rng_state

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
    """Kill the process with SIGKILL at a place of a run."""

    priority = 'LOWEST'

    def __init__(self, place, count):
        self.place, self.count = place, count

    def _reached(self, place, count):
        if (place, count) == (self.place, self.count):
            os.kill(os.getpid(), signal.SIGKILL)

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


mmadvmoe.engine.seeding.FUNCTIONS.register_module(module=default_collate_keeping_lists)


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


def iter_cfg(workers=0, sampler='InfiniteSampler'):
    return small_cfg(
        train_dataloader=loader(workers, sampler),
        train_cfg=dict(by_epoch=False, max_iters=12, val_interval=5),
        default_hooks=dict(
            checkpoint=dict(
                type='SafeCheckpointHook',
                by_epoch=False,
                interval=3,
                save_best='worst/accuracy/top1',
            )
        ),
    )


def train(cfg, work_dir, kill=None, **overrides):
    """Train in a process of its own, from the start or from where it was killed."""
    process = multiprocessing.get_context('fork').Process(target=_train, args=(cfg, str(work_dir), kill, overrides))
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if kill else 0)


def _train(cfg, work_dir, kill, overrides):
    torch.set_num_threads(1)  # other threads did not come along through the fork
    np.random.seed()  # MMEngine draws seeds from it, and a fork would draw its sibling's
    cfg = Config(dict(cfg, work_dir=work_dir, **overrides))
    if kill:
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='KillHook', place=kill[0], count=kill[1])]
    cfg.experiment_name = Path(work_dir).name + os.urandom(4).hex()
    Runner.from_cfg(cfg).train()


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


CONFIGS = {
    'epochs': small_cfg(),
    'workers': small_cfg(train_dataloader=loader(workers=2)),
    'iterations': iter_cfg(),
    'iterations, workers': iter_cfg(2, 'DefaultSampler'),
    'accumulation': small_cfg(optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.1), accumulative_counts=3)),
    'no validation': small_cfg(
        val_dataloader=None,
        val_cfg=None,
        val_evaluator=None,
        default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook', interval=1)),
    ),
}


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The folder of a run of a config that nobody disturbed; each is trained once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp('uninterrupted')
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
                train(CONFIGS[name], folders[name])
        return folders[name]

    return folder_of


@pytest.mark.parametrize(
    'name, kills',
    [
        ('epochs', [('iter', 1)]),
        ('epochs', [('iter', 5), ('iter', 10)]),
        ('epochs', [('epoch', 1), ('val', 2), ('val', 2), ('val', 3)]),
        ('workers', [('iter', 6)]),
        ('iterations', [('iter', 7), ('iter', 10)]),
        ('iterations, workers', [('iter', 8)]),
        ('accumulation', [('iter', 6)]),
        ('no validation', [('epoch', 2)]),
    ],
    ids=str,
)
def test_killed_and_resumed_run_ends_alike(name, kills, uninterrupted, tmp_path, monkeypatch):
    expected = uninterrupted(name)
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    for kill in kills:
        train(CONFIGS[name], tmp_path, kill, resume=True)
    train(CONFIGS[name], tmp_path, resume=True)
    assert_same_run(expected, tmp_path)


def test_seedless_run_resumes_with_the_seed_it_drew(tmp_path):
    """The data loader is built before MMEngine reads the seed of the checkpoint."""
    cfg = small_cfg(randomness=dict(seed=None))
    train(cfg, tmp_path)
    expected = load_from_local(tmp_path / 'epoch_3.pth')
    (tmp_path / 'epoch_3.pth').unlink()
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    for best in tmp_path.glob('best*'):
        best.unlink()
    train(cfg, tmp_path, resume=True)
    assert_same(expected, load_from_local(tmp_path / 'epoch_3.pth'))


def test_both_optimizers_of_training_in_turns_resume(tmp_path):
    hooks = [dict(type='ExactResumeHook')]
    checkpoint = dict(checkpoint=dict(type='SafeCheckpointHook', interval=1))
    cfg = alternating_cfg('unused', epochs=2, default_hooks=checkpoint, hooks=hooks)
    cfg = dict(cfg.to_dict(), log_level='ERROR')
    cfg['model']['data_preprocessor']['attack'] = dict(type='PGD', eps=8 / 255, steps=1)
    del cfg['work_dir']
    train(cfg, tmp_path / 'whole')
    train(cfg, tmp_path / 'resumed', ('iter', 5))
    train(cfg, tmp_path / 'resumed', resume=True)
    assert_same_run(tmp_path / 'whole', tmp_path / 'resumed')
    checkpoint = load_from_local(tmp_path / 'whole' / 'epoch_2.pth')
    assert set(checkpoint['optimizer']) == {'experts', 'router'}


def test_load_from_starts_with_its_own_random_numbers(tmp_path):
    train(small_cfg(), tmp_path / 'first')
    checkpoint = str(tmp_path / 'first' / 'epoch_3.pth')
    fresh = small_cfg(load_from=checkpoint, train_cfg=dict(by_epoch=True, max_epochs=1))
    train(fresh, tmp_path / 'second')
    first = load_from_local(tmp_path / 'first' / 'epoch_1.pth')
    second = load_from_local(tmp_path / 'second' / 'epoch_1.pth')
    assert second['meta']['epoch'] == 1
    assert torch.equal(
        first['exact_resume']['ranks'][0]['rng']['torch'],
        second['exact_resume']['ranks'][0]['rng']['torch'],
    )


def test_finished_run_is_not_validated_again(tmp_path):
    train(small_cfg(), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('*.pth')}
    train(small_cfg(), tmp_path, resume=True)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('*.pth')}


@pytest.mark.parametrize(
    'overrides, message',
    [
        (
            dict(train_dataloader=loader(workers=1, persistent_workers=True)),
            'train_dataloader.persistent_workers=True',
        ),
        (
            dict(default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook', by_epoch=False))),
            'default_hooks.checkpoint.by_epoch=False',
        ),
    ],
)
def test_config_that_cannot_resume_exactly_is_refused(overrides, message, tmp_path):
    cfg = Config(small_cfg(work_dir=str(tmp_path), experiment_name=tmp_path.name, **overrides))
    runner = Runner.from_cfg(cfg)
    before = [p.clone() for p in runner.model.parameters()]
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert all(map(torch.equal, before, runner.model.parameters()))


def test_iterations_demand_the_seed_of_the_run(tmp_path):
    train(iter_cfg() | dict(train_cfg=dict(by_epoch=False, max_iters=3)), tmp_path)
    cfg = iter_cfg() | dict(randomness=dict(seed=None), resume=True)
    runner = Runner.from_cfg(Config(dict(cfg, work_dir=str(tmp_path), experiment_name=tmp_path.name)))
    with pytest.raises(ValueError, match=r'set randomness=dict\(seed=3\)'):
        runner.train()


def _rank(rank, port_file, cfg, work_dir, kill, overrides):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group('gloo', init_method=f'file://{port_file}', rank=rank, world_size=2)
    _train(cfg, work_dir, kill, overrides)


def train_on_two_ranks(cfg, work_dir, kill=None, **overrides):
    port_file = f'{work_dir}-{os.urandom(4).hex()}'
    context = multiprocessing.get_context('fork')
    ranks = [
        context.Process(target=_rank, args=(rank, port_file, cfg, str(work_dir), kill, overrides)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert (process.exitcode != 0) == bool(kill)


def test_every_process_gets_its_own_random_state_back(tmp_path):
    cfg = small_cfg(
        train_dataloader=loader(workers=1),
        model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False),
        randomness=dict(seed=3, diff_rank_seed=True),
        launcher='pytorch',
    )
    train_on_two_ranks(cfg, tmp_path / 'whole')
    train_on_two_ranks(cfg, tmp_path / 'resumed', ('iter', 3))
    train_on_two_ranks(cfg, tmp_path / 'resumed', resume=True)
    assert_same_run(tmp_path / 'whole', tmp_path / 'resumed')
    ranks = load_from_local(tmp_path / 'whole' / 'epoch_3.pth')['exact_resume']['ranks']
    assert not torch.equal(ranks[0]['rng']['torch'], ranks[1]['rng']['torch'])


def draw():
    return [random.gauss(0, 1), np.random.randn(), torch.randn(()).item()]


def test_rng_state_survives_a_checkpoint_file(tmp_path):
    with preserve_rng_state():
        draw()
        torch.save(get_rng_state(), tmp_path / 'state.pt')
        expected = draw()
        set_rng_state(torch.load(tmp_path / 'state.pt', weights_only=True))
        assert draw() == expected


def test_preserve_rng_state_holds_when_the_block_raises():
    with preserve_rng_state():
        expected = draw()
    with pytest.raises(KeyError), preserve_rng_state():
        torch.manual_seed(0)
        draw()
        raise KeyError
    assert draw() == expected


def test_workers_augment_anew_in_every_epoch_and_on_every_rank(monkeypatch):
    cfg = loader(workers=2, sampler='DefaultSampler')
    cfg['sampler']['shuffle'] = False

    def epochs():
        torch.manual_seed(0)
        built = Runner.build_dataloader(cfg, seed=0)
        return [torch.cat([torch.stack(batch['inputs']) for batch in built]) for _ in range(2)]

    first, second = epochs()
    noise = first - torch.arange(12)[:, None] / 6
    assert (first != second).all()
    assert noise.unique().numel() == noise.numel()
    assert torch.equal(epochs()[0], first)
    monkeypatch.setenv('RANK', '1')
    assert (epochs()[0] != first).all()
