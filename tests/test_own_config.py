"""A config that a user writes by hand, with backbones of MMPretrain that this package knows nothing of."""

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

CONFIG = """
custom_imports = dict(imports=['mmadvmoe'])
default_scope = 'mmpretrain'

model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(
        type='AdvDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        attack=dict(type='TRADESAttack', eps=8 / 255, alpha=5 / 255, steps=1)),
    backbone=dict(
        type='MoEBackbone',
        num_experts=2,
        {experts}
        router=dict(type='ResNetRouter', base_channels=4, num_blocks=1),
        backbone={backbone}),
    neck={neck},
    head=dict(type='LinearClsHead', num_classes=10, in_channels={channels}),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
    router_loss=dict(type='RouterLabelLoss'))

train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='Digits',
        split='train',
        indices=16,
        serialize_data=False,
        pipeline=[dict(type='Resize', scale=32), dict(type='PackInputs')]))
train_cfg = dict(by_epoch=True, max_epochs=1)

optim_wrapper = dict(
    constructor='AlternatingOptimWrapperConstructor',
    experts=dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), paramwise_cfg=dict(norm_decay_mult=0.0)),
    router=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9), clip_grad=dict(max_norm=1.0)))
param_scheduler = dict(
    experts=dict(type='CosineAnnealingLR', T_max=4, by_epoch=False),
    router=dict(type='ConstantLR', by_epoch=False))
custom_hooks = [dict(type='AlternatingOptimHook'), dict(type='RouterHealthHook'), dict(type='PreflightHook')]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='SafeCheckpointHook', interval=-1, save_last=False))
randomness = dict(seed=0)
log_level = 'WARNING'
"""

BACKBONES = {
    'convnext': dict(
        backbone="dict(type='ConvNeXt', arch='tiny')",
        experts=r"include=[r'stages\.[012]\.\d+\.(depthwise|pointwise)_conv'],",
        neck='None',
        channels=768,
        layers=3 * 15,
    ),
    'vgg': dict(
        backbone="dict(type='VGG', depth=11, norm_cfg=dict(type='BN'))",
        experts=r"include=[r'features.*conv'], exclude=[r'features\.0\.conv'],",
        neck="dict(type='GlobalAveragePooling')",
        channels=512,
        layers=7,
    ),
}


@pytest.mark.parametrize('name', BACKBONES)
def test_trains_in_turns(tmp_path, name):
    choice = dict(BACKBONES[name])
    layers = choice.pop('layers')
    file = tmp_path / f'my_{name}.py'
    text = CONFIG
    for key, value in choice.items():
        text = text.replace('{' + key + '}', str(value))
    file.write_text(text)

    cfg = Config.fromfile(str(file))
    cfg.work_dir = str(tmp_path / 'run')
    runner = Runner.from_cfg(cfg)
    model = runner.model
    assert len(model.backbone.expert_layers()) == layers
    turns, train_step = [], model.train_step

    def watched(*args, **kwargs):
        old = {key: value.clone() for key, value in model.state_dict().items()}
        outputs = train_step(*args, **kwargs)
        moved = {key for key, value in model.state_dict().items() if not value.equal(old[key])}
        turns.append((args[0]['turn'], {'router' if 'router' in key else 'experts' for key in moved}))
        assert all(value.isfinite() for value in outputs.values())
        return outputs

    model.train_step = watched
    runner.train()
    assert turns == [(turn, {turn}) for turn in ('experts', 'router', 'experts', 'router')]
