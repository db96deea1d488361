"""Mixtures of experts whose weak part is known, on images of 8x8."""

import torch
from mmpretrain.registry import MODELS
from torch import nn

import mmadvmoe  # noqa: F401
from mmadvmoe.attacks import Victim
from mmadvmoe.moe import BaseRouter, router_modules

#: A data preprocessor for networks of images in [0, 1].
UNIT = dict(mean=[0.0] * 3, std=[255.0] * 3)


@MODELS.register_module(force=True)
class TinyPathway(nn.Module):
    """(B, 3, H, W) -> a map of two channels, one for each class."""

    def __init__(self):
        super().__init__()
        # A stem that does nothing: the first layer cannot have experts.
        self.stem = nn.Conv2d(3, 3, 1, bias=False)
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return (self.conv(self.stem(x)),)


@MODELS.register_module(force=True)
class LeftOrRight(BaseRouter):
    """Expert 1 for images whose left half is brighter than their right half, else expert 0."""

    def forward(self, x):
        half = x.shape[-1] // 2
        score = x[..., :half].mean(dim=(1, 2, 3)) - x[..., half:].mean(dim=(1, 2, 3))
        return torch.stack([-score, score], dim=1)


def two_experts(weights, biases):
    """Classes 0 and 1 by the mean brightness of the image, with a weight and a bias for each expert and class."""
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            data_preprocessor=UNIT,
            backbone=dict(
                type='MoEBackbone',
                num_experts=2,
                include=['^conv$'],
                router=dict(type='LeftOrRight'),
                backbone=dict(type='TinyPathway'),
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=2),
        )
    )
    layer = model.backbone.network.conv
    with torch.no_grad():
        model.backbone.network.stem.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        layer.weight.copy_(torch.tensor(weights).view(4, 1, 1, 1).expand(4, 3, 1, 1) / 3)
        layer.bias.copy_(torch.tensor(biases).view(4))
        model.head.fc.weight.copy_(torch.eye(2))
        model.head.fc.bias.zero_()
    return Victim(model).eval()


def mixture_cfg(routing, num_experts=3):
    """A mixture of four classes, with 16 or 8 features before the head."""
    token = routing == 'token'
    dense = dict(
        type='VisionTransformer',
        arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
        img_size=8,
        patch_size=4,
    )
    if not token:
        dense = dict(
            type='ResNet_CIFAR',
            depth=18,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(1,),
            base_channels=4,
            stem_channels=4,
        )
    backbone = dict(
        type='MoEBackbone',
        num_experts=num_experts,
        include=['ffn'] if token else [r'layer\d.*conv\d'],
        routing=routing,
        router=dict(type='ResNetRouter', base_channels=4, num_blocks=1, num_stages=2) if routing == 'image' else None,
        backbone=dense,
    )
    head = dict(type='LinearClsHead', num_classes=4, in_channels=16 if token else 8)
    neck = None if token else dict(type='GlobalAveragePooling')
    return dict(type='ImageClassifier', data_preprocessor=UNIT, backbone=backbone, neck=neck, head=head)


def random_mixture(routing, num_experts=3):
    """A mixture with random weights, large enough that attacks change its predictions and routes."""
    model = MODELS.build(mixture_cfg(routing, num_experts))
    victim = Victim(model).eval()
    nn.init.normal_(model.head.fc.weight)
    images = torch.rand(64, 3, 8, 8)
    for index, router in enumerate(router_modules(model)):
        for parameter in router.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter)
        with torch.no_grad():
            logits = victim.forward_routed(images)[1][index].logits
            if routing != 'token':
                # In the middle, where images go to different experts and an attack can change that.
                router.fc.bias -= logits.mean(0)
    return victim
