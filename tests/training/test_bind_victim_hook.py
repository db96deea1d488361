"""Adversarial training of classifiers that know nothing of it, and a distributed wrapper around those that do."""

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from tiny_runs import build_runner, group_cfg, model_cfg, run_cfg, snapshot

import mmadvmoe  # noqa: F401
from mmadvmoe.models import NonFiniteError

FGSM = dict(type='FGSM', eps=8 / 255)
BIND = dict(type='BindVictimHook')


def plain_cfg(tmp_path, preprocessor=None, hooks=(BIND,), **overrides):
    """An untouched ImageClassifier with a MoEBackbone and one optimizer."""
    model = model_cfg(type='ImageClassifier')
    del model['robust_loss'], model['data_preprocessor']
    if preprocessor is not None:
        model['data_preprocessor'] = preprocessor
    cfg = dict(model=model, optim_wrapper=group_cfg(), custom_hooks=[dict(type='PreflightHook'), *hooks])
    return run_cfg(tmp_path, epochs=1, **cfg | overrides)


class Watch(Hook):
    """Keeps what the classifier is given to learn from."""

    def before_train(self, runner):
        self.inputs = []
        runner.model.backbone.register_forward_pre_hook(self._note)

    def _note(self, module, args):
        if module.training:
            self.inputs.append(args[0].detach().clone())


def run(cfg):
    runner, watch = build_runner(cfg), Watch()
    runner.register_hook(watch)
    before = snapshot(runner.model)
    runner.train()
    after = snapshot(runner.model)
    moved = {g for g in before if not all(after[g][name].equal(v) for name, v in before[g].items())}
    return moved, watch.inputs


def test_an_untouched_classifier_trains_a_mixture(tmp_path):
    moved, inputs = run(plain_cfg(tmp_path, hooks=()))
    assert moved == {'experts', 'router'} and len(inputs) == 4


def test_replace_hands_adversarial_images_to_an_untouched_classifier(tmp_path):
    settings = dict(type='AdvDataPreprocessor', mode='replace')
    moved, attacked = run(plain_cfg(tmp_path, dict(attack=FGSM, **settings)))
    assert moved == {'experts', 'router'} and len(attacked) == 4
    _, clean = run(plain_cfg(tmp_path, dict(attack=dict(FGSM, eps=0.0), **settings)))
    # The first batch of a run is the same one; FGSM takes all pixels to the border of the ball or of [0, 1].
    offset = (attacked[0] - clean[0]).abs()
    assert offset.max().item() == pytest.approx(8 / 255, abs=1e-6)
    assert offset.mean() > 0.8 * 8 / 255


def test_a_preprocessor_without_attacks_is_refused(tmp_path):
    runner = build_runner(plain_cfg(tmp_path, dict(type='ClsDataPreprocessor')))
    with pytest.raises(TypeError, match=r'needs data_preprocessor\.type=AdvDataPreprocessor, got ClsDataPreproc'):
        runner.train()


def test_a_wrong_attack_is_refused_before_training(tmp_path):
    runner = build_runner(
        plain_cfg(tmp_path, dict(type='AdvDataPreprocessor', mode='replace', attack=dict(FGSM, eps=8)))
    )
    with pytest.raises(ValueError, match=r'eps=8 is above 1.*eps=8 / 255'):
        runner.train()
    assert runner.iter == 0


def test_steps_that_blow_up_stop_before_the_next_one(tmp_path):
    class Keep(Hook):
        def after_train_iter(self, runner, **_):
            self.kept = snapshot(runner.model)

    model = model_cfg(data_preprocessor=dict(attack=dict(type='TRADESAttack', eps=0.1)))
    optimizer = group_cfg(optimizer=dict(type='SGD', lr=1e30))
    runner, keep = build_runner(run_cfg(tmp_path, model=model, optim_wrapper=optimizer, custom_hooks=[])), Keep()
    runner.register_hook(keep)
    with pytest.raises(NonFiniteError, match=r'at iteration \d: .*(loss_|logits)'):
        runner.train()
    assert 1 <= runner.iter < 8
    weights = dict(runner.model.named_parameters())
    for group in keep.kept.values():
        for name in set(group) & set(weights):
            assert torch.equal(weights[name].nan_to_num(7), group[name].nan_to_num(7)), name


def test_the_attack_goes_past_the_distributed_wrapper(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        model = MODELS.build(model_cfg(data_preprocessor=dict(attack=dict(type='PGD', eps=0.1, steps=3))))
        wrapper = MMDistributedDataParallel(model, find_unused_parameters=True)
        through = dict(wrapper=0, backbone=0)

        def count(name):
            return lambda *_: through.update({name: through[name] + 1})

        wrapper.register_forward_hook(count('wrapper'))
        model.backbone.network.register_forward_hook(count('backbone'))
        data = dict(
            inputs=list(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)),
            data_samples=[DataSample().set_gt_label(index % 3) for index in range(4)],
        )
        log_vars = wrapper.train_step(data, OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
        # Three steps of the attack, then the clean and the adversarial batch in one forward pass of the wrapper.
        assert through == dict(wrapper=1, backbone=5)
        assert log_vars['loss'].isfinite()
    finally:
        torch.distributed.destroy_process_group()
