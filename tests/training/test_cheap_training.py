"""Adversarial training that saves attacks: one for both turns, none at all, or weak ones that are watched."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmpretrain.registry import MODELS
from tiny_models import classifier_cfg, make_classifier, make_data
from tiny_runs import TurnRecorder, build_runner, model_cfg, run_cfg, turns_cfg

from mmadvmoe.attacks import BoundAttack
from mmadvmoe.models import NonFiniteError
from mmadvmoe.training import CatastrophicOverfittingHook, SpeedHook, TurnSchedule


class Seen(Hook):
    """Notes the inputs of each loss."""

    def before_train(self, runner):
        self.inputs = []
        loss = type(runner.model).loss

        def noted(model, inputs, data_samples, adv_inputs=None, turn=None):
            self.inputs.append((turn, inputs.clone(), adv_inputs.clone()))
            return loss(model, inputs, data_samples, adv_inputs, turn)

        runner.model.loss = noted.__get__(runner.model)


@pytest.mark.parametrize('shared', [False, True])
def test_both_turns_step_on_the_images_of_one_attack(tmp_path, monkeypatch, shared):
    attacks = []
    call = BoundAttack.__call__
    monkeypatch.setattr(BoundAttack, '__call__', lambda self, *a, **k: attacks.append(1) or call(self, *a, **k))
    preprocessor = dict(attack=dict(type='PGD', steps=1), augment=dict(type='BatchedCropFlip', padding=1))
    cfg = run_cfg(
        tmp_path,
        dict(reuse_batch=True, reuse_attack=shared, warmup_iters=1),
        epochs=1,
        model=model_cfg(data_preprocessor=preprocessor),
    )
    runner = build_runner(cfg)
    seen, recorder = Seen(), TurnRecorder()
    runner.register_hook(seen)
    runner.register_hook(recorder)
    runner.train()
    assert [turn for turn, *_ in seen.inputs] == ['experts', *['experts', 'router'] * 3]
    assert len(attacks) == (4 if shared else 7)
    pairs = list(zip(seen.inputs[1::2], seen.inputs[2::2]))
    assert all(all(torch.equal(a, b) for a, b in zip(own[1:], other[1:])) == shared for own, other in pairs)
    assert recorder.changed == [{'experts'}, *[{'experts', 'router'}] * 3]
    assert not runner.model.data_preprocessor._forward_hooks


def test_a_shared_attack_that_cannot_be_is_named(tmp_path):
    with pytest.raises(ValueError, match='set reuse_batch=True as well'):
        TurnSchedule(reuse_attack=True)
    preprocessor = dict(attack=dict(type='FGSM'), mode='replace')
    schedule = dict(reuse_batch=True, reuse_attack=True)
    runner = build_runner(run_cfg(tmp_path, schedule, model=model_cfg(data_preprocessor=preprocessor)))
    with pytest.raises(ValueError, match="mode='pair'"):
        runner.train()


def free_classifier(**settings):
    torch.manual_seed(0)
    cfg = classifier_cfg('FreeClassifier', data_preprocessor={}, **settings)
    return MODELS.build(cfg)


def test_free_training_is_algorithm_1_of_the_paper():
    """Two batches: the perturbation of the first goes on in the second."""
    eps, replays = 0.1, 3
    model, plain = free_classifier(eps=eps, replays=replays).train(), free_classifier().train()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    offset = torch.zeros(4, 3, 8, 8)
    for batch in (make_data(), make_data()):
        images = torch.stack(batch['inputs']) / 255
        labels = torch.cat([sample.gt_label for sample in batch['data_samples']])
        log = model.train_step(batch, wrapper)
        for _ in range(replays):
            points = (images + offset).clamp(0, 1).requires_grad_()
            loss = F.cross_entropy(plain(points), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            offset = (offset + eps * points.grad.sign()).clamp(-eps, eps)
        torch.testing.assert_close(log['loss'], loss.detach())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


def test_free_training_is_resumed_exactly(tmp_path):
    def run(epochs, **overrides):
        model = classifier_cfg('FreeClassifier', data_preprocessor={}, eps=0.1, replays=2)
        cfg = run_cfg(tmp_path, epochs=epochs, model=model, **overrides)
        cfg.custom_hooks = [dict(type='ExactResumeHook')]
        cfg.optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05))
        cfg.default_hooks.checkpoint.interval = 1
        runner = build_runner(cfg)
        runner.train()
        return runner.model.state_dict()

    whole = run(2)
    resumed = run(2, resume=True, load_from=str(tmp_path / 'epoch_1.pth'))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_perturbation_of_free_training_is_saved_and_bothers_no_weight_average(tmp_path):
    cfg = run_cfg(tmp_path, epochs=1, model=classifier_cfg('FreeClassifier', data_preprocessor={}))
    cfg.custom_hooks = [dict(type='EMAHook')]  # copies the model before there is one
    cfg.optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05))
    runner = build_runner(cfg)
    runner.train()
    state = runner.model.state_dict()
    assert state['offset'].any()
    free_classifier().load_state_dict(state, strict=True)


def test_free_training_of_a_mixture_and_of_batches_of_two_sizes():
    model = free_classifier(backbone=classifier_cfg(moe=True)['backbone'], replays=2).train()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.05))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for count in (4, 3):
        model.train_step(make_data(count), wrapper)
    changed = [name for name, p in model.named_parameters() if not torch.equal(before[name], p)]
    assert any('router' in name for name in changed) and any('network' in name for name in changed)


def test_a_smaller_last_batch_leaves_the_perturbation_of_the_others():
    model = free_classifier(replays=2).train()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.05))
    model.train_step(make_data(4), wrapper)
    before = model._offset
    model.train_step(make_data(3), wrapper)
    assert torch.equal(model._offset[3], before[3]) and not torch.equal(model._offset[:3], before[:3])


def test_mistakes_of_free_training_are_named():
    with pytest.raises(ValueError, match='replays=0'):
        free_classifier(replays=0)
    with pytest.raises(ValueError, match='eps=8 must be in'):
        free_classifier(eps=8)
    with pytest.raises(TypeError, match='without an attack'):
        make_classifier('FreeClassifier', attack=dict(type='FGSM'))
    with pytest.raises(ValueError, match='accumulative_counts=2'):
        model = free_classifier()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        model.train().train_step(make_data(), OptimWrapper(optimizer, accumulative_counts=2))
    model = free_classifier()
    data = model.data_preprocessor(make_data(), True)
    with pytest.raises(RuntimeError, match='trains in one process'):
        model(**data, mode='loss')
    with torch.no_grad():
        model.head.fc.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match='loss'):
        model.train().train_step(make_data(), OptimWrapper(torch.optim.SGD(model.parameters(), 0.05)))


def watched(tmp_path, **settings):
    hook = dict(type='CatastrophicOverfittingHook', attack=dict(type='PGD', eps=0.3, alpha=0.1, steps=3), **settings)
    return build_runner(run_cfg(tmp_path, hooks=[hook], epochs=4))


@pytest.mark.parametrize('stop', [True, False])
def test_a_fall_of_robust_accuracy_ends_the_training(tmp_path, monkeypatch, stop):
    runner = watched(tmp_path, stop=stop)
    warnings = []
    monkeypatch.setattr(runner.logger, 'warning', lambda text, *_, **__: warnings.append(text))
    # As if the second epoch had been the best: none of the images is safe in the third.
    hub = runner.message_hub

    class Best(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 2:
                hub.update_info('catastrophic_overfitting_best', 2.0)

    runner.register_hook(Best())
    runner.train()
    assert runner.epoch == (3 if stop else 4)
    assert 'Catastrophic overfitting in epoch 3' in warnings[0] and 'fell from 200.0%' in warnings[0]
    values = hub.get_scalar('train/strong_accuracy').data[0]
    assert len(values) == runner.epoch and all(0 <= value <= 1 for value in values)


def test_watching_changes_no_bit_of_the_training(tmp_path):
    plain = build_runner(run_cfg(tmp_path / 'plain', epochs=4))
    plain.train()
    runner = watched(tmp_path / 'watched', drop=0.99)
    runner.train()
    assert all(torch.equal(value, runner.model.state_dict()[name]) for name, value in plain.model.state_dict().items())


@pytest.mark.parametrize(('settings', 'message'), [(dict(drop=0), 'drop=0'), (dict(num_images=0), 'num_images=0')])
def test_mistakes_of_the_watch_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CatastrophicOverfittingHook(**settings)


def test_only_epochs_are_watched(tmp_path):
    cfg = run_cfg(tmp_path, hooks=[dict(type='CatastrophicOverfittingHook')], optim_wrapper=turns_cfg())
    cfg.train_cfg = dict(by_epoch=False, max_iters=4)
    with pytest.raises(ValueError, match='by_epoch=False'):
        build_runner(cfg).train()


def test_a_gpu_gets_its_settings_and_a_cpu_none(monkeypatch):
    model = make_classifier()
    runner = type('Runner', (), dict(model=model))()
    before = torch.backends.cudnn.allow_tf32
    SpeedHook().before_run(runner)
    assert torch.backends.cudnn.allow_tf32 == before and model.backbone.conv1.weight.is_contiguous()
