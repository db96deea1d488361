"""A training tried out: every part of it runs, nothing is kept, and the estimate is of the whole."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from tiny_runs import model_cfg, run_cfg, turns_cfg

from mmadvmoe.training.dry_run import DryRun, dry_run

ROOT = Path(__file__).parents[2]
VALIDATION = dict(
    val_dataloader=dict(
        dataset=dict(type='RandomImages', size=80),
        batch_size=16,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
    ),
    val_cfg=dict(
        type='RobustValLoop', attacks=dict(pgd=dict(type='PGD', steps=1), route=dict(type='RoutePGD', steps=1))
    ),
    val_evaluator=dict(type='Accuracy'),
)


def test_an_alternating_training(tmp_path):
    cfg = run_cfg(tmp_path, dict(k_experts=2, warmup_iters=8), epochs=8, **VALIDATION)
    cfg.optim_wrapper = turns_cfg(accumulative_counts=2)
    cfg.train_cfg.val_interval = 3
    before = cfg.to_dict()
    found = dry_run(cfg)
    assert cfg.to_dict() == before
    assert not list(tmp_path.iterdir()), 'it has a folder of its own'
    assert found.iterations == dict(experts=24, router=8) and set(found.seconds) == {'experts', 'router'}
    assert found.validations == 3
    assert found.total_seconds == pytest.approx(
        24 * found.seconds['experts'] + 8 * found.seconds['router'] + 3 * found.val_seconds
    )
    assert min(*found.seconds.values(), found.val_seconds, found.memory, found.checkpoint) > 0


def test_validations_of_a_loop_by_iterations(tmp_path):
    cfg = run_cfg(tmp_path, **VALIDATION)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=12, val_interval=5)
    assert dry_run(cfg).validations == 3


def test_both_turns_on_one_batch(tmp_path):
    found = dry_run(run_cfg(tmp_path, dict(reuse_batch=True)))
    assert found.iterations == dict(experts=8) and found.validations == 0


@pytest.mark.parametrize('shared', [False, True])
def test_a_router_that_goes_first_and_is_frozen_then(tmp_path, shared):
    schedule = dict(reuse_batch=True) if shared else dict(k_router=0)
    found = dry_run(run_cfg(tmp_path, dict(router_first_iters=3, **schedule)))
    assert found.iterations == dict(router=3, experts=5) and set(found.seconds) == {'experts', 'router'}


def test_the_whole_schedule_is_checked(tmp_path):
    with pytest.raises(ValueError, match='warmup_iters=8 .* in the 8 iterations'):
        dry_run(run_cfg(tmp_path, dict(warmup_iters=8)))


def test_a_system_that_does_not_tell_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setitem(sys.modules, 'resource', None)
    module = runpy.run_path(str(ROOT / 'mmadvmoe/training/dry_run.py'), run_name='mmadvmoe.training.dry_run_on_windows')
    assert 'peak memory unknown' in str(module['DryRun'](memory=module['_peak_memory']()))


def test_joint_training(tmp_path):
    optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
    found = dry_run(run_cfg(tmp_path, optim_wrapper=optim_wrapper, custom_hooks=[]))
    assert found.iterations == dict(joint=8)


def test_what_the_training_would_raise_is_raised(tmp_path):
    model = model_cfg(data_preprocessor=dict(attack=dict(type='PGD', eps=8)))
    with pytest.raises(ValueError, match='eps=8 is above 1'):
        dry_run(run_cfg(tmp_path, model=model))


def test_what_is_printed():
    seconds, iterations = dict(experts=0.5, router=0.25), dict(experts=7200, router=7200)
    found = DryRun(seconds, iterations, 30.0, 20, 2**30, 2**21)
    assert found.total_seconds == 3600 + 1800 + 600
    assert 'about 1:40:00 in all' in str(found) and '7,200 iterations (router) of 0.250 s' in str(found)
    assert 'peak memory 1,024 MiB, a checkpoint 2.0 MiB' in str(found)


def test_the_tool(monkeypatch, capsys, tmp_path):
    torch.set_num_threads(1)
    path = tmp_path / 'tiny.py'
    Config(dict(run_cfg(tmp_path / 'work').to_dict())).dump(path)
    arguments = [str(ROOT / 'tools/train.py'), str(path), '--dry-run']
    monkeypatch.setattr('sys.argv', arguments)
    runpy.run_path(arguments[0], run_name='__main__')
    assert '4 iterations (router)' in capsys.readouterr().out
    monkeypatch.setattr('sys.argv', [*arguments, '--launcher', 'pytorch'])
    with pytest.raises(SystemExit):
        runpy.run_path(arguments[0], run_name='__main__')
    assert '--dry-run is for one process' in capsys.readouterr().err
