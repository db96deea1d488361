"""What users get wrong stops before training with a message that names the key, the value and what is allowed."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, HOOKS, MODELS
from torch import nn

import mmadvmoe  # noqa: F401
from mmadvmoe.datasets import Digits
from mmadvmoe.moe import BaseRouter
from mmadvmoe.runtime import check_config
from mmadvmoe.runtime.safe_load import CheckpointError

CONFIGS = Path(__file__).parents[1] / 'configs'
FGSM = dict(type='FGSM', eps=0.2)


@MODELS.register_module()
class OneLogitShort(BaseRouter):
    """A router of the user's own that ignores how many experts it is asked to choose from."""

    def __init__(self, num_experts):
        super().__init__(num_experts)
        self.fc = nn.Linear(3, num_experts - 1)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


@DATASETS.register_module()
class FaultyDigits(Digits):
    """Digits with one image of another size, or labels that start at 1."""

    def __init__(self, fault, **kwargs):
        self.fault = fault
        super().__init__(**kwargs)

    def load_data_list(self):
        data = super().load_data_list()
        for info in data:
            info['gt_label'] += self.fault == 'labels'
        if self.fault == 'sizes':
            data[0]['img'] = data[0]['img'][:7]
        return data


@HOOKS.register_module()
class StepCounter(Hook):
    """Notes every step of an optimizer."""

    steps = 0

    def before_train(self, runner):
        wrapper = runner.optim_wrapper
        for each in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
            each.optimizer.register_step_pre_hook(self._count)

    @classmethod
    def _count(cls, *_):
        cls.steps += 1


def train(tmp_path, name, changes):
    """Train as ``tools/train.py`` does, a changed config of this package."""
    cfg = Config.fromfile(str(CONFIGS / name))
    for key in [key for key in cfg if key.startswith(('val_', 'test_'))]:
        cfg.pop(key)
    cfg.merge_from_dict(dict(work_dir=str(tmp_path), train_cfg=dict(max_epochs=1), log_level='ERROR'))
    # What takes time here and changes nothing.
    cfg.merge_from_dict(
        dict(visualizer=dict(vis_backends=None), train_dataloader=dict(dataset=dict(serialize_data=False)))
    )
    changes(cfg)
    cfg.custom_hooks.append(dict(type='StepCounter'))
    cfg.experiment_name = tmp_path.name
    StepCounter.steps = 0
    check_config(cfg)
    Runner.from_cfg(cfg).train()


def message_of(tmp_path, name, changes, error=(ValueError, TypeError, FileNotFoundError)):
    """With which error training stops, before any optimizer has stepped."""
    with pytest.raises(error) as caught:
        train(tmp_path, name, changes)
    assert StepCounter.steps == 0
    return str(caught.value)


def set_to(**options):
    """A change of a config, with ``__`` for the dots of a key."""
    return lambda cfg: cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})


def attack(**options):
    return set_to(**{f'model__data_preprocessor__attack__{key}': value for key, value in options.items()})


def without(*keys):
    def change(cfg):
        part = cfg
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]

    return change


def plain_classifier(mode):
    """An ImageClassifier in place of the RobustClassifier."""

    def change(cfg):
        cfg.model.type = 'ImageClassifier'
        cfg.model.data_preprocessor.update(mode=mode, attack=FGSM)
        del cfg.model['robust_loss']
        cfg.custom_hooks = [dict(type='PreflightHook')]

    return change


def faulty_data(fault):
    def change(cfg):
        cfg.train_dataloader.dataset.update(type='FaultyDigits', fault=fault, pipeline=[dict(type='PackInputs')])

    return change


def half_unpacked(cfg):
    """CIFAR-10 of which the first file is there, and not all of it."""
    folder = Path(cfg.work_dir) / 'data' / 'cifar-10-batches-py'
    folder.mkdir(parents=True)
    (folder / 'data_batch_1').write_bytes(b'half of a file')
    pipeline = [dict(type='PackInputs')]
    cfg.train_dataloader.dataset = dict(type='CIFAR10Split', data_root=str(folder.parent), pipeline=pipeline)


