"""Adversarial weight perturbation and weight averages, in real runs of joint training and of turns."""

import copy

import pytest
import tiny_runs
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmpretrain.registry import MODELS
from torch import nn

import mmadvmoe.training.awp  # noqa: F401
from mmadvmoe.models import NonFiniteError
from mmadvmoe.moe import split_parameters
from mmadvmoe.training.awp import AWPOptimWrapper

GAMMA = 0.05


def awp(**overrides):
    return tiny_runs.group_cfg(type='AWPOptimWrapper', gamma=GAMMA) | overrides


def sgd(model, kind=OptimWrapper, **kwargs):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return kind(optimizer=torch.optim.SGD(parameters, lr=0.1), **kwargs)


def model_and_batch():
    torch.manual_seed(0)
    model = MODELS.build(tiny_runs.model_cfg(data_preprocessor=dict(attack=dict(type='FGSM', eps=0.03))))
    model.init_weights()
    model.train()
    images = tiny_runs.RandomImages()
    return model, dict(
        inputs=[images[i]['inputs'] for i in range(8)], data_samples=[images[i]['data_samples'] for i in range(8)]
    )


def step_by_hand(model, batch, gamma=GAMMA, lr=0.1):
    """The definition, on a model without any wrapper."""
    data = model.data_preprocessor(batch, True)
    loss = sum(model(**data, mode='loss').values())
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    weights = [p for p in model.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in weights]
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights)):
        if gradient.norm() > 0:
            weight.data += gamma * weight.detach().norm() * gradient / gradient.norm()
    sum(model(**data, mode='loss').values()).backward()
    for weight, value in zip(weights, before):
        weight.data = value
    for parameter in model.parameters():
        parameter.data -= lr * parameter.grad
    return statistics


def test_step_is_the_gradient_at_perturbed_weights_taken_from_the_weights():
    model, batch = model_and_batch()
    by_hand, plain = copy.deepcopy(model), copy.deepcopy(model)
    statistics = step_by_hand(by_hand, copy.deepcopy(batch))
    sgd(plain).update_params(sum(plain(**plain.data_preprocessor(copy.deepcopy(batch), True), mode='loss').values()))
    model.train_step(batch, sgd(model, AWPOptimWrapper, gamma=GAMMA))
    for (name, ours), wanted in zip(model.named_parameters(), by_hand.parameters()):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6, msg=name)
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), plain.parameters()))
    # Norm layers keep what they saw at the weights as they are.
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, statistics[name])


def test_weights_are_restored_bit_for_bit():
    model, batch = model_and_batch()
    before = [p.detach().clone() for p in model.parameters()]
    wrapper = sgd(model, AWPOptimWrapper, gamma=GAMMA, accumulative_counts=2)
    model.train_step(batch, wrapper)  # accumulates: nothing may move
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before))
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert not model._forward_pre_hooks


def test_routes_in_the_log_are_those_at_the_weights_as_they_are():
    model, batch = model_and_batch()
    for parameter in model.parameters():  # some start at 0, where nothing can be perturbed
        torch.nn.init.normal_(parameter)
    plain = copy.deepcopy(model)
    plain.train_step(copy.deepcopy(batch), sgd(plain))
    model.train_step(batch, sgd(model, AWPOptimWrapper, gamma=1.0))
    ours, wanted = model.routing_records[None], plain.routing_records[None]
    for side in ('clean', 'adversarial'):
        assert torch.equal(getattr(ours, side)[0].logits, getattr(wanted, side)[0].logits)


def test_weights_are_restored_when_the_second_loss_is_not_finite():
    model, batch = model_and_batch()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError):
        model.train_step(batch, sgd(model, AWPOptimWrapper, gamma=1e38))
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before))


def test_warmup_steps_are_plain():
    model, batch = model_and_batch()
    plain = copy.deepcopy(model)
    wrapper, plain_wrapper = sgd(model, AWPOptimWrapper, gamma=GAMMA, warmup_iters=1), sgd(plain)
    differ = []
    for _ in range(2):
        model.train_step(copy.deepcopy(batch), wrapper)
        plain.train_step(copy.deepcopy(batch), plain_wrapper)
        differ.append(not all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters())))
    assert differ == [False, True]


