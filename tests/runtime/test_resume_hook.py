"""A run that was killed and resumed ends with the very bits of one that was not."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.runner import Runner
from resume_runs import assert_same, assert_same_run, loader, small_cfg, train, train_here
from tiny_runs import run_cfg as alternating_cfg

from mmadvmoe.runtime.safe_load import load_from_local


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
    train(cfg, tmp_path, resume=True, load_from=str(tmp_path / 'epoch_1.pth'))
    resumed = load_from_local(tmp_path / 'epoch_3.pth')
    for key in ('state_dict', 'optimizer', 'exact_resume'):
        assert_same(expected[key], resumed[key])


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
    train_here(cfg, work_dir, kill, overrides)


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