CASES = {
    'token router in a CNN': (
        set_to(model__backbone__router=dict(type='TokenRouter', _delete_=True)),
        ['backbone.router.type=TokenRouter', "backbone.routing='image'", "'ResNetRouter'"],
    ),
    'token routing of a CNN': (
        set_to(model__backbone__routing='token', model__backbone__router=None),
        ["backbone.routing='token'", 'ResNet_CIFAR has none', "routing='image' or 'layer'"],
    ),
    'negative eps': (attack(eps=-0.1), ['TRADESAttack', 'eps=-0.1', 'at least 0']),
    'eps in 0..255': (attack(eps=8), ['TRADESAttack', 'eps=8 is above 1', '[0, 1]', 'eps=8 / 255']),
    'negative alpha': (attack(alpha=-1.0), ['TRADESAttack', 'alpha=-1.0', 'at least 0']),
    'alpha in 0..255': (attack(alpha=2), ['TRADESAttack', 'alpha=2 is above 1', '[0, 1]', 'alpha=2 / 255']),
    'steps 0': (attack(steps=0), ['TRADESAttack', 'steps=0', 'at least 1']),
    'N 0': (set_to(model__backbone__num_experts=0), ['backbone.num_experts=0', 'at least 1']),
    'N negative': (set_to(model__backbone__num_experts=-2), ['backbone.num_experts=-2', 'at least 1']),
    'N 1': (
        set_to(model__backbone__num_experts=1),
        ['router_loss: ', 'MoEBackbone has no router', 'num_experts >= 2'],
    ),
    'N 1 in turns': (
        set_to(model__backbone__num_experts=1, model__router_loss=dict(_delete_=True, type='TRADESLoss')),
        ['has no router to train in turns', 'num_experts >= 2', 'optim_wrapper=dict(optimizer=...)'],
    ),
    'r that makes a width of zero': (
        set_to(model__backbone__backbone__base_channels=0),
        ['model.backbone.backbone.base_channels=0', 'the first stage', 'the nearest is 1'],
    ),
    'r that makes no whole width': (
        set_to(model__backbone__backbone__base_channels=0.3 * 16),
        ['model.backbone.backbone.base_channels=4.8', 'the first stage', 'the nearest is 5'],
    ),
    'experts in the stem': (
        set_to(model__backbone__include=['conv']),
        ["backbone.include takes in the stem 'conv1'", 'narrow the pattern', 'backbone.exclude'],
    ),
    'images smaller than the poolings': (
        set_to(
            model__backbone=dict(
                include=[r'features\.[1-9]\d*\.conv'],
                backbone=dict(_delete_=True, type='ScaledVGG', depth=16, base_channels=2, with_last_pool=False),
            ),
            model__head__in_channels=16,
        ),
        ['images of 8x8 are too small for the ScaledVGG', 'at least 16x16', 'Resize in the pipeline'],
    ),
    'half unpacked data': (
        half_unpacked,
        ['cifar-10-batches-py', 'missing: ', 'data_batch_2', 'damaged or incomplete: data_batch_1', 'tar -xzf'],
    ),
    'router set to fewer experts': (
        set_to(model__backbone__num_experts=4, model__backbone__router__num_experts=2),
        ['backbone.router.num_experts=2', 'backbone.num_experts=4'],
    ),
    'router gives fewer logits': (
        set_to(
            model__backbone__num_experts=4,
            model__backbone__router=dict(type='OneLogitShort', _delete_=True),
        ),
        ['backbone.num_experts=4', 'OneLogitShort', 'backbone.router', 'gives 3', 'one for each expert'],
    ),
    'mean and std in 0..1': (
        set_to(model__data_preprocessor__mean=[0.5] * 3, model__data_preprocessor__std=[0.25] * 3),
        ['data_preprocessor.mean=[0.5, 0.5, 0.5]', 'std=[0.25, 0.25, 0.25]', '0..255', 'multiply both by 255'],
    ),
    'labels out of range': (
        faulty_data('labels'),
        ['train_dataloader.dataset (FaultyDigits)', 'labels [10]', '[0, 10)', 'model.head.num_classes'],
    ),
    'other number of classes': (
        set_to(model__head__num_classes=7),
        ['model.head.num_classes=7', '10 classes of train_dataloader.dataset'],
    ),
    'unknown attack': (attack(type='TRADEsAtack'), ["attack type='TRADEsAtack'", "mean 'TRADESAttack'?", 'PGD']),
    'unknown loss': (
        set_to(model__robust_loss__type='TRADEsLoss'),
        ["robust_loss.type='TRADEsLoss'", "mean 'TRADESLoss'?", 'AdversarialCrossEntropyLoss'],
    ),
    'unknown router loss': (
        set_to(model__router_loss=[dict(type='RouterLabelsLoss')]),
        ["router_loss.type='RouterLabelsLoss'", "mean 'RouterLabelLoss'?", 'TRADESLoss'],
    ),
    'unknown group': (
        set_to(optim_wrapper__routers=dict(optimizer=dict(type='SGD', lr=0.1))),
        ['optim_wrapper.routers', "mean 'router'?", 'allowed: experts, router'],
    ),
    'unknown group of schedules': (
        set_to(param_scheduler__expert=dict(type='ConstantLR')),
        ['param_scheduler.expert', "mean 'experts'?", 'allowed: experts, router'],
    ),
    'no schedule for a group': (
        without('param_scheduler', 'router'),
        ['param_scheduler.router is missing', "('experts', 'router')"],
    ),
    'no settings for a group': (
        without('optim_wrapper', 'experts'),
        ['optim_wrapper.experts is missing', "('experts', 'router')"],
    ),
    'no optimizer for a group': (
        without('optim_wrapper', 'router', 'optimizer'),
        ["optim_wrapper.router has no 'optimizer'", "dict(type='SGD', lr=0.1)"],
    ),
    'one image per batch': (
        set_to(train_dataloader__batch_size=1),
        ['train_dataloader.batch_size=1', 'at least 2'],
    ),
    'one image in the last batch': (
        set_to(train_dataloader__batch_size=4, train_dataloader__drop_last=False),
        ['train_dataloader.batch_size=4', 'single image out of 1257', 'drop_last=True'],
    ),
    'images of two sizes': (
        faulty_data('sizes'),
        ['(3, 7, 8), (3, 8, 8)', 'Resize', 'train_dataloader.dataset.pipeline'],
    ),
}


