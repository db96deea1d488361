"""The smallest real classifiers, and a batch of random images for them."""

import torch
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import mmadvmoe  # noqa: F401

CLASSES = 3


def dense_backbone(channels=2):
    return dict(
        type='ResNet_CIFAR',
        depth=18,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
        base_channels=channels,
        stem_channels=channels,
    )


def moe_backbone(routing='image', num_experts=2):
    router = dict(type='ResNetRouter', base_channels=2, num_blocks=1, num_stages=2)
    return dict(
        type='MoEBackbone',
        num_experts=num_experts,
        include=[r'layer\d.*conv\d'],
        routing=routing,
        router=router if routing == 'image' else None,
        backbone=dense_backbone(),
    )


def make_classifier(kind='RobustClassifier', moe=False, train_cfg=None, seed=0, **preprocessor):
    """A classifier of 8x8 images into three classes; other arguments are those of the data preprocessor."""
    torch.manual_seed(seed)
    return MODELS.build(classifier_cfg(kind, moe, train_cfg=train_cfg, data_preprocessor=preprocessor))


def classifier_cfg(kind='RobustClassifier', moe=False, data_preprocessor=None, **overrides):
    return (
        dict(
            type=kind,
            backbone=moe_backbone() if moe else dense_backbone(),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=4),
            data_preprocessor=dict(type='AdvDataPreprocessor') | (data_preprocessor or {}),
        )
        | overrides
    )


def make_data(count=4, size=8):
    """What a data loader gives: ``count`` 8-bit images, labelled 0, 1, 2, 0..."""
    generator = torch.Generator().manual_seed(1)
    return dict(
        inputs=[torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator) for _ in range(count)],
        data_samples=[DataSample().set_gt_label(index % CLASSES) for index in range(count)],
    )
