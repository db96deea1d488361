import logging
import os
from dataclasses import replace

import pytest
import torch
from mmengine.hooks import Hook
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from tiny_runs import (
    CLASSES,
    TurnRecorder,
    build_runner,
    group_cfg,
    model_cfg,
    run_cfg,
    snapshot,
    turns_cfg,
)
from torch import distributed, multiprocessing

from mmadvmoe.models import RobustClassifier
from mmadvmoe.moe import router_modules, split_parameters
from mmadvmoe.training.alternation import AlternatingOptimHook, TurnSchedule, train_only

SCHEDULES = [
    TurnSchedule(),
    TurnSchedule(k_experts=3, k_router=2, warmup_iters=4),
    TurnSchedule(2, 1, 4, accumulative_counts=dict(experts=2, router=3)),
    TurnSchedule(warmup_iters=3, reuse_batch=True),
    TurnSchedule(reuse_batch=True, accumulative_counts=dict(experts=2, router=2)),
    TurnSchedule(router_first_iters=7, k_router=0),
    TurnSchedule(2, 1, 4, router_first_iters=6, accumulative_counts=dict(experts=2, router=3)),
    TurnSchedule(warmup_iters=3, reuse_batch=True, router_first_iters=5),
]


def groups_at(schedule, iteration):
    groups = [schedule.turn_at(iteration)]
    return groups + ['router'] if schedule.repeats_batch(iteration) else groups


@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
def test_counts_are_the_turns_taken_so_far(schedule):
    taken = dict(experts=0, router=0)
    for iteration in range(60):
        for group, count in taken.items():
            assert schedule.count_before(group, iteration) == count
        for group in groups_at(schedule, iteration):
            taken[group] += 1


def test_a_cycle_holds_the_asked_updates_of_each_group():
    schedule = TurnSchedule(3, 2, 4, accumulative_counts=dict(experts=2, router=3))
    order = ''.join(schedule.turn_at(i)[0] for i in range(4 + 2 * 12))
    assert order == 'eeee' + 2 * ('e' * 6 + 'r' * 6)


def test_the_router_goes_first_and_may_be_frozen_then():
    schedule = TurnSchedule(router_first_iters=3, warmup_iters=2, k_router=0)
    assert ''.join(schedule.turn_at(i)[0] for i in range(9)) == 'rrreeeeee'
    schedule = TurnSchedule(router_first_iters=3, warmup_iters=2)
    assert ''.join(schedule.turn_at(i)[0] for i in range(9)) == 'rrreeerer'


@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
def test_a_turn_never_ends_within_an_update(schedule):
    if schedule.reuse_batch:
        return  # one turn lasts one batch there, and both groups accumulate side by side
    for i in range(1, 60):
        group = schedule.turn_at(i - 1)
        if schedule.turn_at(i) != group:
            assert schedule.count_before(group, i) % schedule.accumulative_counts[group] == 0


@pytest.mark.parametrize(
    'wrong, key',
    [
        (dict(k_experts=0), 'k_experts=0'),
        (dict(k_router=-1), 'k_router=-1'),
        (dict(k_router=1.5), 'k_router=1.5'),
        (dict(k_router=True), 'k_router=True'),
        (dict(k_router=0), 'k_router=0; it must be an integer of at least 1'),
        (dict(router_first_iters=1, accumulative_counts=dict(experts=1, router=2)), 'router_first_iters=1 ends'),
        (dict(warmup_iters=-1), 'warmup_iters=-1'),
        (dict(k_experts=2, reuse_batch=True), 'k_experts=2'),
    ],
)
def test_wrong_values_are_named(wrong, key):
    with pytest.raises(ValueError, match=key):
        TurnSchedule(**wrong)


def test_accumulation_must_fit_the_schedule():
    with pytest.raises(ValueError, match='router.accumulative_counts=3 with reuse_batch'):
        replace(SCHEDULES[3], accumulative_counts=dict(experts=1, router=3))
    with pytest.raises(ValueError, match='warmup_iters=4 .* multiple of .*=3'):
        replace(SCHEDULES[1], accumulative_counts=dict(experts=3, router=1))


