"""Several processes on the CPU."""

import os

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook, SyncBuffersHook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from processes import run_forks
from torch import distributed as torch_dist
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mmadvmoe.runtime.launch import finish_distributed, prepare_distributed

IMAGES, EPOCHS = 16, 2


class TwoGroups(BaseModel):
    """Two groups of parameters, and norm statistics that do not touch the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Linear(3, 4)
        self.router = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(3, affine=False)

    def forward(self, inputs, target, mode):
        self.norm(inputs)
        return dict(loss=(self.router(self.experts(inputs).relu()) - target).square().mean())


class TakeTurns(Hook):
    """Freezes one group in even and the other in odd iterations, as alternating training does."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = getattr(runner.model, 'module', runner.model)
        model.experts.requires_grad_(runner.iter % 2 == 0)
        model.router.requires_grad_(runner.iter % 2 == 1)


def samples():
    inputs = torch.randn(IMAGES, 3, generator=torch.Generator().manual_seed(1))
    return [dict(inputs=x, target=x[:2] ** 2) for x in inputs]


def train(work_dir, launcher, batch_size):
    cfg = Config(dict(env_cfg=dict(dist_cfg=dict(timeout=120)), default_scope='mmpretrain'))
    prepare_distributed(cfg, launcher)
    runner = Runner(
        model=TwoGroups(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=samples(),
            batch_size=batch_size,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        custom_hooks=[TakeTurns(), *cfg.get('custom_hooks', [])],
        default_hooks=dict(checkpoint=None),
        launcher=cfg.launcher,
        log_level='ERROR',
        default_scope='mmpretrain',
        cfg=cfg,
    )
    runner.train()
    return runner


def train_launched(folder):
    runner = train(folder, 'pytorch', batch_size=4)
    result = dict(
        state=runner.model.module.state_dict(),
        wrapper=type(runner.model).__name__,
        backend=torch_dist.get_backend(),
    )
    torch.save(result, folder / f'{runner.rank}.pt')
    finish_distributed()
    assert not torch_dist.is_initialized()


def launch_two(folder):
    """What ``torchrun --standalone --nproc-per-node 2`` does, with forks."""
    config = LaunchConfig(
        1, 1, 2, rdzv_backend='c10d', rdzv_endpoint='localhost:0', max_restarts=0, start_method='fork'
    )
    elastic_launch(config, train_launched)(folder)


def test_two_processes_train_as_one(tmp_path):
    run_forks(launch_two, tmp_path, variables=[{}])
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert first['wrapper'] == 'MMDistributedDataParallel'
    assert first['backend'] == 'gloo'

    single = train(tmp_path / 'single', 'none', batch_size=8).model
    untrained = TwoGroups().state_dict()
    for name, value in single.state_dict().items():
        assert torch.equal(first['state'][name], second['state'][name]), name
        assert not torch.equal(untrained[name], value), name
        if 'norm' not in name:
            torch.testing.assert_close(first['state'][name], value)


def join_slurm_job(folder):
    prepare_distributed(Config(), 'slurm')
    rank = torch_dist.get_rank()
    total = torch.tensor(rank + 1)
    torch_dist.all_reduce(total)
    (folder / f'{rank}.txt').write_text(f'{total} {os.environ["LOCAL_RANK"]} {os.environ["MASTER_PORT"]}')
    finish_distributed()
    assert not torch_dist.is_initialized()


def test_slurm_variables_make_a_gloo_group(tmp_path):
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && echo 127.0.0.1\n')
    scontrol.chmod(0o755)
    variables = {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'SLURM_NTASKS': '2',
        'SLURM_LOCALID': '0',
        'SLURM_NODELIST': 'node[1-2]',
        'SLURM_JOB_ID': str(1_000_000 + os.getpid() % 10_000),
    }
    run_forks(join_slurm_job, tmp_path, variables=[dict(variables, SLURM_PROCID=rank) for rank in '01'])
    found = [(tmp_path / f'{rank}.txt').read_text().split() for rank in (0, 1)]
    # Sum of ranks + 1 over both, local rank, and a port made from the number of the job.
    port = str(20_000 + os.getpid() % 10_000)
    assert found == [['3', '0', port], ['3', '0', port]]


def test_no_launcher_changes_nothing_else():
    cfg = Config(dict(model_wrapper_cfg=dict(type='Other')))
    prepare_distributed(cfg, 'none')
    assert cfg.to_dict() == dict(model_wrapper_cfg=dict(type='Other'), launcher='none')
    assert not torch_dist.is_initialized()


@pytest.fixture
def second_of_two(monkeypatch):
    """The variables of torchrun in its second process, and a machine with two GPUs."""
    for name, value in dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, MASTER_ADDR='localhost').items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr('mmadvmoe.runtime.launch.get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)


def test_gpus_are_left_to_mmengine(second_of_two):
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    prepare_distributed(cfg, 'pytorch')
    assert not torch_dist.is_initialized()
    assert 'model_wrapper_cfg' not in cfg
    assert cfg.find_unused_parameters is True
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'SyncBuffersHook']


def test_settings_of_the_config_are_kept(second_of_two):
    given = dict(
        model_wrapper_cfg=dict(broadcast_buffers=True, find_unused_parameters=False),
        custom_hooks=[dict(type='SyncBuffersHook')],
    )
    cfg = Config(given)
    prepare_distributed(cfg, 'pytorch')
    wrapper = dict(given['model_wrapper_cfg'], type='MMDistributedDataParallel')
    assert cfg.model_wrapper_cfg == wrapper
    assert cfg.custom_hooks == given['custom_hooks']


def test_classes_are_known_as_well_as_names(second_of_two):
    for hook in (SyncBuffersHook, 'mmengine.SyncBuffersHook'):
        given = [dict(type=hook)]
        wrapper = dict(type=MMDistributedDataParallel)
        cfg = Config(dict(custom_hooks=given, model_wrapper_cfg=wrapper))
        prepare_distributed(cfg, 'pytorch')
        assert cfg.custom_hooks == given
        assert cfg.model_wrapper_cfg == dict(wrapper, find_unused_parameters=True, broadcast_buffers=False)


def test_more_processes_than_gpus_are_refused(second_of_two, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(ValueError, match='process 1 .* no GPU: 1 visible'):
        prepare_distributed(Config(), 'pytorch')


@pytest.mark.parametrize(
    ('launcher', 'variable', 'starter'),
    [('pytorch', 'RANK', 'torchrun'), ('slurm', 'SLURM_PROCID', 'srun')],
)
def test_missing_variables_are_named(monkeypatch, launcher, variable, starter):
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=f'{variable}.*{starter}'):
        prepare_distributed(Config(), launcher)


def test_unknown_launcher_is_refused():
    with pytest.raises(ValueError, match="'torch'.*none, pytorch, slurm, mpi"):
        prepare_distributed(Config(), 'torch')
