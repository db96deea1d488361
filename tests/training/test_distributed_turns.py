"""A reducer for each group: the same weights, and less to exchange."""

import pytest
import torch
from mmengine.config import Config
from processes import run_forks, variables_of_ranks
from tiny_runs import build_runner, run_cfg, turns_cfg

from mmadvmoe.moe import split_parameters
from mmadvmoe.runtime.launch import finish_distributed, prepare_distributed

WRAPPERS = dict(
    groups=dict(type='TurnsDistributedDataParallel'),
    search=dict(type='MMDistributedDataParallel', find_unused_parameters=True),
)
RUNS = {
    f'{schedule}_{wrapper}': (settings, count, wrapper)
    for wrapper in WRAPPERS
    for schedule, settings, count in (
        ('new', {}, 1),
        ('reuse', dict(reuse_batch=True), 1),
        ('accumulate', {}, 2),
    )
}


def count_bytes(exchanged, bucket):
    """A hook for a reducer: average as always, and note how much was sent."""
    exchanged.append(bucket.buffer().numel() * bucket.buffer().element_size())
    buffer = bucket.buffer().div_(torch.distributed.get_world_size())
    work = torch.distributed.all_reduce(buffer, async_op=True).get_future()
    return work.then(lambda done: done.value()[0])


def train(folder):
    environment = Config(dict(env_cfg=dict(dist_cfg=dict(timeout=120))))
    prepare_distributed(environment, 'pytorch')
    results = {}
    for name, (schedule, count, wrapper) in RUNS.items():
        cfg = run_cfg(f'{folder}/{name}', schedule, optim_wrapper=turns_cfg(accumulative_counts=count), epochs=2)
        cfg.train_dataloader.batch_size = 2
        cfg.merge_from_dict(dict(launcher='pytorch', env_cfg=environment.env_cfg))
        cfg.model_wrapper_cfg = dict(WRAPPERS[wrapper], device_ids=None, broadcast_buffers=False)
        runner = build_runner(cfg)
        exchanged = {turn: [] for turn in ('experts', 'router')}
        if wrapper == 'groups':
            for turn, sent in exchanged.items():
                runner.model.of_turn(turn).register_comm_hook(sent, count_bytes)
        else:
            runner.model.register_comm_hook(exchanged['experts'], count_bytes)
        runner.train()
        groups = split_parameters(runner.model.module)
        sizes = {turn: sum(4 * p.numel() for _, p in groups[turn]) for turn in groups}
        weights = runner.model.module.state_dict()
        results[name] = dict(weights=weights, sent={k: sum(v) for k, v in exchanged.items()}, sizes=sizes)
    torch.save(results, folder / f'{torch.distributed.get_rank()}.pth')
    finish_distributed()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('turns')
    run_forks(train, folder, variables=variables_of_ranks())
    return [torch.load(folder / f'{rank}.pth', weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize('schedule', ['new', 'reuse', 'accumulate'])
def test_weights_are_those_of_one_reducer_that_searches(ranks, schedule):
    for name, value in ranks[0][f'{schedule}_search']['weights'].items():
        torch.testing.assert_close(ranks[0][f'{schedule}_groups']['weights'][name], value, rtol=1e-5, atol=1e-7)
        if 'running' not in name and 'tracked' not in name:
            assert torch.equal(
                ranks[0][f'{schedule}_groups']['weights'][name], ranks[1][f'{schedule}_groups']['weights'][name]
            )


@pytest.mark.parametrize(('schedule', 'turns'), [('new', 4), ('reuse', 8), ('accumulate', 2)])
def test_a_turn_exchanges_its_own_group_alone(ranks, schedule, turns):
    """8 batches in all; where gradients are accumulated, those of every second one are exchanged."""
    groups, search = (ranks[0][f'{schedule}_{wrapper}'] for wrapper in ('groups', 'search'))
    assert groups['sent'] == {turn: turns * size for turn, size in groups['sizes'].items()}
    assert sum(search['sent'].values()) == 2 * turns * sum(search['sizes'].values())