@MODELS.register_module()
class StepRecorder(RobustClassifier):
    """Notes for each training step its turn, its batch and what it changed."""

    def train_step(self, data, optim_wrapper):
        before = snapshot(self)
        batch = data['inputs'], [sample.clone() for sample in data['data_samples']]
        log_vars = super().train_step(data, optim_wrapper)
        moved = {
            group: {name for name, tensor in now.items() if not tensor.equal(before[group][name])}
            for group, now in snapshot(self).items()
        }
        self.steps = [*getattr(self, 'steps', []), (data['turn'], moved, self.flags, batch)]
        return log_vars

    def loss(self, *args, **kwargs):
        self.flags = {name: p.requires_grad for name, p in self.named_parameters()}
        return super().loss(*args, **kwargs)


def train(tmp_path, **kwargs):
    kwargs.setdefault('model', model_cfg(type='StepRecorder'))
    runner = build_runner(run_cfg(tmp_path, **kwargs))
    runner.train()
    return runner


ROUTER_FIRST_BN = 'backbone.router.bn1'
EXPERTS_FIRST_BN = 'backbone.network.bn1'


@pytest.mark.parametrize(
    'schedule, accumulative_counts, turns',
    [
        (dict(), 1, 'erererer'),
        (dict(k_experts=2, warmup_iters=2), 1, 'eeeereer'),
        (dict(), 2, 'eerreerr'),
        (dict(reuse_batch=True, warmup_iters=2), 1, 'ee' + 'er' * 6),
        (dict(reuse_batch=True), 2, 'er' * 8),
    ],
)
def test_a_turn_changes_its_own_group_only(tmp_path, schedule, accumulative_counts, turns):
    optim_wrapper = turns_cfg(accumulative_counts=accumulative_counts)
    runner = train(tmp_path, schedule=schedule, optim_wrapper=optim_wrapper)
    steps = runner.model.steps
    assert ''.join(turn[0] for turn, *_ in steps) == turns
    parameters = {group: {name for name, _ in named} for group, named in split_parameters(runner.model).items()}
    backward_passes = dict(experts=0, router=0)
    for turn, moved, flags, _ in steps:
        other = 'router' if turn == 'experts' else 'experts'
        assert not moved[other]
        assert {name for name, flag in flags.items() if flag} == parameters[turn]
        backward_passes[turn] += 1
        updates = backward_passes[turn] % accumulative_counts == 0
        first = ROUTER_FIRST_BN if turn == 'router' else EXPERTS_FIRST_BN
        # Norm statistics follow every batch, weights every update.
        assert f'{first}.running_mean' in moved[turn]
        assert (f'{first}.weight' in moved[turn]) == updates


def test_iteration_based_training_takes_the_same_turns(tmp_path):
    train_cfg = dict(by_epoch=False, max_iters=4)
    runner = train(tmp_path, train_cfg=train_cfg, schedule=dict(k_router=2))
    assert [turn for turn, *_ in runner.model.steps] == ['experts', 'router', 'router', 'experts']


def test_training_leaves_a_plain_model_behind(tmp_path):
    runner = train(tmp_path, epochs=1)
    model = runner.model
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class FlagRecorder(Hook):
    """Notes between steps which flags differ from those of a model in training."""

    priority = 'LOWEST'

    def __init__(self):
        self.wrong = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.after_train_iter(runner, batch_idx)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.wrong += [name for name, p in runner.model.named_parameters() if not p.requires_grad]
        self.wrong += [name for name, module in runner.model.named_modules() if not module.training]


@pytest.mark.parametrize('schedule', [dict(), dict(reuse_batch=True)])
def test_between_steps_the_model_is_whole(tmp_path, schedule):
    runner, recorder = build_runner(run_cfg(tmp_path, schedule=schedule)), FlagRecorder()
    runner.register_hook(recorder)
    runner.train()
    assert runner.iter == 8 and not recorder.wrong


