"""The smallest real training runs in turns: a Runner, an attacked MoE, sixteen random images."""

import quick_runner  # noqa: F401
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS
from mmpretrain.structures import DataSample
from torch.utils.data import Dataset

import mmadvmoe.attacks  # noqa: F401
import mmadvmoe.models  # noqa: F401
import mmadvmoe.training  # noqa: F401
from mmadvmoe.moe import router_modules, split_parameters

init_default_scope('mmpretrain')
CLASSES = 3


@DATASETS.register_module()
class RandomImages(Dataset):
    """Sixteen fixed images of 8x8 in 0..255, three classes."""

    metainfo = dict(classes=tuple('abc'))

    def __init__(self, size=16):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        sample = DataSample().set_gt_label(index % CLASSES)
        return dict(inputs=self.images[index], data_samples=sample)


def model_cfg(routing='image', num_experts=2, **overrides):
    router = dict(type='ResNetRouter', base_channels=2, num_blocks=1, num_stages=2)
    return (
        dict(
            type='RobustClassifier',
            backbone=dict(
                type='MoEBackbone',
                num_experts=num_experts,
                include=[r'layer\d.*conv\d'],
                routing=routing,
                router=router if routing == 'image' else None,
                backbone=dict(
                    type='ResNet_CIFAR',
                    depth=18,
                    num_stages=2,
                    strides=(1, 2),
                    dilations=(1, 1),
                    out_indices=(1,),
                    base_channels=2,
                    stem_channels=2,
                ),
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=4),
            robust_loss=dict(type='TRADESLoss', beta=1.0),
            data_preprocessor=dict(attack=dict(type='FGSM', eps=8 / 255)),
        )
        | overrides
    )


def group_cfg(**overrides):
    return (
        dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-3),
        )
        | overrides
    )


def turns_cfg(**both):
    return dict(
        constructor='AlternatingOptimWrapperConstructor',
        experts=group_cfg(**both),
        router=group_cfg(**both),
    )


def run_cfg(work_dir, schedule=None, hooks=(), epochs=2, **overrides):
    """A run of ``epochs`` epochs of four iterations."""
    return Config(
        dict(
            default_scope='mmpretrain',
            work_dir=str(work_dir),
            model=model_cfg(),
            train_dataloader=dict(
                dataset=dict(type='RandomImages'),
                batch_size=4,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=turns_cfg(),
            custom_hooks=[dict(type='AlternatingOptimHook', **(schedule or {})), *hooks],
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', interval=-1),
                logger=dict(type='LoggerHook', interval=1),
            ),
            randomness=dict(seed=0),
            log_level='WARNING',
            visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        )
        | overrides
    )


def build_runner(cfg):
    """A Runner of its own, also when several live in one process."""
    build_runner.count += 1
    cfg = Config(cfg.to_dict() if isinstance(cfg, (Config, ConfigDict)) else cfg)
    cfg.experiment_name = f'tiny_{build_runner.count}'
    return Runner.from_cfg(cfg)


build_runner.count = 0


def snapshot(model):
    """Copies of all that training may change: ``{group: {name: tensor}}``, buffers included."""
    routers = router_modules(model)
    prefixes = tuple(name + '.' for name, module in model.named_modules() if module in routers)
    copies = {'experts': {}, 'router': {}}
    for name, tensor in model.state_dict().items():
        group = 'router' if name.startswith(prefixes) else 'experts'
        copies[group][name] = tensor.detach().clone()
    assert {n for n, _ in split_parameters(model)['router']} <= set(copies['router'])
    return copies


class TurnRecorder(Hook):
    """Notes for each iteration which groups changed, in parameters or buffers."""

    # After every step, those of AlternatingOptimHook included.
    priority = 'VERY_LOW'

    def __init__(self):
        self.changed = []

    def before_train(self, runner):
        self.model = getattr(runner.model, 'module', runner.model)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.last = snapshot(self.model)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        now = snapshot(self.model)
        self.changed.append(
            {
                group
                for group, before in self.last.items()
                if not all(now[group][name].equal(tensor) for name, tensor in before.items())
            }
        )
