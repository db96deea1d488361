import pytest
import torch
from mmpretrain.models import ClsDataPreprocessor  # noqa: F401  (fills MMPretrain's registry)
from mmpretrain.registry import MODELS
from tiny_models import dense_backbone
from torch import nn

import mmadvmoe.moe  # noqa: F401  (registers MoEBackbone)
from mmadvmoe.attacks import Victim


class TinyBackbone(nn.Module):
    """(B, 3, 8, 8) to (B, 64), in a way that every pixel matters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Flatten())

    def forward(self, x):
        return self.layers(x)


class TinyClassifier(nn.Module):
    """The attributes that a victim looks at, and MMPretrain's call."""

    def __init__(self, num_classes=5, backbone=None):
        super().__init__()
        self.backbone = backbone or TinyBackbone()
        self.head = nn.Linear(64, num_classes)
        self.head.num_classes = num_classes

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def make_tiny():
    """``make_tiny(num_classes)``: a victim, four images, and labels that it predicts."""

    def make(num_classes=5, batch=4):
        victim = Victim(TinyClassifier(num_classes))
        images = torch.rand(batch, 3, 8, 8)
        return victim, images, victim(images).argmax(1).detach()

    return make


@pytest.fixture
def make_moe():
    """``make_moe(...)``: an MMPretrain classifier of 8 x 8 images, whose ``MoEBackbone`` sends them several ways."""

    def make(routing='image', num_experts=2, num_classes=4, classifier='ImageClassifier', **kwargs):
        small = dict(type='ResNetRouter', base_channels=2, num_blocks=1)
        router = small if routing == 'image' else dict(type='LayerRouter')
        model = MODELS.build(
            dict(
                type=classifier,
                backbone=dict(
                    type='MoEBackbone',
                    num_experts=num_experts,
                    include=[r'layer\d.*conv\d'],
                    routing=routing,
                    router=router,
                    backbone=dense_backbone(4),
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=8),
                **kwargs,
            )
        )
        if routing == 'image':
            # As it is drawn, a router sends all images one way.
            probe = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                model.backbone.router.fc.bias -= Victim(model.eval()).forward_routed(probe)[1][0].logits.mean(dim=0)
            model.train()
        return model

    return make