@pytest.mark.parametrize('schedule', [dict(), dict(reuse_batch=True)])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_precise_bn_recomputes_every_norm(tmp_path, schedule, by_epoch):
    loop = dict(by_epoch=True, max_epochs=1) if by_epoch else dict(by_epoch=False, max_iters=4)
    hook = dict(type='PreciseBNHook', num_samples=16, interval=1 if by_epoch else 4, priority='ABOVE_NORMAL')
    runner = build_runner(run_cfg(tmp_path, schedule=schedule, train_cfg=loop, hooks=[hook]))
    last = {}

    class Before(Hook):
        """Runs just before PreciseBNHook."""

        priority = 'HIGH'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            last.update({n: b.clone() for n, b in runner.model.named_buffers() if n.endswith('running_mean')})

    runner.register_hook(Before())
    runner.train()
    now = dict(runner.model.named_buffers())
    assert any('router' in name for name in last) and any('network' in name for name in last)
    assert all(not now[name].equal(value) for name, value in last.items())


def test_an_error_inside_a_step_leaves_no_group_fixed():
    model = MODELS.build(model_cfg())
    with pytest.raises(KeyboardInterrupt), train_only(model, 'router'):
        assert not model.head.fc.weight.requires_grad and not model.head.training
        assert model.backbone.router.fc.weight.requires_grad and model.backbone.router.training
        raise KeyboardInterrupt
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


@MODELS.register_module()
class FailsInsideAStep(RobustClassifier):
    def loss(self, *args, **kwargs):
        assert not self.backbone.router.fc.weight.requires_grad
        raise KeyboardInterrupt


@pytest.mark.parametrize('schedule', [dict(), dict(reuse_batch=True, reuse_attack=True)])
def test_a_training_that_fails_leaves_a_whole_model(tmp_path, schedule):
    runner = build_runner(run_cfg(tmp_path, schedule, model=model_cfg(type='FailsInsideAStep')))
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert all(p.requires_grad for p in runner.model.parameters()) and all(m.training for m in runner.model.modules())
    assert not runner.model.data_preprocessor._forward_hooks


def test_an_attack_of_the_router_that_would_never_run_is_refused(tmp_path):
    model = model_cfg()
    model['data_preprocessor']['router_attack'] = dict(model['data_preprocessor']['attack'], eps=0.1)
    runner = build_runner(run_cfg(tmp_path, dict(reuse_batch=True, reuse_attack=True), model=model))
    with pytest.raises(ValueError, match='so that router_attack beside it never runs'):
        runner.train()


def test_what_was_frozen_before_stays_frozen(tmp_path):
    runner = build_runner(run_cfg(tmp_path, epochs=1))
    runner.model.head.requires_grad_(False)
    runner.model.backbone.router.conv1.requires_grad_(False)
    runner.model.init_weights()
    frozen = [runner.model.head.fc.weight, runner.model.backbone.router.conv1.weight]
    before = [parameter.clone() for parameter in frozen]
    runner.train()
    for parameter, value in zip(frozen, before):
        assert parameter.equal(value) and not parameter.requires_grad


def test_norm_eval_of_a_backbone_is_respected(tmp_path):
    model = model_cfg(type='StepRecorder')
    model['backbone']['backbone']['norm_eval'] = True
    runner = train(tmp_path, epochs=1, model=model)
    moved = [moved['experts'] for turn, moved, *_ in runner.model.steps if turn == 'experts']
    assert any(moved)
    assert not any(name.endswith('running_mean') for names in moved for name in names)