def longer_sequences(cfg):
    """Validation as the config has it, on larger images than training."""
    original = Config.fromfile(str(CONFIGS / 'advmoe_vit-small-moe_digits.py'))
    cfg.update({key: original[key] for key in original if key.startswith('val_')})
    cfg.val_dataloader.dataset.pipeline.insert(0, dict(type='Resize', scale=12))
    cfg.train_cfg.max_epochs = 6  # one more than warm-up takes


TOKEN_CASES = {
    'K above N': (set_to(model__backbone__router__top_k=5), ['router.top_k=5', '[1, 4]', 'num_experts=4']),
    'no capacity': (set_to(model__backbone__router__capacity_factor=0), ['router.capacity_factor=0', 'above 0']),
    'negative capacity at test': (
        set_to(model__backbone__router__eval_capacity_factor=-1.0),
        ['router.eval_capacity_factor=-1.0', 'above 0', 'None for no drops'],
    ),
    'pattern of no block': (
        set_to(model__backbone__include=[r'layers\.9\.ffn']),
        ['backbone.include', '9', 'matches no feed-forward network', 'layers.0.ffn'],
    ),
    'router of images': (
        set_to(model__backbone__router=dict(type='ResNetRouter', _delete_=True)),
        ['backbone.router.type=ResNetRouter', "backbone.routing='token'", "'TokenRouter'"],
    ),
    'sequences of another length in validation': (
        longer_sequences,
        ["backbone.routing='token'", 'train_dataloader', '(3, 8, 8)', 'val_dataloader', '(3, 12, 12)', 'crop_size'],
    ),
}

JOINT_CASES = {
    'pairs for a classifier that ignores them': (
        plain_classifier('pair'),
        ["data_preprocessor.mode='pair'", 'adv_inputs', 'ImageClassifier', "mode='replace'"],
    ),
    'no victim': (plain_classifier('replace'), ['data_preprocessor', 'no victim', "dict(type='BindVictimHook')"]),
}


def test_the_config_itself_trains(tmp_path):
    train(tmp_path, 'advmoe_resnet18_digits.py', set_to(train_dataloader__dataset__indices=128))
    assert StepCounter.steps == 2


@pytest.mark.parametrize('case', CASES)
def test_training_in_turns(tmp_path, case):
    changes, parts = CASES[case]
    message = message_of(tmp_path, 'advmoe_resnet18_digits.py', changes)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize('case', TOKEN_CASES)
def test_training_of_a_transformer(tmp_path, case):
    changes, parts = TOKEN_CASES[case]

    def change(cfg):
        changes(cfg)
        # Or the training would be shorter than its warm-up, which is found first.
        cfg.train_cfg.max_epochs = 6

    message = message_of(tmp_path, 'advmoe_vit-small-moe_digits.py', change)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize('case', JOINT_CASES)
def test_joint_training(tmp_path, case):
    changes, parts = JOINT_CASES[case]
    message = message_of(tmp_path, 'baselines/at_moe_resnet18_digits.py', changes)
    assert [part for part in parts if part not in message] == [], message


class Planted:
    """Makes a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize('key', ['load_from', 'resume'])
@pytest.mark.parametrize('kind', ['truncated', 'foreign', 'malicious'])
def test_checkpoints(tmp_path, kind, key):
    file, planted = tmp_path / f'{kind}.pth', tmp_path / 'planted'
    torch.save(dict(state_dict=dict(weight=torch.zeros(1000))), file)
    if kind == 'truncated':
        file.write_bytes(file.read_bytes()[:1500])
    elif kind == 'foreign':
        file.write_text('<html>404</html>')
    else:
        torch.save(dict(state_dict={}, meta=Planted(planted)), file)

    changes = set_to(load_from=str(file), resume=key == 'resume')
    message = message_of(tmp_path, 'advmoe_resnet18_digits.py', changes, CheckpointError)
    assert str(file) in message
    assert not planted.exists()
