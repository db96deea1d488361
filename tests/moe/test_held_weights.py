"""Held weights compute what the weights themselves compute, and are gone when nothing holds them."""

import copy
import pickle

import pytest
import torch
from mmpretrain.registry import MODELS
from torch import nn

from mmadvmoe.attacks import Victim
from mmadvmoe.moe import MoEConv2d, Routing, weights_held
from mmadvmoe.moe.held_weights import HELD
from mmadvmoe.moe.routing import RouteContext

COUNTS = (3, 0, 4)
LAYERS = {
    'plain': dict(kernel_size=3, padding=1),
    'stride and bias': dict(kernel_size=3, padding=1, stride=2, bias=True),
    'a rest of the stride': dict(kernel_size=3, stride=3, padding=(0, 1)),
    'pointwise': dict(kernel_size=1, stride=2),
    'dilation': dict(kernel_size=3, padding=2, dilation=2),
    'groups': dict(kernel_size=3, padding=1, groups=2),
    'reflection': dict(kernel_size=3, padding=1, padding_mode='reflect'),
    'padding by name': dict(kernel_size=3, padding='same'),
}


def build_layer(bias=False, **settings):
    torch.manual_seed(0)
    layer = MoEConv2d(nn.Conv2d(4, 6, bias=bias, **settings), len(COUNTS), RouteContext(len(COUNTS), 'softmax'))
    return layer.requires_grad_(False)


def run(layer, images, logits):
    """The output, and the gradients of images and router logits."""
    images, logits = images.clone().requires_grad_(), logits.clone().requires_grad_()
    routing = Routing.decide(logits)
    assert routing.counts == COUNTS
    output = layer._run(routing.sort(images), routing)
    # An activation in place must find all that the backward pass needs.
    result = torch.relu_(output)
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    return result.detach(), *torch.autograd.grad((result * weights).sum(), (images, logits))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('settings', LAYERS.values(), ids=LAYERS)
def test_outputs_and_gradients_are_those_of_the_weights(settings, layout):
    layer = build_layer(**settings)
    images = torch.randn(sum(COUNTS), 4, 7, 8).contiguous(memory_format=layout)
    logits = torch.eye(len(COUNTS))[torch.tensor([0, 2, 2, 0, 2, 0, 2])] + 0.1 * torch.randn(sum(COUNTS), len(COUNTS))
    expected = run(layer, images, logits)
    with weights_held(layer):
        for _ in range(2):
            for value, wanted in zip(run(layer, images, logits), expected):
                torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            routing = Routing.decide(logits)
            torch.testing.assert_close(
                torch.relu(layer._run(routing.sort(images), routing)), expected[0], rtol=1e-4, atol=1e-5
            )


def test_another_size_and_a_changed_weight_are_seen():
    layer = build_layer(**LAYERS['plain'])
    routing = Routing.fixed(torch.tensor([0, 1, 2]), 3)
    with weights_held(layer):
        for size in (8, 5):
            images = torch.randn(3, 4, size, size)
            torch.testing.assert_close(
                layer._run(images, routing), super(MoEConv2d, layer)._run(images, routing), rtol=1e-4, atol=1e-5
            )
        before = layer._run(images, routing)
        with torch.no_grad():
            layer.weight.mul_(2)
        torch.testing.assert_close(layer._run(images, routing), 2 * before, rtol=1e-4, atol=1e-5)


def test_weights_that_learn_are_not_held():
    layer = build_layer(**LAYERS['plain']).requires_grad_()
    with weights_held(layer):
        layer._run(torch.randn(3, 4, 8, 8), Routing.fixed(torch.tensor([0, 1, 2]), 3)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_other_types_of_numbers_are_served_as_without_it():
    layer = build_layer(**LAYERS['plain'])
    images, routing = torch.randn(3, 4, 8, 8), Routing.fixed(torch.tensor([0, 1, 2]), 3)
    with weights_held(layer):
        with torch.autocast('cpu', torch.bfloat16):
            assert layer._run(images, routing).dtype == torch.bfloat16
        layer.double()
        assert layer._run(images.double(), routing).dtype == torch.float64


@pytest.fixture
def mixture():
    backbone = dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'layer\d\.\d\.conv\d'],
        backbone=dict(type='mmpretrain.ResNet_CIFAR', depth=18, stem_channels=4, base_channels=4),
    )
    cfg = dict(
        type='RobustClassifier',
        backbone=backbone,
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=3, in_channels=32),
    )
    torch.manual_seed(0)
    return MODELS.build(cfg)


def test_an_attack_holds_the_weights_and_lets_them_go(mixture):
    victim = Victim.from_classifier(mixture)
    images = torch.rand(4, 3, 8, 8)
    assert not HELD
    with victim.frozen():
        assert len(HELD) == 16
        held = victim(images)
        with victim.frozen():
            pass
        assert len(HELD) == 16
        # Neither a copy nor a checkpoint knows of it.
        assert len(HELD) == 16 and copy.deepcopy(mixture).backbone.expert_layers()[0] not in HELD
        pickle.dumps(mixture.state_dict())
    assert not HELD
    mixture.eval()
    with torch.no_grad():
        torch.testing.assert_close(victim(images), held.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match='stop'), victim.frozen():
        raise RuntimeError('stop')
    assert not HELD