def test_both_turns_see_the_same_batch_and_labels_are_mixed_once(tmp_path):
    model = model_cfg(type='StepRecorder')
    model['head']['loss'] = dict(type='CrossEntropyLoss', use_soft=True)
    model['data_preprocessor'] |= dict(
        num_classes=CLASSES, batch_augments=dict(augments=[dict(type='Mixup', alpha=0.5)])
    )
    runner = train(tmp_path, epochs=1, schedule=dict(reuse_batch=True), model=model)
    steps = runner.model.steps
    assert len(steps) == 8
    for (*_, (images, samples)), (*_, (again, samples_again)) in zip(steps[::2], steps[1::2]):
        assert torch.stack(list(images)).equal(torch.stack(list(again)))
        for sample, sample_again in zip(samples, samples_again):
            assert sample.gt_label.equal(sample_again.gt_label)
            assert 'gt_score' not in sample_again


def test_layer_level_routers_are_trained_in_their_turn(tmp_path):
    runner = train(tmp_path, model=model_cfg(routing='layer', type='StepRecorder'))
    routers = router_modules(runner.model)
    assert len(routers) == 8
    for turn, moved, *_ in runner.model.steps:
        assert moved[turn] and not moved['experts' if turn == 'router' else 'router']


def test_both_turns_appear_in_the_log(tmp_path):
    clipped = turns_cfg(clip_grad=dict(max_norm=1.0))
    schedule = dict(reuse_batch=True)
    runner = train(tmp_path, epochs=1, schedule=schedule, optim_wrapper=clipped, log_level='INFO')
    scalars = runner.message_hub.log_scalars
    assert 'train/loss' not in scalars
    for group in ('experts', 'router'):
        assert {f'train/{group}/loss', f'train/{group}.lr', f'train/{group}.grad_norm'} <= set(scalars)
        terms = (f'train/{group}/loss_natural', f'train/{group}/loss_robust')
        total = sum(scalars[term].data[0] for term in terms)
        assert scalars[f'train/{group}/loss'].data[0] == pytest.approx(total)
        assert len(total) == 4
    (log,) = tmp_path.glob('*/*.log')
    last = [line for line in log.read_text().splitlines() if 'Epoch(train)' in line][-1]
    for key in ('experts.lr: ', 'router.lr: ', 'experts/loss: ', 'router/loss: '):
        assert key in last


