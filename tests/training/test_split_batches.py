"""Two processes at half the batch train the weights of one process."""

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from processes import run_forks, variables_of_ranks
from tiny_runs import build_runner, model_cfg, run_cfg

from mmadvmoe.moe import BaseRouter
from mmadvmoe.runtime.launch import finish_distributed, prepare_distributed

GROUP_NORM = dict(type='GN', num_groups=1)


@MODELS.register_module()
class SplitByBrightness(BaseRouter):
    """Sends dark images one way and bright images the other; ``bias`` sends all images one way."""

    def __init__(self, num_experts, bias=0.0):
        super().__init__(num_experts)
        self.fc = torch.nn.Linear(1, num_experts)
        torch.nn.init.zeros_(self.fc.bias)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[-20.0], [20.0]]))
            self.fc.bias.copy_(torch.tensor([10.0 + bias, -10.0]))

    def forward(self, x):
        return self.fc(x.mean(dim=(1, 2, 3))[:, None])


#: Which images go where: mixed on both processes; one expert idle on one process; one expert idle on both.
ROUTERS = dict(
    # Logits far from each other: the sign of a gradient that is next to nothing is a matter of rounding.
    mixed=dict(
        type='ResNetRouter',
        base_channels=2,
        num_blocks=1,
        num_stages=2,
        norm_cfg=GROUP_NORM,
        init_cfg=dict(type='Kaiming', layer=['Conv2d', 'Linear']),
    ),
    idle_on_one=dict(type='SplitByBrightness'),
    idle_on_both=dict(type='SplitByBrightness', bias=100.0),
)
#: The fourth case: each token of a transformer is sent for itself.
TRANSFORMER = dict(
    type='MoEBackbone',
    num_experts=2,
    include=['ffn'],
    routing='token',
    router=dict(type='TokenRouter', init_std=1.0),
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=8),
        img_size=8,
        patch_size=4,
    ),
)
SCHEDULES = dict(new_batch={}, reuse_batch=dict(reuse_batch=True))
#: Which images the turns get does not depend on how they are routed: one case has both schedules.
RUNS = [*((case, 'new_batch') for case in (*ROUTERS, 'tokens')), ('mixed', 'reuse_batch')]


def config(case, schedule, batch_size, work_dir):
    model = model_cfg(
        robust_loss=dict(type='TRADESLoss', beta=6.0),
        router_loss=[
            dict(type='TRADESLoss'),
            dict(type='RouterBalanceLoss'),
            dict(type='RouterImportanceLoss'),
            dict(type='RouterKLLoss'),
        ],
        data_preprocessor=dict(attack=dict(type='TRADESAttack', eps=8 / 255, alpha=4 / 255, steps=2)),
    )
    if case == 'tokens':
        model.update(backbone=TRANSFORMER, neck=None)
        model['head']['in_channels'] = 8
        # Without a norm over 0, tokens of dark and of bright images look the same behind the first norm layer.
        model['data_preprocessor'].update(mean=[127.5] * 3, std=[127.5] * 3)
    else:
        model['backbone']['router'] = ROUTERS[case]
        model['backbone']['backbone']['norm_cfg'] = GROUP_NORM
    cfg = run_cfg(work_dir, schedule, model=model)
    cfg.train_dataloader.batch_size = batch_size
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    return cfg


def train(work_dir, launcher, batch_size):
    """Weights after each run, and how many images each expert got on this process in the last iteration."""
    environment = Config(dict(env_cfg=dict(dist_cfg=dict(timeout=120))))
    prepare_distributed(environment, launcher)
    results = {}
    for case, schedule in RUNS:
        cfg = config(case, SCHEDULES[schedule], batch_size, f'{work_dir}/{case}_{schedule}')
        cfg.merge_from_dict({key: environment[key] for key in environment if key != 'custom_hooks'})
        runner = build_runner(cfg)
        images = runner.train_dataloader.dataset.images
        # Every second image dark: with an unshuffled sampler one process gets all of them.
        images[::2] //= 4
        images[1::2] = 255 - images[1::2] // 4
        runner.train()
        model = getattr(runner.model, 'module', runner.model)
        # The last step is the router's.
        counts = [routing.counts for routing in model.routing_records['router'].clean]
        results[f'{case}_{schedule}'] = dict(weights=model.state_dict(), counts=counts)
    return results


def train_in_one_of_two(folder):
    results = train(folder, 'pytorch', 4)
    torch.save(results, folder / f'rank{torch.distributed.get_rank()}.pth')
    finish_distributed()


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp('split')
    run_forks(train_in_one_of_two, tmp_path, variables=variables_of_ranks())
    ranks = [torch.load(tmp_path / f'rank{rank}.pth', weights_only=True) for rank in (0, 1)]
    return train(tmp_path / 'alone', 'none', 8), *ranks


@pytest.mark.parametrize(('case', 'schedule'), RUNS)
def test_two_processes_train_the_weights_of_one(runs, case, schedule):
    alone, *ranks = (run[f'{case}_{schedule}'] for run in runs)
    for rank in ranks:
        assert set(rank['weights']) == set(alone['weights'])
        for name, weight in alone['weights'].items():
            torch.testing.assert_close(rank['weights'][name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_the_cases_are_what_they_claim(runs):
    # 4 images of 4 patches and a class token, in two layers on two processes; both experts are used.
    routers = [counts for run in runs[1:] for counts in run['tokens_new_batch']['counts']]
    assert [sum(counts) for counts in routers] == [20] * 4
    assert all(sum(counts) > 0 for counts in zip(*routers))
    assert [run['idle_on_one_new_batch']['counts'][0] for run in runs[1:]] == [(4, 0), (0, 4)]
    assert [run['idle_on_both_new_batch']['counts'][0] for run in runs[1:]] == [(4, 0), (4, 0)]