def test_wrong_settings_and_use_are_named():
    model, _ = model_and_batch()
    with pytest.raises(ValueError, match='gamma=-1'):
        sgd(model, AWPOptimWrapper, gamma=-1)
    with pytest.raises(ValueError, match='warmup_iters=0.5'):
        sgd(model, AWPOptimWrapper, warmup_iters=0.5)
    with pytest.raises(RuntimeError, match='optim_context'):
        sgd(model, AWPOptimWrapper).update_params(sum(p.sum() for p in model.parameters()))


class _Forwards(Hook):
    """Counts the loss computations of each turn, and keeps the groups' changes."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.calls = {'experts': 0, 'router': 0}
        runner.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs):
        if kwargs.get('mode') == 'loss':
            self.calls[kwargs['turn']] += 1


@pytest.mark.parametrize('groups', [('experts',), ('experts', 'router')])
def test_groups_in_turns_move_alone_and_only_the_chosen_ones_are_perturbed(tmp_path, groups):
    wrappers = {name: awp() if name in groups else tiny_runs.group_cfg() for name in ('experts', 'router')}
    recorder, forwards = tiny_runs.TurnRecorder(), _Forwards()
    cfg = tiny_runs.run_cfg(
        tmp_path, optim_wrapper=dict(constructor='AlternatingOptimWrapperConstructor', **wrappers), epochs=1
    )
    runner = tiny_runs.build_runner(cfg)
    runner.register_hook(recorder)
    runner.register_hook(forwards)
    runner.train()
    assert recorder.changed == [{'experts'}, {'router'}] * 2
    assert forwards.calls == {name: 4 if name in groups else 2 for name in ('experts', 'router')}


class _Snapshots(Hook):
    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.weights = [self._copy(runner.model)]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.weights.append(self._copy(runner.model))

    @staticmethod
    def _copy(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def averaged_run(tmp_path, **ema):
    snapshots = _Snapshots()
    runner = tiny_runs.build_runner(tiny_runs.run_cfg(tmp_path, hooks=[dict(type='EMAHook', **ema)], epochs=1))
    runner.register_hook(snapshots)
    runner.train()
    (hook,) = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
    return runner, hook, snapshots.weights


def test_moving_average_holds_both_groups(tmp_path):
    momentum = 0.3
    runner, hook, weights = averaged_run(tmp_path, ema_type='ExponentialMovingAverage', momentum=momentum)
    averages = dict(hook.ema_model.module.named_parameters())
    groups = split_parameters(runner.model)
    for group in ('experts', 'router'):
        moved = False
        for name, parameter in groups[group]:
            # The first update copies the weights of that iteration.
            wanted = weights[1][name]
            for later in weights[2:]:
                wanted = (1 - momentum) * wanted + momentum * later[name]
            torch.testing.assert_close(averages[name].detach(), wanted, rtol=1e-4, atol=1e-6)
            moved |= not torch.allclose(wanted, parameter)
        assert moved


def test_stochastic_weight_average_is_the_mean_of_the_iterates(tmp_path):
    runner, hook, weights = averaged_run(tmp_path, ema_type='StochasticWeightAverage')
    for name, average in hook.ema_model.module.named_parameters():
        mean = torch.stack([each[name] for each in weights[1:]]).mean(0)
        torch.testing.assert_close(average.detach(), mean, rtol=1e-4, atol=1e-6)


def test_average_attacks_and_predicts_on_its_own(tmp_path):
    runner, hook, _ = averaged_run(tmp_path, ema_type='ExponentialMovingAverage', momentum=0.3)
    average = hook.ema_model.module
    preprocessor = average.data_preprocessor
    assert preprocessor._attacks[None].victim.classifier is average
    assert isinstance(average.backbone, nn.Module) and average.backbone is not runner.model.backbone