@pytest.mark.parametrize('schedule', [dict(k_experts=2), dict(reuse_batch=True)])
def test_resuming_within_a_cycle_gives_the_same_weights(tmp_path, schedule):
    common = dict(
        schedule=schedule,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        param_scheduler=dict(
            experts=[dict(type='MultiStepLR', milestones=[1], gamma=0.5, end=2)],
            router=[dict(type='ConstantLR', factor=0.1, by_epoch=False, end=6)],
        ),
    )
    whole = train(tmp_path / 'whole', **common)
    (hook,) = (hook for hook in whole.hooks if isinstance(hook, AlternatingOptimHook))
    assert hook.schedule.turn_at(4) == 'experts'
    train(tmp_path / 'parts', epochs=1, **common)
    resumed = train(tmp_path / 'parts', resume=True, **common)
    assert [turn for turn, *_ in resumed.model.steps] == [
        turn for turn, *_ in whole.model.steps[len(whole.model.steps) // 2 :]
    ]
    weights = resumed.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert weights[name].equal(tensor), name
    momenta = [
        [state['momentum_buffer'] for state in member.optimizer.state.values()]
        for runner in (whole, resumed)
        for member in runner.optim_wrapper.values()
    ]
    for group in (0, 1):
        assert all(a.equal(b) for a, b in zip(momenta[group], momenta[2 + group]))


@pytest.mark.parametrize(
    'kwargs, error, message',
    [
        (
            dict(model=model_cfg(num_experts=1), optim_wrapper=group_cfg()),
            TypeError,
            'optim_wrapper.constructor=',
        ),
        (dict(schedule=dict(warmup_iters=8)), ValueError, 'warmup_iters=8 .* in the 8 iterations'),
        (dict(schedule=dict(k_experts=8)), ValueError, 'k_experts=8 .* in the 8 iterations'),
        (dict(schedule=dict(router_first_iters=8)), ValueError, 'router_first_iters=8 leaves no turn for the experts'),
        (
            dict(schedule=dict(warmup_iters=1), optim_wrapper=turns_cfg(accumulative_counts=2)),
            ValueError,
            'warmup_iters=1',
        ),
    ],
)
def test_training_that_cannot_take_turns_is_refused_before_it_starts(tmp_path, kwargs, error, message):
    runner = build_runner(run_cfg(tmp_path, **kwargs))
    with pytest.raises(error, match=message):
        runner.train()
    assert runner.iter == 0


def test_turns_without_the_hook_are_refused(tmp_path):
    runner = build_runner(run_cfg(tmp_path, custom_hooks=[]))
    with pytest.raises(RuntimeError, match='AlternatingOptimHook'):
        runner.train()


def test_validation_needs_no_optimizers(tmp_path):
    cfg = run_cfg(tmp_path)
    cfg.val_dataloader = dict(cfg.train_dataloader, sampler=dict(type='DefaultSampler'))
    cfg.val_cfg, cfg.val_evaluator = dict(), dict(type='Accuracy')
    assert 'accuracy/top1' in build_runner(cfg).val()


def test_a_model_without_objectives_per_turn_takes_turns_too(tmp_path):
    model = model_cfg(type='ImageClassifier', data_preprocessor=dict(type='ClsDataPreprocessor'))
    del model['robust_loss']
    runner, recorder = build_runner(run_cfg(tmp_path, epochs=1, model=model)), TurnRecorder()
    runner.register_hook(recorder)
    runner.train()
    assert type(runner.model) is ImageClassifier and not hasattr(runner.model, 'turn')
    assert recorder.changed == [{'experts'}, {'router'}] * 2


def _train_in_two_processes(rank, folder):
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    outcome, recorder = {}, TurnRecorder()
    for find_unused in (False, True):
        cfg = run_cfg(
            f'{folder}/{find_unused}',
            launcher='pytorch',
            model_wrapper_cfg=dict(
                type='MMDistributedDataParallel',
                find_unused_parameters=find_unused,
                broadcast_buffers=False,
                device_ids=None,
            ),
            epochs=4,
            hooks=[dict(type='RouterHealthHook')],
            optim_wrapper=turns_cfg(accumulative_counts=2),
        )
        runner = build_runner(cfg)
        runner.register_hook(recorder)
        try:
            runner.train()
        except ValueError as error:
            outcome['refused'] = str(error)
    outcome['changed'] = recorder.changed
    outcome['weights'] = {n: p.detach() for n, p in runner.model.module.named_parameters()}
    scalars = runner.message_hub.log_scalars
    outcome['shares'] = [scalars[f'router/share_clean_{e}'].data[0].tolist() for e in (0, 1)]
    torch.save(outcome, f'{folder}/outcome_{rank}.pth')
    distributed.barrier()
    distributed.destroy_process_group()


def test_turns_hold_in_two_processes(tmp_path):
    multiprocessing.start_processes(_train_in_two_processes, (str(tmp_path),), nprocs=2, start_method='fork')
    first, second = (torch.load(tmp_path / f'outcome_{rank}.pth') for rank in (0, 1))
    assert 'find_unused_parameters=True' in first['refused']
    # An epoch has two iterations in each process: as many as an update takes.
    turns = [{'experts'}, {'experts'}, {'router'}, {'router'}]
    assert first['changed'] == second['changed'] == 2 * turns
    for name, tensor in first['weights'].items():
        assert tensor.equal(second['weights'][name]), name
    assert first['shares'] == second['shares']
    assert [sum(shares) for shares in zip(*first['shares'])] == [1.0] * 4


def test_wrong_numbers_are_refused_when_the_config_is_built():
    with pytest.raises(ValueError, match='k_router=0'):
        AlternatingOptimHook(k_router=0)
